"""nf4, the 4-bit numbers of QLoRA (arXiv:2305.14314), bit for bit as bitsandbytes has them.

A matrix [out, in] is cut, row by row, into blocks of 64 values. A block is its largest magnitude,
`absmax`, in float32, and for each value the nearest of 16 numbers, CODE, to value / absmax. What a
code stands for is CODE * absmax in float32, which is then cast once.

On a device a kernel of I inputs and O outputs is
    codes   uint8   [..., I / g, g / 2, O]   two in a byte: byte j of a group has input j in its
                                             high 4 bits, and input j + g / 2 in its low ones
    absmax  float32 [..., I / g, 1, O]       of each group
where g = `group_size(I)` is 64 in any large model; where a block is of several groups they repeat
its absmax. Outputs lie along a TPU's lanes and half a group is a whole tile, so that a kernel is
made elementwise, and a shard of it from its shards.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from nca_jax.axes import Params, flatten_paths, param_spec
from nca_jax.checks import UserError

KERNEL = re.compile(r"layers/(attn|mlp|moe)/(?!router)\w+/kernel")
BLOCK = 64
SPLIT = 8  # devices that can split the inputs of a kernel
# The quantiles of a normal distribution that the paper derives, as float32.
CODE = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], np.float32,
)  # fmt: skip
MIDPOINTS = (CODE[1:] + CODE[:-1]) / np.float32(2)
SMALLEST = np.float32(1e-38)  # bitsandbytes divides by no less
PIECE = 2**16  # values that are compared at a time: they stay in a processor's cache


def group_size(inputs: int) -> int:
    """Returns g, how many inputs of an output have one absmax.

    A whole block, where 8 devices can split the inputs by blocks; else less, so that they can, and
    where a block goes on in the next row.
    """
    return math.gcd(BLOCK, inputs // SPLIT if inputs % (2 * SPLIT) == 0 else inputs)


def is_quantised(path: str) -> bool:
    """Whether nf4 takes the place of a parameter: of every matrix of a layer but the router."""
    return KERNEL.fullmatch(path) is not None


def has_codes(params: Params) -> bool:
    """Whether these are of a model whose kernels are nf4."""
    return any(path.endswith("/codes") for path in flatten_paths(params))


def check_blocks(abstract: Params, mesh: Mapping[str, int]) -> None:
    """Raises UserError, by name, unless kernels are whole blocks, and groups on every device.

    Args:
      abstract: the shapes of parameters.
      mesh: sizes of its axes.
    """
    for path, codes in flatten_paths(abstract).items():
        if not path.endswith("/codes"):
            continue
        *_, groups, half, outputs = codes.shape
        if not half or groups * 2 * half * outputs % BLOCK:
            raise UserError(
                f"{path}: nf4 wants matrices of whole blocks of {BLOCK} values, and of an even "
                f"width; set config.lora.base_dtype='bfloat16'."
            )
        split = param_spec(path, codes.shape)[-3]
        axes = (split,) if isinstance(split, str) else split or ()
        parts = math.prod(mesh[axis] for axis in axes)
        if groups % parts:
            over = " * ".join(f"mesh.{axis}" for axis in axes)
            raise UserError(
                f"{path}: {groups} groups of {2 * half} inputs over {over} = {parts} would be cut, "
                "and nf4 wants them whole; give more devices to mesh.data."
            )


def block_absmax(x: np.ndarray) -> np.ndarray:
    """[out, in] float32 -> [blocks] float32."""
    return np.abs(x.reshape(-1, BLOCK)).max(axis=1)


def quantise(x: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    """[out, in] float32 and its `block_absmax` -> [out, in] uint8 codes."""
    blocks = x.reshape(-1, BLOCK)
    scale = np.float32(1) / np.maximum(absmax, SMALLEST)
    codes = np.zeros(blocks.shape, np.uint8)
    for start in range(0, len(blocks), PIECE // BLOCK):
        piece = slice(start, start + PIECE // BLOCK)
        scaled = blocks[piece] * scale[piece, None]
        for midpoint in MIDPOINTS:  # one that is met exactly belongs to the lower code
            codes[piece] += (scaled > midpoint).view(np.uint8)
    return codes.reshape(x.shape)


def of_groups(absmax: np.ndarray, shape: tuple[int, ...], group: int) -> np.ndarray:
    """[blocks] of a matrix of this shape -> [out, in / g]: the absmax of each group of g."""
    return absmax[np.arange(0, math.prod(shape), group) // BLOCK].reshape(shape[0], -1)


def pack(codes: np.ndarray, group: int) -> np.ndarray:
    """[out, in] codes -> [out, in / 2] uint8: those g / 2 apart in a group of g share a byte."""
    halves = codes.reshape(len(codes), -1, 2, group // 2)
    return (halves[:, :, 0] << 4 | halves[:, :, 1]).reshape(len(codes), -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4:
    """A kernel in nf4, for whoever takes one as it is kept and casts it where it is used.

    Attributes:
      codes, absmax: as above.
      shape: of the kernel, [*lead, *in, *out].
    """

    codes: jax.Array
    absmax: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        return dequantise(self.codes, self.absmax, dtype).reshape(self.shape)


def shapes(
    lead: tuple[int, ...], inputs: int, outputs: int
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns those of the codes and of the absmax of a kernel."""
    group = group_size(inputs)
    codes = (*lead, inputs // group, group // 2, outputs)
    absmax = (*lead, inputs // group, 1, outputs)
    return jax.ShapeDtypeStruct(codes, jnp.uint8), jax.ShapeDtypeStruct(absmax, jnp.float32)


def dequantise(codes: jax.Array, absmax: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[..., I / g, g / 2, O] and [..., I / g, 1, O] -> [..., I, O] in `dtype`."""
    *lead, groups, half, outputs = codes.shape
    codes = codes.astype(jnp.int32)
    halves = [(_look_up(x) * absmax).astype(dtype) for x in (codes >> 4, codes & 15)]
    return jnp.concatenate(halves, axis=-2).reshape(*lead, groups * 2 * half, outputs)


def _look_up(codes: jax.Array) -> jax.Array:
    """CODE[codes] as a tree of selections: a TPU gathers single numbers slowly."""
    level = [jnp.float32(value) for value in CODE]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        level = [jnp.where(is_set, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
    return level[0]
