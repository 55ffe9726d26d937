"""The command line: `--config=FILE[:args] --config.section.field=value`, and a command's own flags.

FILE is a Python file with `get_config(arg)`, or nca_jax:NAME for one of the project's own, which
are there after `pip install` too: --config=nca_jax:jsonl:files=records.jsonl,algo=nca.
"""

import difflib
import importlib.util
import re
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from nca_jax.checks import UserError
from nca_jax.config import OPTIONAL, check_config, fields_of, flatten, section
from nca_jax.config_doc import describe

OWN = "nca_jax"  # --config=nca_jax:NAME
HERE = Path(__file__).parent
CONFIG_FOLDERS = (HERE / "configs", HERE.parent / "configs")  # installed, and in a checkout

DEFINE_FLAG = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    str: flags.DEFINE_string,
    type(None): flags.DEFINE_string,
}


def parse_flags(
    argv: list[str], *, sections: tuple[str, ...] = (), **extra: str | int | bool | None
) -> tuple[ConfigDict, flags.FlagValues]:
    """Reads the config, its overrides and the command's own flags; --help_config prints all fields.

    An exception that is raised inside a config file is the file's own, and keeps its traceback.

    Args:
      argv: as in sys.argv.
      sections: optional sections that the command reads; where the config lacks them they come in
        with the table's defaults, as do those of which a field is overridden.
      **extra: name=default of the command's flags; a default of None makes a flag required.
    Returns:
      The checked config, locked, and the flags as attributes.
    Raises:
      UserError: an unknown flag, key or value, or a config that `check_config` refuses.
    """
    if "--help_config" in argv:
        print(describe(), end="")
        raise SystemExit(0)
    where, argv = _take_config(argv)
    values = flags.FlagValues()
    config = None
    if where is not None:
        config = load_config(where)
        overridden = [x for x in OPTIONAL if any(arg.startswith(f"--config.{x}.") for arg in argv)]
        for name in (*sections, *overridden):
            if name not in config:
                config[name] = section(name)
        _check_names(config, argv)
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    _read_flags(values, argv, extra)
    if config is None:
        raise UserError("Give --config=FILE[:args]; see configs/.")
    config = ConfigDict(values.config.to_dict()).lock()
    check_config(config)
    return config, values


def parse_own_flags(argv: list[str], **extra: str | int | None) -> flags.FlagValues:
    """Reads the flags of a command that takes no config: those of `extra`, as in `parse_flags`."""
    values = flags.FlagValues()
    _read_flags(values, argv, extra)
    return values


def load_config(where: str) -> ConfigDict:
    """Returns the config of FILE[:args] or nca_jax:NAME[:args], unlocked and not checked yet.

    Raises:
      UserError: there is no such file, or it has no get_config.
    """
    name, _, arg = where.partition(":")
    if name == OWN:
        name, _, arg = arg.partition(":")
        path = _own_config(name)
    else:
        path = Path(name)
    if not path.is_file():
        raise UserError(f"--config={where}: there is no file {path}; see configs/.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={where}: {path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={where}: {path} has no function get_config(arg).")
    config = module.get_config(arg) if arg else module.get_config()
    return ConfigDict(config.to_dict())


def _own_config(name: str) -> Path:
    """Returns the file of one of the project's configs."""
    found = {path.stem: path for folder in CONFIG_FOLDERS for path in sorted(folder.glob("*.py"))}
    if name not in found:
        raise UserError(f"--config={OWN}:{name}: wanted one of {', '.join(found) or 'none'}.")
    return found[name]


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Returns the value of --config, and the other arguments."""
    for i, arg in enumerate(argv):
        if arg.startswith("--config="):
            return arg.removeprefix("--config="), argv[:i] + argv[i + 1 :]
        if arg == "--config" and i + 1 < len(argv):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
    return None, argv


def _check_names(config: ConfigDict, argv: list[str]) -> None:
    """Raises UserError for an override of a field that the config does not have."""
    there = flatten(config)
    for arg in argv:
        found = re.match(r"--config\.([^=]+)", arg)
        if not found or found[1] in there:
            continue
        name = found[1]
        head, _, leaf = name.rpartition(".")
        inside = [x.rpartition(".")[2] for x in there if x.rpartition(".")[0] == head]
        near = difflib.get_close_matches(leaf, inside, n=1) or difflib.get_close_matches(
            name, there
        )
        said = f" Did you mean {near[0]}?" if near else ""
        others = f" config.{head} has {', '.join(inside)}." if head and inside else ""
        if name in fields_of(config.loss.name) or head == "loss":
            others += f" The loss is {config.loss.name!r}."
        raise UserError(f"config.{name} is no field of this config.{said}{others}")


def _read_flags(
    values: flags.FlagValues, argv: list[str], extra: dict[str, str | int | bool | None]
) -> None:
    """Defines the flags of `extra` and reads the command line into `values`."""
    for name, default in extra.items():
        define = DEFINE_FLAG[type(default)]
        define(name, default, "", flag_values=values)
    try:
        rest = values(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"Command line: {error}") from error
    if len(rest) > 1:
        raise UserError(f"Unknown argument {rest[1]!r}; flags are --name=value.")
    for name, default in extra.items():
        if default is None and values[name].value is None:
            raise UserError(f"Give --{name}=...")
