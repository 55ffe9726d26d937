"""What a config leaves open (`Field.auto`), chosen by the data, the model and the devices.

`build` chooses what it knows of before the data is read, and the rest after it. What the config
says itself stays; docs/choosing.md has the reasons.
"""

import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from nca_jax.config import fields_of, flatten
from nca_jax.config_check import check_config
from nca_jax.flops import head_params, trunk_params
from nca_jax.model_config import ModelConfig
from nca_jax.protocols import DataSection

TIMES = 10  # evaluations and checkpoints of a run, at most
APART = 10  # steps between checkpoints, at least: one holds all parameters three times
SEVERAL = 1024  # tokens of a row that several short prompts may share
ROUND = 256  # tokens: a multiple of row_len, so that chunks and blocks divide it
BLOCK = {"gpu": 256, "tpu": 512}  # tokens of attention's blocks (experiments/speed: on a GPU)
CHUNK, LOGITS = 512, 2**24  # most tokens of a chunk; most logits of it, 64 MiB of float32
UNROLLED = 4  # most layers that compile as fast unrolled
LARGE = 10**9  # parameters; from there on a layer's products are not kept for the backward pass
LR, LR_LARGE = 1e-5, 5e-7  # of all parameters
ADAPTERS = 10  # times that of adapters


def leave_open(config: ConfigDict) -> None:
    """Leaves open whatever this module can choose."""
    here = flatten(config)
    autos = {name: field.auto for name, field in fields_of(config.loss.name).items()}
    is_open = {name: x for name, x in autos.items() if x is not None and name in here}
    config.update_from_flattened_dict(is_open)


def choose(
    config: ConfigDict,
    model: ModelConfig,
    *,
    platform: str,
    shards: int,
    sizes: Sequence[int] = (),
    num_training: int = 0,
    num_heldout: int = 0,
) -> ConfigDict:
    """Returns the config, locked, with what it leaves open chosen as far as that is known.

    Args:
      platform: of the mesh's devices: "cpu", "gpu" or "tpu".
      shards: devices over which the rows of a micro-batch are split.
      sizes: tokens of a row that each example needs; empty: not known, so `data.row_len` stays
        open, and `loss.logits_chunk` with it.
      num_training, num_heldout: examples; 0 to train on: not known, so `eval_every` and
        `save_every` stay open.
    Raises:
      UserError: what the config says does not go with what was chosen.
    """
    config = ConfigDict(config.to_dict())
    of_model, data, loss = config.model, config.data, config.loss
    is_large = trunk_params(model) + head_params(model) >= LARGE
    if of_model.dtype == "auto":
        of_model.dtype = "float32" if platform == "cpu" else "bfloat16"
    if of_model.remat == "auto":
        of_model.scan_layers |= model.num_layers > UNROLLED
        of_layer = "full" if is_large else "dots"
        of_model.remat = of_layer if of_model.scan_layers else "none"
    times = ADAPTERS if "lora" in config else 1
    config.optim.lr = config.optim.lr or times * (LR_LARGE if is_large else LR)
    data.align = data.align or (_align(data.row_len) if platform == "tpu" else 1)
    data.block = data.block or math.gcd(BLOCK.get(platform, 64), data.row_len)
    data.rows = data.rows or shards
    if "generate" in config:
        config.generate.max_new_tokens = config.generate.max_new_tokens or data.max_response_len
    if sizes and not data.row_len:
        multiple = math.lcm(data.block, loss.logits_chunk or ROUND)
        data.row_len = row_len_for(sizes, data, multiple=multiple)
    if data.row_len and not loss.logits_chunk:
        most = min(CHUNK, LOGITS // model.padded_vocab, data.row_len)
        loss.logits_chunk = next(n for n in range(most, 0, -1) if data.row_len % n == 0)
    if num_training:
        steps = config.steps or int(config.epochs * num_training / data.batch_size)
        tenth = max(1, -(-steps // TIMES))
        config.save_every = max(tenth, APART) if config.save_every < 0 else config.save_every
        if config.eval_every < 0:
            config.eval_every = tenth if num_heldout else 0
    check_config(config)
    return config.lock()


def _align(row_len: int) -> int:
    """Returns the least alignment that the codes of splash attention take, from 16 on."""
    return 16 if row_len <= 8192 else 64 if row_len <= 16384 else 128


def row_len_for(sizes: Sequence[int], data: DataSection, *, multiple: int) -> int:
    """Returns the shortest T that holds each example and, of short ones, several.

    Shorter rows waste less (experiments/packing), but a row of few tokens keeps no device busy.

    Args:
      sizes: as in `choose`.
      multiple: of which T is one.
    """
    in_a_row = math.ceil(sum(sizes) / len(sizes) * data.batch_size / data.rows)
    wanted = max(max(sizes), min(SEVERAL, in_a_row))
    return -(-wanted // multiple) * multiple


def chosen(asked: ConfigDict, config: ConfigDict) -> list[str]:
    """Returns "auto: data.row_len 1024, ...", a line of what was chosen; none for nothing."""
    before = flatten(asked)
    values = [f"{name} {x}" for name, x in flatten(config).items() if x != before[name]]
    return [f"auto: {', '.join(values)}"] if values else []
