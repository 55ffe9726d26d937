"""A config that cannot be meant is refused, before a device is touched.

A field may be missing, unknown, out of the range that the table of `nca_jax.fields` has, or at odds
with another.
"""

from ml_collections import ConfigDict

from nca_jax.checks import UserError
from nca_jax.config import fields_of, flatten
from nca_jax.field import Field, Value
from nca_jax.fields import FIELDS, OPTIONAL
from nca_jax.losses import LOSSES
from nca_jax.other_names import did_you_mean


def check_config(config: ConfigDict) -> None:
    """Raises UserError unless every field is there, known, in range, and goes with the others."""
    flat = flatten(config)
    _check(flat, "loss.name", FIELDS["loss.name"])
    fields = fields_of(config.loss.name)
    wanted = {x for x in fields if x.split(".")[0] in config or x.split(".")[0] not in OPTIONAL}
    missing, unknown = sorted(wanted - flat.keys()), sorted(flat.keys() - wanted)
    if missing or unknown:
        known = [f"config.{name}" for name in fields]
        near = did_you_mean(f"config.{unknown[0]}", known) if unknown else ""
        raise UserError(
            f"The config (loss {config.loss.name!r}) lacks {missing or 'nothing'} and has "
            f"{unknown or 'nothing'} that nca_jax does not read; docs/config.md lists the "
            f"fields.{near} Another loss is chosen by the argument `algo` of a config file."
        )
    for name in wanted:
        _check(flat, name, fields[name])
    _check_together(config)


def _check(flat: dict[str, Value], name: str, field: Field) -> None:
    if not field.check.accepts(flat.get(name)):
        raise UserError(f"config.{name} must be {field.check.wanted}; it is {flat.get(name)!r}.")


def _check_together(config: ConfigDict) -> None:
    data, model, loss, kind = config.data, config.model, config.loss, config.reference.kind
    record, best, optim = LOSSES[loss.name], config.checkpoint.best_metric, config.optim
    num_blocks = data.row_len // data.block if data.block else 0
    is_reward = model.head == "reward"
    for is_bad, message in (
        (
            bool(config.steps) == bool(config.epochs),
            "set one of config.steps and config.epochs, and the other to 0",
        ),
        (
            data.num_responses != record.nearest_k(data.num_responses),
            f"config.loss.name={loss.name!r} takes {record.takes} responses a prompt: set "
            f"config.data.num_responses={record.k[0]}; it is {data.num_responses}",
        ),
        (
            kind == "none" and "ref_logps" in record.reads and not is_reward,
            f"config.loss.name={loss.name!r} compares with a reference: set config.reference.kind "
            "to live, cached or, with adapters, base",
        ),
        (
            is_reward and "ref_logps" not in record.reads,
            f"config.loss.name={loss.name!r} is of log-probabilities, and a reward model "
            "(config.model.head='reward') has none: choose a loss of log-ratios, such as infonca, "
            "plackett_luce or dpo",
        ),
        (
            is_reward and bool(loss.get("nll_weight", 0) or loss.get("length_normalised", False)),
            "config.loss.nll_weight and length_normalised are of log-probabilities, and a reward "
            "model (config.model.head='reward') has none: set them to 0 and False",
        ),
        (
            is_reward and kind != "none",
            "config.model.head='reward' has no reference: set config.reference.kind='none'",
        ),
        (
            is_reward and "lora" in config,
            "config.model.head='reward' is trained whole: leave config.lora out",
        ),
        (
            is_reward and (data.format == "released" or data.join == "apart"),
            "config.model.head='reward' reads prompt and response as one text: set "
            "config.data.format to chat or plain, and config.data.join='together'",
        ),
        (
            best == "excess" and (record.floor is None or loss.get("nll_weight", 0) > 0),
            f"config.checkpoint.best_metric: the floor of {loss.name!r} is not known, so no run "
            "has an excess",
        ),
        (
            best in ("accuracy", "accuracy_half_ties", "top1", "margin")
            and data.num_responses == 1,
            f"config.checkpoint.best_metric={best!r} compares responses, and there is one a "
            "prompt: set it to loss",
        ),
        (
            best == "chosen_logp_drift" and kind == "none",
            "config.checkpoint.best_metric='chosen_logp_drift' wants a reference",
        ),
        (
            not (model.name or model.init_from),
            "set config.model.name (a size, with random weights) or config.model.init_from",
        ),
        (
            loss.get("margin") == "none" and loss.margin_weight != 0,
            "config.loss.margin_weight is of a margin: set config.loss.margin to difference or log",
        ),
        (
            loss.get("margin", "none") != "none" and loss.margin_weight == 0,
            "config.loss.margin counts by its weight: set config.loss.margin_weight",
        ),
        (
            loss.get("robust", False) and loss.label_smoothing == 0,
            "config.loss.robust is of labels that are wrong at a rate: set "
            "config.loss.label_smoothing",
        ),
        (
            model.remat not in ("auto", "none") and not model.scan_layers,
            f"config.model.remat={model.remat!r} saves memory in scanned layers only: unrolled, "
            "all are computed again at once; set config.model.scan_layers=True",
        ),
        (
            optim.grad_dtype != "float32" and "lora" in config,
            "config.optim.grad_dtype is of a layer's matrices, and with config.lora adapters alone "
            "are trained: set it to float32",
        ),
        (
            optim.grad_dtype == "bfloat16" and model.dtype == "float32",
            "config.optim.grad_dtype='bfloat16' wants config.model.dtype='bfloat16' (now float32)",
        ),
        (
            (kind == "cached") != bool(config.reference.cache),
            "config.reference.cache is the folder of kind='cached', and is read by no other kind",
        ),
        (
            kind == "base" and "lora" not in config,
            "config.reference.kind='base' is the base of adapters: set config.lora.rank, or "
            "config.reference.kind='live'",
        ),
        (
            "lora" in config and kind in ("live", "base") and bool(config.reference.init_from),
            "config.reference.init_from is a model of its own, beside adapters and their base: set "
            "config.reference.kind='cached', or leave it out",
        ),
        (
            data.train_on != "last_assistant" and (data.format, data.num_responses) != ("chat", 1),
            "config.data.train_on='all_assistant' is of conversations with one response: set "
            "config.data.format='chat' and config.data.num_responses=1",
        ),
        (
            loss.get("reduce", "prompts") == "tokens" and not loss.per_token,
            "config.loss.reduce='tokens' is a mean over tokens: set config.loss.per_token=True",
        ),
        (
            data.format == "released" and (data.too_long, data.prompt_keep) != ("truncate", "end"),
            "config.data.format='released' cuts as the PyTorch release does: set "
            "config.data.too_long='truncate' and config.data.prompt_keep='end'",
        ),
        (
            bool(data.block and data.row_len % data.block),
            f"config.data.block={data.block} must divide config.data.row_len={data.row_len}",
        ),
        (
            bool(loss.logits_chunk and data.row_len % loss.logits_chunk),
            f"config.loss.logits_chunk={loss.logits_chunk} must divide "
            f"config.data.row_len={data.row_len}",
        ),
        (
            data.score_unit != "raw" and data.first_bonus > 0,
            "config.data.first_bonus is in the data's own unit, as released: set "
            "config.data.score_unit='raw'",
        ),
        (
            0 < data.row_pairs < num_blocks,
            f"config.data.row_pairs={data.row_pairs} is less than the {num_blocks} blocks of a row",
        ),
        (
            bool(data.eval_files) and data.eval_fraction > 0,
            "config.data.eval_files says what is held out: set config.data.eval_fraction=0 with it "
            f"(now {data.eval_fraction:g})",
        ),
        (
            (optim.schedule == "wsd") != (optim.decay_frac > 0),
            "config.optim.decay_frac is the part of the steps in which schedule='wsd' falls, such "
            "as 0.2, and is read by no other",
        ),
        (
            list(config.mesh.values()).count(-1) > 1,
            "only one axis of config.mesh may be -1",
        ),
        (
            bool(data.chat_template) and data.format != "chat",
            "config.data.chat_template is read where config.data.format='chat' alone",
        ),
        (
            not data.files and "rounds" not in config,
            "config.data.files names no records; give a glob of .jsonl files or tfds:NAME:SPLIT",
        ),
        (
            config.eval_every > 0 and not (data.files and (data.eval_files or data.eval_fraction)),
            "config.eval_every is set, but no records are held out: name config.data.files and set "
            "config.data.eval_fraction or config.data.eval_files, or set config.eval_every=0",
        ),
        (
            bool(best) and not config.eval_every,
            "config.checkpoint.best_metric goes by evaluations; set config.eval_every",
        ),
        (
            bool(config.eval_patience) and not best,
            "config.eval_patience waits for a better config.checkpoint.best_metric; set that, such "
            "as to loss",
        ),
    ):
        if is_bad:
            raise UserError(message + ".")
