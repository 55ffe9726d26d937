"""The config of a run: what a config file must hold, and how a command reads it.

The config file is the only place where a default lives. `FIELDS` is the whole list of fields that
the code reads; a file with one more or one less is refused, and so is a value that makes no sense,
before a device is touched.
"""

import json
import math

from absl import flags
from ml_collections import ConfigDict, config_flags

from nca_jax.checks import UserError
from nca_jax.data.chat import FORMATS
from nca_jax.files import AnyPath
from nca_jax.losses import LOSSES, PAIR_LOSSES
from nca_jax.metrics import IS_BETTER_HIGH
from nca_jax.model_config import MODELS


def _one_of(*names: str):
    return str, lambda x: x in names, "one of " + ", ".join(repr(name) for name in names)


TEXT = (str, lambda x: True, "a string")
FLAG = (bool, lambda x: True, "True or False")
COUNT = (int, lambda x: x >= 1, "a whole number of at least 1")
COUNT_OR_0 = (int, lambda x: x >= 0, "a whole number of at least 0")
AXIS = (int, lambda x: x >= 1 or x == -1, "a whole number of at least 1, or -1 for the rest")
POSITIVE = (float, lambda x: 0 < x < math.inf, "a number above 0")
NOT_NEGATIVE = (float, lambda x: 0 <= x < math.inf, "a number of at least 0")
FRACTION = (float, lambda x: 0 <= x < 1, "a number in [0, 1)")

FIELDS = {
    "seed": COUNT_OR_0,
    "steps": COUNT_OR_0,
    "epochs": NOT_NEGATIVE,
    "log_every": COUNT,
    "eval_every": COUNT_OR_0,
    "save_every": COUNT,
    "model.name": _one_of("", *MODELS),
    "model.init_from": TEXT,
    "model.dtype": _one_of("float32", "bfloat16"),
    "model.remat": _one_of("none", "dots", "full"),
    "model.scan_layers": FLAG,
    "model.attention": _one_of("auto", "pairs", "splash"),
    "reference.kind": _one_of("live", "cached"),
    "reference.init_from": TEXT,
    "reference.cache": TEXT,
    "data.files": TEXT,
    "data.weights": TEXT,
    "data.eval_files": TEXT,
    "data.eval_fraction": FRACTION,
    "data.tokenizer": TEXT,
    "data.format": _one_of(*FORMATS),
    "data.num_responses": (int, lambda x: x >= 2, "K, a whole number of at least 2"),
    "data.choose": _one_of("all", "first", "random", "best_worst_random"),
    "data.max_prompt_len": COUNT,
    "data.max_response_len": COUNT,
    "data.prompt_keep": _one_of("end", "start"),
    "data.too_long": _one_of("truncate", "drop", "skip", "stop"),
    "data.bad_rows": _one_of("stop", "skip"),
    "data.shuffle": FLAG,
    "data.batch_size": COUNT,
    "data.row_len": COUNT,
    "data.rows": COUNT,
    "data.block": COUNT,
    "data.row_pairs": COUNT_OR_0,
    "data.align": (int, lambda x: x in (1, 8, 16), "1, 8 or 16"),
    "data.first_bonus": NOT_NEGATIVE,
    "loss.name": _one_of(*LOSSES),
    "loss.alpha": NOT_NEGATIVE,
    "loss.beta": POSITIVE,
    "loss.logits_chunk": COUNT,
    "optim.lr": POSITIVE,
    "optim.schedule": _one_of("cosine", "constant"),
    "optim.warmup_frac": FRACTION,
    "optim.clip_norm": NOT_NEGATIVE,
    "optim.b1": FRACTION,
    "optim.b2": FRACTION,
    "optim.eps": POSITIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.mu_dtype": _one_of("float32", "bfloat16"),
    "mesh.data": AXIS,
    "mesh.fsdp": AXIS,
    "mesh.tensor": AXIS,
    "mesh.expert": AXIS,
    "checkpoint.keep_last": COUNT,
    "checkpoint.best_metric": _one_of("", *IS_BETTER_HIGH),
    "generate.max_new_tokens": COUNT,
    "generate.num_samples": COUNT,
    "generate.temperature": NOT_NEGATIVE,
    "generate.top_p": (float, lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "generate.stop": TEXT,
    "generate.batch_size": COUNT,
    "generate.scorer": TEXT,
    "log.tensorboard": FLAG,
    "log.wandb_project": TEXT,
}

DEFINE_FLAG = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    str: flags.DEFINE_string,
    type(None): flags.DEFINE_string,
}

# What a resumed run may change: nothing here moves a number of the steps that follow.
MAY_CHANGE = (
    "log",
    "generate",
    "mesh",
    "checkpoint",
    "log_every",
    "eval_every",
    "save_every",
    "model.remat",
    "model.scan_layers",
    "model.attention",
)


def flatten(config: ConfigDict) -> dict[str, object]:
    """Returns {"optim.lr": 1e-5, ...}."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{leaf}": x for leaf, x in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def read_saved(file: AnyPath) -> ConfigDict:
    """Returns the config of a run from its config.json, nested again.

    It is the record of what was run, so it is not checked against the fields of today.

    Raises:
      UserError: the file is not there.
    """
    if not file.exists():
        raise UserError(f"{file} is not there; give the --workdir of a training run.")
    nested = {}
    for name, value in json.loads(file.read_text()).items():
        *sections, leaf = name.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[leaf] = value
    return ConfigDict(nested).lock()


def check_config(config: ConfigDict) -> None:
    """Raises UserError unless every field is there, known, in range, and goes with the others."""
    flat = flatten(config)
    missing, unknown = sorted(FIELDS.keys() - flat.keys()), sorted(flat.keys() - FIELDS.keys())
    if missing or unknown:
        raise UserError(
            f"The config file lacks {missing or 'nothing'} and has {unknown or 'nothing'} that "
            "nca_jax does not read; nca_jax/config.py lists the fields."
        )
    for name, (kind, is_good, wanted) in FIELDS.items():
        value = flat[name]
        is_kind = isinstance(value, (int, float) if kind is float else kind)
        if not is_kind or (kind is not bool and isinstance(value, bool)) or not is_good(value):
            raise UserError(f"config.{name} must be {wanted}; it is {value!r}.")
    _check_together(config)


def _check_together(config: ConfigDict) -> None:
    data, loss, model = config.data, config.loss, config.model
    nb = data.row_len // data.block
    for is_bad, message in (
        (
            bool(config.steps) == bool(config.epochs),
            "set one of config.steps and config.epochs, and the other to 0",
        ),
        (
            loss.name in PAIR_LOSSES and (data.num_responses != 2 or loss.alpha != 0),
            f"config.loss.name={loss.name!r} is a loss of pairs with hard labels: it wants "
            f"config.data.num_responses=2 and config.loss.alpha=0, and has "
            f"{data.num_responses} and {loss.alpha}; for soft labels use 'nca' or 'infonca'",
        ),
        (
            not (model.name or model.init_from),
            "set config.model.name (a size, with random weights) or config.model.init_from",
        ),
        (
            model.remat != "none" and not model.scan_layers,
            f"config.model.remat={model.remat!r} saves memory in scanned layers only: unrolled, "
            "all are computed again at once; set config.model.scan_layers=True",
        ),
        (
            (config.reference.kind == "cached") != bool(config.reference.cache),
            "config.reference.cache is the folder of kind='cached', and is read by no other kind",
        ),
        (
            data.format == "released" and (data.too_long, data.prompt_keep) != ("truncate", "end"),
            "config.data.format='released' cuts as the PyTorch release does: set "
            "config.data.too_long='truncate' and config.data.prompt_keep='end'",
        ),
        (
            bool(data.row_len % data.block),
            f"config.data.block={data.block} must divide config.data.row_len={data.row_len}",
        ),
        (
            bool(data.row_len % loss.logits_chunk),
            f"config.loss.logits_chunk={loss.logits_chunk} must divide "
            f"config.data.row_len={data.row_len}",
        ),
        (
            0 < data.row_pairs < nb,
            f"config.data.row_pairs={data.row_pairs} is less than the {nb} blocks of a row",
        ),
        (
            bool(data.eval_files) and data.eval_fraction > 0,
            "set one of config.data.eval_files and config.data.eval_fraction",
        ),
        (
            list(config.mesh.values()).count(-1) > 1,
            "only one axis of config.mesh may be -1",
        ),
        (
            not data.files,
            "config.data.files names no rows; give a glob of .jsonl files or tfds:NAME:SPLIT",
        ),
        (
            bool(config.eval_every) and not data.eval_files and not data.eval_fraction,
            "config.eval_every is set, but no rows are held out: set config.data.eval_fraction or "
            "config.data.eval_files",
        ),
        (
            bool(config.checkpoint.best_metric) and not config.eval_every,
            "config.checkpoint.best_metric goes by evaluations; set config.eval_every",
        ),
    ):
        if is_bad:
            raise UserError(message + ".")


def parse_flags(argv: list[str], **extra: str | int | bool) -> tuple[ConfigDict, flags.FlagValues]:
    """Reads `--config=FILE[:args] --config.key=value` and the command's own flags.

    Args:
      argv: as in sys.argv.
      **extra: name=default of the other flags; a default of None makes a flag required.
    Returns:
      The checked config, locked, and the flags as attributes.
    Raises:
      UserError: an unknown flag, key or value, or a config that `check_config` refuses.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "FILE[:args]", flag_values=values, sys_argv=argv
    )
    _read_flags(values, argv, extra)
    try:
        config = values.config
        # A file that failed to load answers every attribute with the error that it had.
        config = config if config is None else ConfigDict(config.to_dict()).lock()
    except (KeyError, AttributeError, TypeError, OSError, ValueError) as error:
        raise UserError(f"Command line: {error}") from error
    if config is None:
        raise UserError("Give --config=FILE[:args]; see configs/.")
    check_config(config)
    return config, values


def parse_own_flags(argv: list[str], **extra: str | int) -> flags.FlagValues:
    """Reads the flags of a command that takes no config: those of `extra`, as in `parse_flags`."""
    values = flags.FlagValues()
    _read_flags(values, argv, extra)
    return values


def _read_flags(values: flags.FlagValues, argv: list[str], extra: dict[str, str | int]) -> None:
    """Defines the flags of `extra` and reads the command line into `values`."""
    for name, default in extra.items():
        define = DEFINE_FLAG[type(default)]
        define(name, default, "", flag_values=values)
    try:
        rest = values(argv)
    except UserError:
        raise
    except (flags.Error, KeyError, AttributeError, TypeError, OSError, ValueError) as error:
        raise UserError(f"Command line: {error}") from error
    if len(rest) > 1:
        raise UserError(f"Unknown argument {rest[1]!r}; flags are --name=value.")
    for name, default in extra.items():
        if default is None and values[name].value is None:
            raise UserError(f"Give --{name}=...")


def check_same_run(config: ConfigDict, saved_file: AnyPath) -> None:
    """Refuses to resume a run under another config, except for what MAY_CHANGE lists.

    Raises:
      UserError: names each field that differs, with both values.
    """
    now, saved = flatten(config), json.loads(saved_file.read_text())
    differs = [
        f"{name}: {saved.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(now.keys() | saved.keys())
        if now.get(name) != saved.get(name)
        and name not in MAY_CHANGE
        and name.split(".")[0] not in MAY_CHANGE
    ]
    if differs:
        raise UserError(
            f"{saved_file.parent} holds a run of another config ({'; '.join(differs)}); use a new "
            "--workdir, or the same config."
        )
