"""One table: every parameter, and the tensors it is made of in a Hugging Face or GGUF checkpoint.

Axes: V vocabulary, D width, N query heads, G kv heads, H head width, F MLP width, L layers,
      E experts. Parameters pad V to `config.padded_vocab` with zeros; tensors do not.

Reading and writing take the same rows, so a name or a transpose is stated once.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from nca_jax.checks import UserError
from nca_jax.model_config import ModelConfig

# fetch(tensor name, one slice an axis) -> that part of the tensor, any float dtype
Fetch = Callable[[str, tuple[slice, ...]], np.ndarray]
SHOWN = 5  # names of each kind that an error lists


class Param(NamedTuple):
    """A parameter that is still on disk; `jax.make_array_from_callback(shape, sharding, read)`.

    Attributes:
      shape: of the whole stacked parameter.
      read: one slice an axis -> that part, float32; touches only the tensors it needs.
    """

    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]


class Row(NamedTuple):
    """How one parameter is stored.

    A tensor's axes are words: "NH D" is a matrix of N * H rows and D columns. Leading axes of the
    parameter that a tensor lacks are stacked: one tensor for each {L} and {E} in its name.
    """

    path: str
    axes: str  # of the parameter
    tensor_axes: str  # of each tensor, in both formats
    hf: str
    gguf: str

    @property
    def stacked(self) -> str:
        return "".join(a for a in self.axes if a not in self.tensor_axes)

    @property
    def inner(self) -> str:
        return self.axes[len(self.stacked) :]

    def template(self, file_format: str) -> str:
        """The tensor name with its {L} and {E}; `file_format` is "hf" or "gguf"."""
        return {"hf": self.hf, "gguf": self.gguf}[file_format]

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(config) | {"V": config.padded_vocab}
        return tuple(sizes[a] for a in self.axes)

    def tensor_shape(self, config: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(config)
        return tuple(math.prod(sizes[a] for a in word) for word in self.tensor_axes.split())


class Place(NamedTuple):
    """Which part of a parameter one tensor is."""

    row: Row
    index: tuple[int, ...]  # along the stacked axes: (), (layer,) or (layer, expert)


_HF, _GGUF = "model.layers.{L}.", "blk.{L}."
_HF_EXPERT = _HF + "block_sparse_moe.experts.{E}."
# GGUF merges the experts of a layer; `models.gguf` refuses Mixtral, so these rows name no tensor.
_NO_GGUF = ""

# fmt: off
TABLE = (
    Row("embed/table", "VD", "V D", "model.embed_tokens.weight", "token_embd.weight"),
    Row("head/kernel", "DV", "V D", "lm_head.weight", "output.weight"),
    Row("norm/scale", "D", "D", "model.norm.weight", "output_norm.weight"),
    Row("layers/attn_norm/scale", "LD", "D",
        _HF + "input_layernorm.weight", _GGUF + "attn_norm.weight"),
    Row("layers/mlp_norm/scale", "LD", "D",
        _HF + "post_attention_layernorm.weight", _GGUF + "ffn_norm.weight"),
    Row("layers/attn/q/kernel", "LDNH", "NH D",
        _HF + "self_attn.q_proj.weight", _GGUF + "attn_q.weight"),
    Row("layers/attn/k/kernel", "LDGH", "GH D",
        _HF + "self_attn.k_proj.weight", _GGUF + "attn_k.weight"),
    Row("layers/attn/v/kernel", "LDGH", "GH D",
        _HF + "self_attn.v_proj.weight", _GGUF + "attn_v.weight"),
    Row("layers/attn/o/kernel", "LNHD", "D NH",
        _HF + "self_attn.o_proj.weight", _GGUF + "attn_output.weight"),
    Row("layers/attn/q/bias", "LNH", "NH",
        _HF + "self_attn.q_proj.bias", _GGUF + "attn_q.bias"),
    Row("layers/attn/k/bias", "LGH", "GH",
        _HF + "self_attn.k_proj.bias", _GGUF + "attn_k.bias"),
    Row("layers/attn/v/bias", "LGH", "GH",
        _HF + "self_attn.v_proj.bias", _GGUF + "attn_v.bias"),
    Row("layers/attn/q_norm/scale", "LH", "H",
        _HF + "self_attn.q_norm.weight", _GGUF + "attn_q_norm.weight"),
    Row("layers/attn/k_norm/scale", "LH", "H",
        _HF + "self_attn.k_norm.weight", _GGUF + "attn_k_norm.weight"),
    Row("layers/mlp/gate/kernel", "LDF", "F D",
        _HF + "mlp.gate_proj.weight", _GGUF + "ffn_gate.weight"),
    Row("layers/mlp/up/kernel", "LDF", "F D",
        _HF + "mlp.up_proj.weight", _GGUF + "ffn_up.weight"),
    Row("layers/mlp/down/kernel", "LFD", "D F",
        _HF + "mlp.down_proj.weight", _GGUF + "ffn_down.weight"),
    Row("layers/moe/router/kernel", "LDE", "E D", _HF + "block_sparse_moe.gate.weight", _NO_GGUF),
    Row("layers/moe/gate/kernel", "LEDF", "F D", _HF_EXPERT + "w1.weight", _NO_GGUF),
    Row("layers/moe/up/kernel", "LEDF", "F D", _HF_EXPERT + "w3.weight", _NO_GGUF),
    Row("layers/moe/down/kernel", "LEFD", "D F", _HF_EXPERT + "w2.weight", _NO_GGUF),
)
# fmt: on


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Returns the size of each axis letter in a checkpoint, where V is not padded."""
    c = config
    return {
        "V": c.vocab_size, "D": c.width, "N": c.num_heads, "G": c.num_kv_heads, "H": c.head_dim,
        "F": c.mlp_width, "L": c.num_layers, "E": c.num_experts,
    }  # fmt: skip


def rows(config: ModelConfig) -> tuple[Row, ...]:
    """Returns the rows of the table that this model has."""
    absent = {
        "head/": config.tied_head,
        "/bias": not config.qkv_bias,
        "/q_norm/": not config.qk_norm,
        "/k_norm/": not config.qk_norm,
        "/mlp/": config.num_experts > 0,
        "/moe/": config.num_experts == 0,
    }
    parts = [part for part, is_absent in absent.items() if is_absent]
    return tuple(row for row in TABLE if not any(part in row.path for part in parts))


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns {"a/b/c": shape} of the stacked, padded parameters."""
    return {row.path: row.shape(config) for row in rows(config)}


def places(config: ModelConfig, file_format: str) -> dict[str, Place]:
    """Returns {tensor name: Place} of a complete checkpoint; `file_format` is "hf" or "gguf"."""
    sizes = axis_sizes(config)
    return {
        row.template(file_format).format(**dict(zip(row.stacked, index, strict=True))): (
            Place(row, index)
        )
        for row in rows(config)
        for index in itertools.product(*(range(sizes[a]) for a in row.stacked))
    }


def tensor_shapes(config: ModelConfig, file_format: str) -> dict[str, tuple[int, ...]]:
    """Returns {tensor name: shape} of a complete checkpoint; `file_format` is "hf" or "gguf"."""
    found = places(config, file_format)
    return {name: place.row.tensor_shape(config) for name, place in found.items()}


def check_tensors(
    where: str, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    """Raises one UserError that lists missing, misshapen and unexpected tensors of `where`."""
    problems = {
        "missing": [name for name in wanted if name not in found],
        "of another shape": [
            f"{name} (wanted {shape}, found {found[name]})"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ],
        "unexpected": [name for name in found if name not in wanted],
    }
    said = [
        f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for kind, names in problems.items()
        if names
    ]
    if said:
        raise UserError(f"The tensors in {where} do not fit its config. {'; '.join(said)}.")


def open_params(config: ModelConfig, file_format: str, fetch: Fetch) -> dict[str, Param]:
    """Returns {path: Param}; nothing is fetched before a `read`."""
    return {
        row.path: Param(
            row.shape(config), functools.partial(_read, row, config, file_format, fetch)
        )
        for row in rows(config)
    }


def to_tensor(row: Row, config: ModelConfig, value: np.ndarray) -> np.ndarray:
    """Turns one layer (and expert) of a parameter into its tensor: the inverse of reading.

    Args:
      row: of the parameter.
      config: sizes.
      value: the parameter at one place of its stacked axes, [*row.inner], V padded.
    Returns:
      [*row.tensor_axes], without the padding; same dtype, contiguous.
    """
    sizes, letters = axis_sizes(config), row.tensor_axes.replace(" ", "")
    value = value[tuple(slice(sizes[a]) for a in row.inner)]
    value = value.transpose([row.inner.index(a) for a in letters])
    return np.ascontiguousarray(value.reshape(row.tensor_shape(config)))


def read_tensor(config: ModelConfig, params: Mapping[str, Param], place: Place) -> np.ndarray:
    """Returns one tensor of a checkpoint, float32; reads no more of its parameter than that."""
    row, index = place
    part = (*(slice(i, i + 1) for i in index), *(slice(None) for _ in row.inner))
    return to_tensor(row, config, params[row.path].read(part)[(0,) * len(index)])


def _read(
    row: Row, config: ModelConfig, file_format: str, fetch: Fetch, index: tuple[slice, ...]
) -> np.ndarray:
    """Returns `index` of the stacked parameter in float32, tensor by tensor."""
    shape = row.shape(config)
    spans = {a: range(n)[s] for a, n, s in zip(row.axes, shape, index, strict=True)}
    out = np.zeros([len(span) for span in spans.values()], np.float32)

    # What lies beyond the true V stays zero; a shard may be nothing but padding.
    sizes = axis_sizes(config)
    real = {a: range(sizes[a])[span.start : span.stop] for a, span in spans.items()}
    if not all(real.values()):
        return out

    # A tensor is cut along the first letter of each word; the other letters are cut afterwards.
    words = row.tensor_axes.split()
    parts, split, cut = [], [], []
    for first, *rest in words:
        width = math.prod(sizes[a] for a in rest)
        parts.append(slice(real[first].start * width, real[first].stop * width))
        split += [len(real[first])] + [sizes[a] for a in rest]
        cut += [slice(None)] + [slice(real[a].start, real[a].stop) for a in rest]
    order = ["".join(words).index(a) for a in row.inner]
    fill = tuple(slice(len(real[a])) for a in row.inner)

    for place in itertools.product(*(range(len(spans[a])) for a in row.stacked)):
        at = {a: spans[a][i] for a, i in zip(row.stacked, place, strict=True)}
        tensor = fetch(row.template(file_format).format(**at), tuple(parts))
        out[place + fill] = tensor.reshape(split)[tuple(cut)].transpose(order)
    return out
