"""The command line: `--config=FILE[:args] --config.section.field=value`, and a command's own flags.

FILE is a Python file with `get_config(arg)`, or nca_jax:NAME for one of the project's own, which
are there after `pip install` too: --config=nca_jax:jsonl:files=records.jsonl,algo=nca. A command
that has a --workdir takes the config of the run there where no --config is given.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from nca_jax.checks import UserError
from nca_jax.config import default_config, fields_of, flatten, section
from nca_jax.config_check import check_config
from nca_jax.config_doc import describe
from nca_jax.fields import FIELDS, OPTIONAL
from nca_jax.files import as_path
from nca_jax.other_names import did_you_mean
from nca_jax.saved_config import CONFIG, read_saved

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
    argv: list[str],
    *,
    sections: tuple[str, ...] = (),
    needs_config: bool = True,
    **extra: str | int | bool | None,
) -> tuple[ConfigDict, flags.FlagValues]:
    """Reads the config, its overrides and the command's own flags; --help_config prints all fields.

    An exception that is raised inside a config file is the file's own, and keeps its traceback,
    unless it is a UserError.

    Args:
      argv: as in sys.argv.
      sections: optional sections that the command reads; where the config lacks them they come in
        with the table's defaults, as do those of which a field is overridden.
      needs_config: False: without --config it is that of the table, which `check_config` would
        refuse, and `"config" in flags` is False.
      **extra: name=default of the command's flags; a default of None makes a flag required.
    Returns:
      The checked config, locked, and the flags as attributes.
    Raises:
      UserError: an unknown flag, key or value, or a config that `check_config` refuses.
    """
    if "--help_config" in argv:
        print(describe(), end="")
        raise SystemExit(0)
    where, argv = _take(argv, "config")
    workdir = _take(argv, "workdir")[0] if "workdir" in extra else None
    values, given, known = flags.FlagValues(), _overridden(argv), ["config"]
    config = load_config(where) if where else _saved_config(workdir)
    if config is not None:
        for name in (*sections, *(x.split(".")[0] for x in given)):
            if name in OPTIONAL and name not in config:
                config[name] = section(name)
        known += [f"config.{name}" for name in fields_of(config.loss.name)]
        _check_names(config, given, known)
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    _read_flags(values, argv, extra, known)
    if config is None and not needs_config:
        return default_config(), values
    if config is None:
        a_run = f", or the --workdir of a run: {workdir} has no {CONFIG}" if workdir else ""
        raise UserError(f"Give --config=FILE[:args], see configs/{a_run}.")
    config = ConfigDict(values.config.to_dict())
    _end_by_what_is_given(config, given)
    check_config(config)
    return config.lock(), values


def parse_own_flags(argv: list[str], **extra: str | int | None) -> flags.FlagValues:
    """Reads the flags of a command that takes no config: those of `extra`, as in `parse_flags`."""
    values = flags.FlagValues()
    _read_flags(values, argv, extra, [])
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
        near = f" Did you mean {OWN}:{name}?" if name in _own_configs() else ""
        near = f" Did you mean {name}.py?" if path.with_suffix(".py").is_file() else near
        raise UserError(f"--config={where}: there is no file {path}; see configs/.{near}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={where}: {path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={where}: {path} has no function get_config(arg).")
    config = module.get_config(arg) if arg else module.get_config()
    return ConfigDict(config.to_dict())


def _own_configs() -> dict[str, Path]:
    """Returns {name: file} of the project's configs."""
    return {path.stem: path for folder in CONFIG_FOLDERS for path in sorted(folder.glob("*.py"))}


def _own_config(name: str) -> Path:
    found = _own_configs()
    if name not in found:
        raise UserError(f"--config={OWN}:{name}: wanted one of {', '.join(found) or 'none'}.")
    return found[name]


def _saved_config(workdir: str | None) -> ConfigDict | None:
    """Returns the config of the run in a workdir, unlocked; None where there is none."""
    if not workdir or not (as_path(workdir) / CONFIG).exists():
        return None
    return ConfigDict(read_saved(as_path(workdir) / CONFIG).to_dict())


def _take(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """Returns the last value of --name, None without one, and the other arguments."""
    value, others, rest = None, [], iter(argv)
    for arg in rest:
        flag, equals, text = arg.partition("=")
        if flag not in (f"--{name}", f"-{name}"):
            others.append(arg)
        else:
            value = text if equals else next(rest, None)
    return value, others


def _overridden(argv: Sequence[str]) -> list[str]:
    """Returns the names, such as "optim.lr", of all overrides of the config."""
    found = [re.match(r"--?(?:no)?config\.([^=]+)", arg) for arg in argv]
    return [override[1] for override in found if override]


def _check_names(config: ConfigDict, given: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError for an override of a field that the config does not have."""
    there = flatten(config)
    for name in given:
        if name in there:
            continue
        head = name.rpartition(".")[0]
        inside = [x.removeprefix(f"{head}.") for x in there if x.rpartition(".")[0] == head]
        said = did_you_mean(f"config.{name}", known)
        if inside:
            said += f" {f'config.{head}' if head else 'config'} has {', '.join(inside)}."
        if head == "loss":
            said += f" The loss is {config.loss.name!r}."
        raise UserError(f"config.{name} is no field of this config.{said}")


def _end_by_what_is_given(config: ConfigDict, given: Sequence[str]) -> None:
    """Lets steps or epochs of the command line, where one is there, win over the config's other."""
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if name in given and other not in given and config[name] and config[other]:
            print(f"--config.{name}={config[name]} wins over the config's {other}={config[other]}")
            config[other] = type(config[other])(0)


def _read_flags(
    values: flags.FlagValues,
    argv: list[str],
    extra: dict[str, str | int | bool | None],
    known: Sequence[str],
) -> None:
    """Defines the flags of `extra` and reads the command line into `values`.

    Args:
      known: other flags that there are, which a wrong one may have meant.
    """
    for name, default in extra.items():
        define = DEFINE_FLAG[type(default)]
        define(name, default, "", flag_values=values)
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        said = did_you_mean(error.flagname, [*extra, *known], prefix="--")
        raise UserError(f"There is no flag --{error.flagname}.{said} --help lists them.") from None
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"Command line: {error}{_wanted(str(error))}") from error
    if len(rest) > 1:
        raise UserError(
            f"Unknown argument {rest[1]!r}; flags are --name=value, and what a config file takes "
            "follows its name: --config=FILE:name=value,name=value."
        )
    for name, default in extra.items():
        if default is None and values[name].value is None:
            raise UserError(f"Give --{name}=...")


def _wanted(error: str) -> str:
    """Returns what a field must be, of which absl says that its value is no such thing."""
    found = re.match(r"flag --config\.([\w.]+)=", error)
    return f"; it must be {FIELDS[found[1]].check.wanted}." if found and found[1] in FIELDS else ""
