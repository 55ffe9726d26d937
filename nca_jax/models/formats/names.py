"""One table: every parameter, and the tensors it is made of in a Hugging Face or GGUF checkpoint.

Axes: V vocabulary, D width, N query heads, G kv heads, H head width, F MLP width, L layers,
      E experts, S labels of a reward model. Parameters pad V to `config.padded_vocab` with zeros;
      tensors do not.

Reading and writing take the same entries, so a name or a transpose is stated once. A family that
names some tensors otherwise says so in its record; whoever opens or writes a checkpoint brings a
naming, {parameter path: tensor name}: HF with the family's own names over it, or GGUF.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nca_jax.checks import UserError
from nca_jax.model_config import ModelConfig
from nca_jax.models import nf4
from nca_jax.models.formats.four_bit import Fetch, Nf4Tensor, nf4_fetches

Naming = Mapping[str, str]  # {parameter path: tensor name, with {L} and {E} to be filled in}
SHOWN = 5  # names of each kind that an error lists
FLOAT32, UINT8 = np.dtype(np.float32), np.dtype(np.uint8)


class Param(NamedTuple):
    """A parameter that is still on disk; `jax.make_array_from_callback(shape, sharding, read)`.

    Attributes:
      shape: of the whole stacked parameter.
      read: one slice an axis -> that part in float32; a dtype as second argument, which is passed
        where `dtype` is another one, gives it in that. Touches only the tensors it needs.
      dtype: of its tensors in the file: float32, float16 or bfloat16; float32 where they are
        quantised or of several dtypes, as it holds the values of all.
      nf4: the same quantised, of a kernel that a quantised model keeps so.
    """

    shape: tuple[int, ...]
    read: Callable[..., np.ndarray]
    dtype: np.dtype = FLOAT32
    nf4: "Nf4Param | None" = None

    def reader(self, dtype: str) -> Callable[[tuple[slice, ...]], np.ndarray]:
        """Returns `read` in a dtype, "" for its own, without a float32 copy in between."""
        wanted = np.dtype(dtype) if dtype else self.dtype
        return lambda index: self.read(index) if wanted == FLOAT32 else self.read(index, wanted)


class Nf4Param(NamedTuple):
    """A kernel in 4 bits: see `models.nf4`.

    Attributes:
      codes: uint8 [*lead, I / g, g / 2, O], as stored; else quantised, tensor by tensor.
      absmax: float32 [*lead, I / g, 1, O].
      num_stored, num_tensors: how many of its tensors are so in the file, of how many.
    """

    codes: Param
    absmax: Param
    num_stored: int
    num_tensors: int


class Entry(NamedTuple):
    """How one parameter is stored.

    A tensor's axes are words: "NH D" is a matrix of N * H rows and D columns. Leading axes of the
    parameter that a tensor lacks are stacked: one tensor for each {L} and {E} in its name.
    """

    path: str
    axes: str  # of the parameter
    tensor_axes: str  # of each tensor, in both formats
    hf: str  # the tensor's name, in most families
    gguf: str  # the tensor's name

    @property
    def stacked(self) -> str:
        return "".join(a for a in self.axes if a not in self.tensor_axes)

    @property
    def inner(self) -> str:
        return self.axes[len(self.stacked) :]

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(config) | {"V": config.padded_vocab}
        return tuple(sizes[a] for a in self.axes)

    def tensor_shape(self, config: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(config)
        return tuple(math.prod(sizes[a] for a in word) for word in self.tensor_axes.split())


class Place(NamedTuple):
    """A part of a parameter that is a tensor, or some rows of one."""

    entry: Entry
    index: tuple[int, ...]  # along the stacked axes: (), (layer,) or (layer, expert)


_HF, _GGUF = "model.layers.{L}.", "blk.{L}."
_HF_EXPERT = _HF + "mlp.experts.{E}."

# fmt: off
TABLE = (
    Entry("embed/table", "VD", "V D", "model.embed_tokens.weight", "token_embd.weight"),
    Entry("head/kernel", "DV", "V D", "lm_head.weight", "output.weight"),
    Entry("score/kernel", "DS", "S D", "score.weight", ""),
    Entry("norm/scale", "D", "D", "model.norm.weight", "output_norm.weight"),
    Entry("layers/attn_norm/scale", "LD", "D",
        _HF + "input_layernorm.weight", _GGUF + "attn_norm.weight"),
    Entry("layers/mlp_norm/scale", "LD", "D",
        _HF + "post_attention_layernorm.weight", _GGUF + "ffn_norm.weight"),
    # Norms of what comes out. Where there are norms of both, that before the MLP has another name.
    Entry("layers/attn_post_norm/scale", "LD", "D",
        _HF + "post_attention_layernorm.weight", _GGUF + "post_attention_norm.weight"),
    Entry("layers/mlp_post_norm/scale", "LD", "D",
        _HF + "post_feedforward_layernorm.weight", _GGUF + "post_ffw_norm.weight"),
    Entry("layers/attn/q/kernel", "LDNH", "NH D",
        _HF + "self_attn.q_proj.weight", _GGUF + "attn_q.weight"),
    Entry("layers/attn/k/kernel", "LDGH", "GH D",
        _HF + "self_attn.k_proj.weight", _GGUF + "attn_k.weight"),
    Entry("layers/attn/v/kernel", "LDGH", "GH D",
        _HF + "self_attn.v_proj.weight", _GGUF + "attn_v.weight"),
    Entry("layers/attn/o/kernel", "LNHD", "D NH",
        _HF + "self_attn.o_proj.weight", _GGUF + "attn_output.weight"),
    Entry("layers/attn/q/bias", "LNH", "NH",
        _HF + "self_attn.q_proj.bias", _GGUF + "attn_q.bias"),
    Entry("layers/attn/k/bias", "LGH", "GH",
        _HF + "self_attn.k_proj.bias", _GGUF + "attn_k.bias"),
    Entry("layers/attn/v/bias", "LGH", "GH",
        _HF + "self_attn.v_proj.bias", _GGUF + "attn_v.bias"),
    Entry("layers/attn/q_norm/scale", "LH", "H",
        _HF + "self_attn.q_norm.weight", _GGUF + "attn_q_norm.weight"),
    Entry("layers/attn/k_norm/scale", "LH", "H",
        _HF + "self_attn.k_norm.weight", _GGUF + "attn_k_norm.weight"),
    Entry("layers/mlp/gate/kernel", "LDF", "F D",
        _HF + "mlp.gate_proj.weight", _GGUF + "ffn_gate.weight"),
    Entry("layers/mlp/up/kernel", "LDF", "F D",
        _HF + "mlp.up_proj.weight", _GGUF + "ffn_up.weight"),
    Entry("layers/mlp/down/kernel", "LFD", "D F",
        _HF + "mlp.down_proj.weight", _GGUF + "ffn_down.weight"),
    Entry("layers/moe/router/kernel", "LDE", "E D",
        _HF + "mlp.gate.weight", _GGUF + "ffn_gate_inp.weight"),
    Entry("layers/moe/gate/kernel", "LEDF", "F D",
        _HF_EXPERT + "gate_proj.weight", _GGUF + "ffn_gate_exps.weight"),
    Entry("layers/moe/up/kernel", "LEDF", "F D",
        _HF_EXPERT + "up_proj.weight", _GGUF + "ffn_up_exps.weight"),
    Entry("layers/moe/down/kernel", "LEFD", "D F",
        _HF_EXPERT + "down_proj.weight", _GGUF + "ffn_down_exps.weight"),
)
# fmt: on
_OVER_WIDTH = {
    entry.path: entry._replace(axes=axes, tensor_axes=axes[1:])
    for entry in TABLE
    for part, axes in {"/q_norm/": "LNH", "/k_norm/": "LGH"}.items()
    if part in entry.path
}
HF = {entry.path: entry.hf for entry in TABLE}
GGUF = {entry.path: entry.gguf for entry in TABLE}


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Returns the size of each axis letter in a checkpoint, where V is not padded."""
    c = config
    return {
        "V": c.vocab_size, "D": c.width, "N": c.num_heads, "G": c.num_kv_heads, "H": c.head_dim,
        "F": c.mlp_width, "L": c.num_layers, "E": c.num_experts, "S": c.num_labels,
    }  # fmt: skip


def entries(config: ModelConfig) -> tuple[Entry, ...]:
    """Returns the entries of the table that this model has."""
    absent = {
        "head/": config.tied_head or config.num_labels > 0,
        "score/": config.num_labels == 0,
        "/attn_norm/": config.norms == "after",
        "/mlp_norm/": config.norms == "after",
        "_post_norm/": config.norms == "before",
        "/bias": not config.qkv_bias,
        "/q_norm/": not config.qk_norm,
        "/k_norm/": not config.qk_norm,
        "/mlp/": config.num_experts > 0,
        "/moe/": config.num_experts == 0,
    }
    parts = [part for part, is_absent in absent.items() if is_absent]
    found = tuple(entry for entry in TABLE if not any(part in entry.path for part in parts))
    if config.qk_norm == "width":
        found = tuple(_OVER_WIDTH.get(entry.path, entry) for entry in found)
    return found


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns {"a/b/c": shape} of the stacked, padded parameters."""
    return {entry.path: entry.shape(config) for entry in entries(config)}


def places(config: ModelConfig, naming: Naming) -> dict[str, tuple[Place, ...]]:
    """Returns {tensor name: the places it holds, one below the other} of a complete checkpoint.

    Parameters with one name are in the table's order; where a name lacks {E}, so are all experts.
    """
    sizes, found = axis_sizes(config), {}
    for entry in entries(config):
        for index in itertools.product(*(range(sizes[a]) for a in entry.stacked)):
            found.setdefault(_name(entry, naming, index), []).append(Place(entry, index))
    return {name: tuple(held) for name, held in found.items()}


def _name(entry: Entry, naming: Naming, index: tuple[int, ...]) -> str:
    return naming[entry.path].format(**dict(zip(entry.stacked, index, strict=True)))


def tensor_shape(config: ModelConfig, held: Sequence[Place]) -> tuple[int, ...]:
    """Returns the shape of the tensor that holds these places."""
    shapes = [place.entry.tensor_shape(config) for place in held]
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def tensor_shapes(config: ModelConfig, naming: Naming) -> dict[str, tuple[int, ...]]:
    """Returns {tensor name: shape} of a complete checkpoint."""
    return {name: tensor_shape(config, held) for name, held in places(config, naming).items()}


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


def open_params(
    config: ModelConfig,
    naming: Naming,
    fetch: Fetch,
    dtypes: Mapping[str, np.dtype],
    stored: Mapping[str, Nf4Tensor] = {},
) -> dict[str, Param]:
    """Returns {path: Param}; nothing is fetched before a `read`.

    Args:
      config: sizes.
      naming: of the checkpoint.
      fetch: reads a part of a tensor.
      dtypes: {tensor name: float32, float16 or bfloat16} of all its tensors.
      stored: {tensor name: it} of those that are nf4 there.
    """
    found, above, tensors = {}, {}, {}
    for name, held in places(config, naming).items():
        rows = 0
        for entry, index in held:
            tensors.setdefault(entry.path, []).append(name)
            above.setdefault(entry.path, {})[index] = rows
            rows += entry.tensor_shape(config)[0]
    for entry in entries(config):
        sizes, shape = axis_sizes(config), entry.shape(config)
        read = functools.partial(_read, entry, shape, sizes, naming, fetch, above[entry.path])
        kinds = {dtypes[name] for name in tensors[entry.path]}
        # Of several, float32: neither half precision holds the values of the other.
        dtype = kinds.pop() if len(kinds) == 1 else FLOAT32
        found[entry.path] = Param(shape, read, dtype)
        if nf4.is_quantised(entry.path):
            codes, absmax = _open_nf4(entry, config, naming, fetch, stored, above[entry.path])
            of_it = tensors[entry.path]
            num_stored = sum(tensor in stored for tensor in of_it)
            quantised = Nf4Param(codes, absmax, num_stored, len(of_it))
            found[entry.path] = found[entry.path]._replace(nf4=quantised)
    return found


def _open_nf4(
    entry: Entry,
    config: ModelConfig,
    naming: Naming,
    fetch: Fetch,
    stored: Mapping[str, Nf4Tensor],
    above: Mapping[tuple[int, ...], int],
) -> tuple[Param, Param]:
    """Returns the codes and absmax of a kernel."""
    outputs, inputs = entry.tensor_shape(config)
    group = nf4.group_size(inputs)
    fetches = nf4_fetches(fetch, stored, inputs)

    def opened(fetch: Fetch, size: int, dtype: np.dtype) -> Param:
        sizes = axis_sizes(config) | {"C": inputs // group, "P": size, "O": outputs}
        flat = entry._replace(axes=entry.stacked + "CPO", tensor_axes="O CP")
        shape = tuple(sizes[a] for a in flat.axes)
        read = functools.partial(_read, flat, shape, sizes, naming, fetch, above, dtype=dtype)
        return Param(shape, read, dtype)

    return opened(fetches[0], group // 2, UINT8), opened(fetches[1], 1, FLOAT32)


def of_arrays(config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, Param]:
    """Returns {path: Param} of float32 parameters that are in memory."""
    return with_nf4(config, {path: Param(x.shape, x.__getitem__) for path, x in arrays.items()})


def with_nf4(config: ModelConfig, params: Mapping[str, Param]) -> dict[str, Param]:
    """Returns the same parameters, those that a quantised model keeps so in nf4 too."""
    held = places(config, HF)

    def fetch(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return read_tensor(config, params, held[name])[index]

    again = open_params(config, HF, fetch, dict.fromkeys(held, FLOAT32))
    return {path: x._replace(nf4=x.nf4 or again[path].nf4) for path, x in params.items()}


def to_tensor(entry: Entry, config: ModelConfig, value: np.ndarray) -> np.ndarray:
    """Turns one layer (and expert) of a parameter into its tensor: the inverse of reading.

    Args:
      entry: of the parameter.
      config: sizes.
      value: the parameter at one place of its stacked axes, [*entry.inner], V padded.
    Returns:
      [*entry.tensor_axes], without the padding; same dtype, contiguous.
    """
    sizes, letters = axis_sizes(config), entry.tensor_axes.replace(" ", "")
    value = value[tuple(slice(sizes[a]) for a in entry.inner)]
    value = value.transpose([entry.inner.index(a) for a in letters])
    return np.ascontiguousarray(value.reshape(entry.tensor_shape(config)))


def read_tensor(
    config: ModelConfig, params: Mapping[str, Param], held: Sequence[Place]
) -> np.ndarray:
    """Returns the tensor that holds these places, float32; reads no more of their parameters."""

    def one(entry: Entry, index: tuple[int, ...]) -> np.ndarray:
        part = (*(slice(i, i + 1) for i in index), *(slice(None) for _ in entry.inner))
        return to_tensor(entry, config, params[entry.path].read(part)[(0,) * len(index)])

    parts = [one(*place) for place in held]
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _read(
    entry: Entry,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    naming: Naming,
    fetch: Fetch,
    above: Mapping[tuple[int, ...], int],
    index: tuple[slice, ...],
    dtype: np.dtype = FLOAT32,
) -> np.ndarray:
    """Returns `index` of the stacked parameter, tensor by tensor, each from its row `above` on."""
    spans = {a: range(n)[s] for a, n, s in zip(entry.axes, shape, index, strict=True)}
    out = np.zeros([len(span) for span in spans.values()], dtype)

    # What lies beyond the true V stays zero; a shard may be nothing but padding.
    real = {a: range(sizes[a])[span.start : span.stop] for a, span in spans.items()}
    if not all(real.values()):
        return out

    # A tensor is cut along the first letter of each word; the other letters are cut afterwards.
    words = entry.tensor_axes.split()
    parts, split, cut = [], [], []
    for first, *rest in words:
        width = math.prod(sizes[a] for a in rest)
        parts.append(slice(real[first].start * width, real[first].stop * width))
        split += [len(real[first])] + [sizes[a] for a in rest]
        cut += [slice(None)] + [slice(real[a].start, real[a].stop) for a in rest]
    order = ["".join(words).index(a) for a in entry.inner]
    fill = tuple(slice(len(real[a])) for a in entry.inner)

    for place in itertools.product(*(range(len(spans[a])) for a in entry.stacked)):
        at = tuple(spans[a][i] for a, i in zip(entry.stacked, place, strict=True))
        rows = slice(parts[0].start + above[at], parts[0].stop + above[at])
        tensor = fetch(_name(entry, naming, at), (rows, *parts[1:]))
        out[place + fill] = tensor.reshape(split)[tuple(cut)].transpose(order)
    return out
