"""config.json in a workdir: the record of what was run, which later versions still understand.

Whatever changes what a run means is a field with a version (`Field.since`), and the value that an
older run means by not having it (`Field.before`): so an older workdir resumes.
"""

from ml_collections import ConfigDict

from nca_jax.checks import UserError
from nca_jax.config import fields_of, flatten
from nca_jax.field import Value
from nca_jax.fields import OPTIONAL
from nca_jax.files import AnyPath, read_json

# 1 had none written, and every loss had an alpha; 2 had no data.join; 3 no score_unit, warmup_from;
# 4 no data.store, compiler_options, model.splash, optim.moments, fields of losses but alpha, beta;
# 5 no optim.grad_dtype, data.train_on, loss.reduce; 6 no model.head;
# 7 no generate.top_k, min_p, logps, mesh.
VERSION = 8
NEUTRAL = {"loss.alpha": 0.0}  # fields that older runs have, and the value that meant nothing
CONFIG = "config.json"


def config_json(config: ConfigDict, version: int = VERSION) -> dict[str, Value]:
    """Returns what a workdir's config.json holds: every field, and the version of the table.

    Args:
      version: of the table that the run began under, which says which fields are newer than it.
    """
    return {"version": version, **flatten(config)}


def read_saved(file: AnyPath) -> ConfigDict:
    """Returns the config of a run from its config.json, of this version or an older one.

    Raises:
      UserError: the file is not there, damaged, or of a newer version.
    """
    nested = {}
    for name, value in _meaning_today(file)[0].items():
        *sections, leaf = name.split(".")
        inner = nested
        for part in sections:
            inner = inner.setdefault(part, {})
        inner[leaf] = value
    return ConfigDict(nested).lock()


def check_same_run(config: ConfigDict, saved_file: AnyPath) -> ConfigDict:
    """Refuses to resume a run under another config, except for fields that may change.

    Returns:
      The config that the run goes on under: a field that is newer than the run, and has its default
      in `config`, means as before; what is left open (`Field.auto`) is what was chosen. What may
      change stays open: it is chosen anew, by the devices that there are.
    Raises:
      UserError: names each field that differs, with both values; or as `read_saved`.
    """
    saved, newer = _meaning_today(saved_file)
    fields = fields_of(config.loss.name)
    config = config.copy_and_resolve_references()
    for name, field in fields.items():
        here = flatten(config).get(name)
        is_open = field.auto is not None and here == field.auto and not field.may_change
        if name in saved and (is_open or (name in newer and here == field.default)):
            config.update_from_flattened_dict({name: saved[name]})
    now = flatten(config)
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
    return config


def saved_version(file: AnyPath) -> int:
    """Returns the version of the table that a run began under, from its config.json.

    Raises:
      UserError: the file is damaged, or of a newer version.
    """
    version = read_json(file).get("version", 1)
    if not isinstance(version, int):
        raise UserError(
            f"{file} is damaged (version {version!r}); restore it, or use a new --workdir."
        )
    if version > VERSION:
        raise UserError(
            f"{file} was written by a newer nca_jax (version {version}, not {VERSION})."
        )
    return version


def _meaning_today(file: AnyPath) -> tuple[dict[str, Value], set[str]]:
    """Returns the fields of a config.json as today's table has them, and which are newer than it.

    A field that is newer than the file has the value that "as before" means; one that is no field
    any more is left out where it had the value that meant nothing.
    """
    version, saved = saved_version(file), read_json(file)
    saved.pop("version", None)
    fields = fields_of(str(saved.get("loss.name")))
    newer = {
        name: field.default if field.before is None else field.before
        for name, field in fields.items()
        if field.since > version and name.split(".")[0] not in OPTIONAL
    }
    known = {x: v for x, v in saved.items() if x in fields or NEUTRAL.get(x) != v}
    meant = newer | known
    wrong = [
        name
        for name, field in fields.items()
        if (name in meant or name.split(".")[0] not in OPTIONAL)
        and not field.check.accepts(meant.get(name))
    ]
    if wrong:
        raise UserError(
            f"{file} is damaged ({', '.join(wrong[:5])} lacking or wrong); restore it, or use a "
            "new --workdir."
        )
    return meant, set(newer)
