"""From a config to the parts of a run: every command goes through here, so all mean the same.

config -> mesh, model, tokenizer -> parameters, optimizer, shardings -> input.
"""

import dataclasses
import datetime
import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nca_jax import auto
from nca_jax.checks import UserError
from nca_jax.config import flatten
from nca_jax.data.encode import Encoder
from nca_jax.data.facts import facts_of
from nca_jax.data.pack import segment_spans
from nca_jax.data.pipeline import Data, load_data
from nca_jax.data.room import row_sizes
from nca_jax.data.store import Keep
from nca_jax.data.template import Turn, usual_turn
from nca_jax.data.unit import spread
from nca_jax.files import cache_folder, local_path
from nca_jax.infra import compiler, distributed, lock
from nca_jax.infra.fingerprint import code_fingerprint, text_fingerprint, tokenizer_fingerprint
from nca_jax.infra.mesh import check_divides, make_mesh, row_shards
from nca_jax.infra.optim import split_trained
from nca_jax.infra.progress import pace_of_entries, phase
from nca_jax.losses import LOSSES
from nca_jax.model_config import MODELS, TARGETS, ModelConfig
from nca_jax.models import nf4
from nca_jax.models.attention import choice
from nca_jax.models.decoder import Model
from nca_jax.models.formats.pretrained import load_tokenizer, open_pretrained
from nca_jax.models.formats.templates import check_template
from nca_jax.models.lora import Lora
from nca_jax.protocols import Device, ModelSection, Tokenizer
from nca_jax.rewards.scorers import REWARD_MODEL


class Run(NamedTuple):
    """What a config stands for, before anything large is in memory.

    What the config leaves open is chosen here, but for what only data can say: see `read_all`.
    """

    config: ConfigDict
    mesh: Mesh
    model: Model
    tokenizer: Tokenizer | None  # None: records are token ids
    turn: Turn | None = None  # what the chat template writes around a response, where there is one
    date: str = ""  # YYYY-MM-DD, the day that a chat template may write

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a turn: the model's, the tokenizer's and the chat template's."""
        ids = set(self.model.config.eos_ids)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        if self.turn is not None:
            ids.add(self.turn.end_id)
        return tuple(sorted(ids))

    @property
    def compiler_options(self) -> compiler.Options:
        """What every large program is compiled with."""
        return compiler.compiler_options(self.mesh, self.model.dtype, self.config.compiler_options)

    @property
    def encoder(self) -> Encoder:
        """How records become ids."""
        return Encoder(
            self.tokenizer,
            self.config.data,
            self.model.config.vocab_size,
            self.eos_ids,
            least_responses=LOSSES[self.config.loss.name].k[0],
            digest=tokenizer_fingerprint(self.tokenizer),
            date=self.date,
            is_reward=self.model.config.num_labels > 0,
            pad_id=self.model.config.pad_id,
        )


def build(config: ConfigDict, *, date: str = "") -> Run:
    """Opens the mesh, the model's sizes and the tokenizer; reads no weights yet.

    Args:
      date: YYYY-MM-DD, the day that a chat template may write; empty: today.
    Raises:
      UserError: a part of the config does not exist or does not fit the others, or the processes of
        the run have not all the same config, code and JAX.
    """
    _check_same_start(config)
    model_config = open_model_config(config.model)
    tokenizer = open_tokenizer(config, model_config)
    run = _assemble(config, None, model_config, tokenizer)
    _say_positions(run.config, model_config)
    day = date or datetime.date.today().isoformat()
    return run._replace(turn=usual_turn(tokenizer, model_config.eos_ids), date=day)


def _check_same_start(config: ConfigDict) -> None:
    if jax.distributed.is_initialized():
        distributed.check_same(
            config=text_fingerprint(json.dumps(flatten(config))),
            code=code_fingerprint(),
            JAX=text_fingerprint(" ".join(map(version, ("jax", "jaxlib")))),
        )


def build_for(config: ConfigDict, devices: Sequence[Device]) -> Run:
    """The same for devices that need not exist: to compile, not to run, so without a tokenizer.

    A model that has a name is not looked for in `init_from`. There is no data either: a row length
    that is left open is that of a prompt and K responses of full length.
    """
    model, data = config.model, config.data
    named = MODELS[model.name] if model.name else _sizes_of(model)
    model_config = _with_head(named, model)
    run = _assemble(config, devices, model_config, None)
    longest = [data.max_prompt_len] + [data.max_response_len] * data.num_responses
    sizes = [segment_spans(longest, 0, run.config.data.align)[-1][1]]
    return _assemble(run.config, devices, model_config, None, sizes=sizes)


def _assemble(
    config: ConfigDict,
    devices: Sequence[Device] | None,
    model_config: ModelConfig,
    tokenizer: Tokenizer | None,
    **known: Any,
) -> Run:
    """Returns a run of `config`, with what it leaves open chosen; `known` is for `auto.choose`."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    mesh = make_mesh(config.mesh, devices)
    platform, shards = platform_of(mesh), row_shards(mesh)
    config = auto.choose(config, model_config, platform=platform, shards=shards, **known)
    if config.model.dtype == "float32":  # throughout: TPU matmuls would otherwise be bfloat16
        jax.config.update("jax_default_matmul_precision", "highest")
    check_divides(mesh.shape, model_config, config.data.rows)
    compiler.check_options(mesh, config.compiler_options)
    kernel = choice.attention_kernel(config, platform)
    model = Model(
        model_config,
        lora=adapters_of(config, model_config),
        dtype=jnp.dtype(config.model.dtype),
        grad_dtype=jnp.dtype(config.optim.grad_dtype),
        remat=config.model.remat,
        scan_layers=config.model.scan_layers,
        attention_kernel=kernel,
        expert_kernel="grouped" if platform == "tpu" else "dense",
        align=config.data.align,
        splash_blocks=choice.splash_blocks(config, kernel),
        interpret=platform != "tpu",
    )
    if "lora" in config and config.lora.base_dtype == "nf4":
        nf4.check_blocks(model.base.abstract_nf4(), mesh.shape)
    if config.optim.freeze:
        split_trained(model.abstract_trained(), config.optim.freeze)
    return Run(config, mesh, model, tokenizer)


def adapters_of(config: ConfigDict, model_config: ModelConfig) -> Lora | None:
    """Returns the adapters of a config. Raises UserError where the model cannot have them."""
    if "lora" not in config:
        return None
    how, experts = config.lora, model_config.num_experts
    targets = tuple(name for name in TARGETS if name in how.targets.split(","))
    if "router" in targets and not experts:
        raise UserError("config.lora.targets names router, and the model has no experts.")
    if how.dora and experts and not {"gate", "up", "down"}.isdisjoint(targets):
        raise UserError(
            "config.lora.dora is not of experts: leave gate, up and down out of "
            "config.lora.targets, or set config.lora.dora=False."
        )
    return Lora(how.rank, how.alpha, targets, rslora=how.rslora, dora=how.dora)


def open_model_config(model: ModelSection) -> ModelConfig:
    """The sizes of `model.init_from`, with the head of `model.head`."""
    return _with_head(_sizes_of(model), model)


def _with_head(found: ModelConfig, model: ModelSection) -> ModelConfig:
    """Raises UserError if a reward model was found where a policy is wanted."""
    if model.head == "reward":
        return dataclasses.replace(found, num_labels=found.num_labels or 1)
    if found.num_labels:
        raise UserError(
            f"config.model.init_from={model.init_from!r} is a reward model, which writes nothing: "
            f"name it as a scorer ({REWARD_MODEL}{model.init_from}), or set "
            "config.model.head='reward' to train it on."
        )
    return found


def _sizes_of(model: ModelSection) -> ModelConfig:
    """The sizes of `model.init_from`; with `model.name` too, both must say the same."""
    if not model.init_from:
        return MODELS[model.name]
    found, _ = open_pretrained(model.init_from)
    if model.name:
        sizes = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim")
        named = MODELS[model.name]
        differs = [
            f"{name} {getattr(found, name)} there, {getattr(named, name)} in {model.name}"
            for name in (*sizes, "mlp_width", "tied_head", "num_experts", "windows")
            if getattr(found, name) != getattr(named, name)
        ]
        if differs:
            raise UserError(
                f"config.model.init_from={model.init_from!r} is not a {model.name}: "
                f"{'; '.join(differs)}. Set config.model.name='' to take what is there."
            )
    return found


def platform_of(mesh: Mesh) -> str:
    """What kernels are chosen by: the mesh's devices, which may be those of a compile only."""
    return mesh.devices.flat[0].platform


def tokenizer_from(config: ConfigDict) -> str:
    """Where the tokenizer comes from; "" for none: rows of token ids need none."""
    where = config.data.tokenizer or config.model.init_from
    return "" if where == "none" else where


def open_tokenizer(config: ConfigDict, model_config: ModelConfig) -> Tokenizer | None:
    """Returns the tokenizer of a config; None where it has none, as records of text will say.

    Raises:
      UserError: what `load_tokenizer` and `check_template` raise.
    """
    where = tokenizer_from(config)
    if not where:
        return None
    tokenizer = load_tokenizer(where, config.data.chat_template)
    if config.data.format == "chat":
        check_template(tokenizer)
    if len(tokenizer) > model_config.vocab_size:  # often an added token that is never used
        print(
            f"The tokenizer {where!r} has {len(tokenizer)} ids, the model's vocabulary "
            f"{model_config.vocab_size}: a record with one of the others is refused."
        )
    return tokenizer


def _say_positions(config: ConfigDict, model_config: ModelConfig) -> None:
    """Prints where prompts and responses may be longer than what the model has been made for."""
    data = config.data
    lengths = {"data.max_response_len": data.max_response_len}
    if "generate" in config:
        lengths["generate.max_new_tokens"] = config.generate.max_new_tokens
    for name, length in lengths.items():
        if data.max_prompt_len + length > model_config.max_position:
            print(
                f"config.data.max_prompt_len={data.max_prompt_len} and config.{name}={length} go "
                f"beyond the {model_config.max_position} positions that the model was made for."
            )


def read_all(
    config: ConfigDict, *, date: str = "", score_unit: float | None = None
) -> tuple[Run, Data]:
    """Returns `build` and `read_data`, the run with all chosen that its config leaves open.

    What was chosen is printed. The arguments are those of `build` and `read_data`.

    Raises:
      UserError: as `build` and `read_data`.
    """
    run = build(config, date=date)
    data = read_data(run, score_unit=score_unit)
    training = data.training
    return settle(run, data, row_sizes(training, run.config.data), len(training), config), data


def settle(run: Run, data: Data, sizes: Sequence[int], num_training: int, asked: ConfigDict) -> Run:
    """Returns the run with all chosen that its config leaves open, and prints what that is.

    Args:
      sizes: tokens of a row that each example of training needs, see `room.row_sizes`.
      num_training: how many examples that is.
      asked: the config before anything was chosen.
    """
    heldout = data.heldout
    known = _assemble(
        run.config,
        None,
        run.model.config,
        run.tokenizer,
        sizes=[*sizes, *row_sizes(heldout, run.config.data)],
        num_training=num_training,
        num_heldout=len(heldout),
    )
    for line in auto.chosen(asked, known.config):
        print(line)
    return known._replace(turn=run.turn, date=run.date)


def with_generate(run: Run, **changes: Any) -> Run:
    """Returns the run with other fields of `config.generate`."""
    config = ConfigDict(run.config.to_dict())
    config.generate.update(changes)
    return run._replace(config=config.lock())


def with_rows_for(run: Run, sizes: Sequence[int]) -> Run:
    """Returns the run with rows for groups of these sizes, whatever its config says of rows.

    Args:
      sizes: tokens of a row that each group needs.
    Raises:
      UserError: attention cannot compute such rows.
    """
    config = ConfigDict(run.config.to_dict())
    config.data.row_len = config.data.row_pairs = config.loss.logits_chunk = 0
    config.data.max_prompt_len = max(sizes)
    again = _assemble(config, None, run.model.config, run.tokenizer, sizes=sizes)
    return again._replace(turn=run.turn, date=run.date)


def read_data(run: Run, *, score_unit: float | None = None) -> Data:
    """Reads, checks and encodes all records of the config, or maps the stores that have them.

    A config of rounds may name none.

    Args:
      score_unit: what scores are divided by, as a run has recorded it; None: what
        `data.score_unit` says of the training records.
    Raises:
      UserError: a file or record is unusable, evaluation is asked for and none is held out, or all
        scores are tied where they are to be divided by their spread.
    """
    config = run.config
    if not config.data.files:
        return Data([], {}, Counter())
    gather = distributed.gather if jax.process_count() > 1 else None
    with phase("reading and encoding the records"):
        data = load_data(run.encoder, keep=keep_of(config), gather=gather)
    if config.eval_every > 0 and not len(data.heldout):
        raise UserError(
            f"config.data.eval_fraction={config.data.eval_fraction} holds out none of "
            f"{sum(map(len, data.sources))} records; raise it, or set config.eval_every=0."
        )
    training = data.training
    data.counts.update(facts_of(training, config.data.num_responses))
    if score_unit is None:
        score_unit = spread(training) if config.data.score_unit == "spread" else 1.0
    return data.in_unit(score_unit)


def keep_of(config: ConfigDict) -> Keep | None:
    """Returns where large files are stored once they are encoded; None: nowhere."""
    where = config.data.store
    if where == "none":
        return None
    folder = local_path(where or cache_folder() / "tokens")
    return Keep(folder, lock.waited_for, pace_of_entries())


def num_steps(config: ConfigDict, num_examples: int) -> int:
    """Returns the updates of a run: `steps`, or `epochs` passes over the training records.

    Raises:
      UserError: these are less than one step.
    """
    steps = config.steps or int(config.epochs * num_examples / config.data.batch_size)
    if steps < 1:
        size, seen = config.data.batch_size, int(config.epochs * num_examples)
        smaller = f"config.data.batch_size={seen} or less, or " if seen else ""
        raise UserError(
            f"config.epochs={config.epochs:g} of {num_examples} training records is less than one "
            f"step of config.data.batch_size={size} prompts: set {smaller}"
            f"config.epochs={-(-size // num_examples)} or more."
        )
    return steps
