"""config.json in a workdir: the record of what was run, which later versions still understand.

Whatever changes what a run means is a field with a version (`Field.since`), and the value that an
older run means by not having it (`Field.before`): so an older workdir resumes.
"""

import json

from ml_collections import ConfigDict

from nca_jax.checks import UserError
from nca_jax.config import OPTIONAL, fields_of, flatten
from nca_jax.field import Value
from nca_jax.files import AnyPath

VERSION = 3  # 1 had none written, and every loss had an alpha
NEUTRAL = {"loss.alpha": 0.0}  # fields that older runs have, and the value that meant nothing


def config_json(config: ConfigDict) -> dict[str, Value]:
    """Returns what a workdir's config.json holds: every field, and the version of the table."""
    return {"version": VERSION, **flatten(config)}


def read_saved(file: AnyPath) -> ConfigDict:
    """Returns the config of a run from its config.json, of this version or an older one.

    Raises:
      UserError: the file is not there, or of a newer version.
    """
    if not file.exists():
        raise UserError(f"{file} is not there; give the --workdir of a training run.")
    nested = {}
    for name, value in _meaning_today(file).items():
        *sections, leaf = name.split(".")
        inner = nested
        for part in sections:
            inner = inner.setdefault(part, {})
        inner[leaf] = value
    return ConfigDict(nested).lock()


def check_same_run(config: ConfigDict, saved_file: AnyPath) -> None:
    """Refuses to resume a run under another config, except for fields that may change.

    Raises:
      UserError: names each field that differs, with both values.
    """
    if not saved_file.exists():
        return
    now, saved = flatten(config), _meaning_today(saved_file)
    fields = fields_of(config.loss.name)
    differs = [
        f"{name}: {saved.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(now.keys() | saved.keys())
        if now.get(name) != saved.get(name) and not (name in fields and fields[name].may_change)
    ]
    if differs:
        raise UserError(
            f"{saved_file.parent} holds a run of another config ({'; '.join(differs)}); use a new "
            "--workdir, or the same config."
        )


def _meaning_today(file: AnyPath) -> dict[str, Value]:
    """Returns the fields of a config.json as today's table has them.

    A field that is newer than the file has the value that "as before" means; one that is no field
    any more is left out where it had the value that meant nothing.
    """
    saved = json.loads(file.read_text())
    version = saved.pop("version", 1)
    if version > VERSION:
        raise UserError(
            f"{file} was written by a newer nca_jax (version {version}, not {VERSION})."
        )
    fields = fields_of(saved.get("loss.name", ""))
    newer = {
        name: field.default if field.before is None else field.before
        for name, field in fields.items()
        if field.since > version and name.split(".")[0] not in OPTIONAL
    }
    known = {x: v for x, v in saved.items() if x in fields or NEUTRAL.get(x) != v}
    return newer | known
