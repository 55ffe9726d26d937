"""Matrices [out, in] in nf4: those that bitsandbytes has stored so, and others as they are read.

One that is stored so has its codes in X.weight, two in a byte in row-major order, the first of them
high; X.weight.absmax; X.weight.quant_map, what the codes stand for; and JSON, in the bytes of
X.weight.quant_state.bitsandbytes__nf4. Where absmax is quantised too, it is uint8 and stands for
    nested_quant_map[absmax] * nested_absmax[its block] + nested_offset
"""

import functools
import json
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nca_jax.checks import UserError
from nca_jax.models import nf4
from nca_jax.models.formats.untrusted import SIZE, list_of

# fetch(tensor name, one slice an axis) -> that part of the tensor, any dtype
Fetch = Callable[[str, tuple[slice, ...]], np.ndarray]
ALL = slice(None)
STATE = ".quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATE_BYTES = 1 << 16  # of one tensor; usual are 200


class Tensor(NamedTuple):
    """What a safetensors file says of one of its tensors."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it


class Nf4Tensor(NamedTuple):
    """A matrix that is stored so; nothing is read before it is asked for.

    Attributes:
      shape: (out, in).
      packed: reads a part of the bytes.
      absmax: reads [blocks] float32.
    """

    shape: tuple[int, int]
    packed: Callable[[slice], np.ndarray]
    absmax: Callable[[], np.ndarray]

    def codes(self, rows: slice) -> np.ndarray:
        """Returns [rows, in] uint8, one a byte."""
        width = self.shape[1]
        start, stop, _ = rows.indices(self.shape[0])
        packed = self.packed(slice(start * width // 2, stop * width // 2)).reshape(-1, 1)
        return np.concatenate([packed >> 4, packed & 15], axis=1).reshape(-1, width)

    def values(self, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part in float32."""
        rows, columns = index
        group = nf4.group_size(self.shape[1])
        absmax = nf4.of_groups(self.absmax(), self.shape, group)[rows]
        values = nf4.CODE[self.codes(rows)] * np.repeat(absmax, group, axis=1)
        return values[:, columns]


def nf4_fetches(fetch: Fetch, stored: Mapping[str, Nf4Tensor], inputs: int) -> tuple[Fetch, Fetch]:
    """Returns what reads `nf4.pack`ed codes [out, in / 2], and absmax of groups [out, in / g].

    Columns are read by whole groups.

    Args:
      fetch: of values; they are quantised as they are read.
      stored: those that need not be.
      inputs: columns of each matrix.
    """
    group = nf4.group_size(inputs)

    def values(name: str, rows: slice, groups: slice) -> tuple[np.ndarray, tuple[slice, slice]]:
        """Returns whole blocks, and which rows and groups of them are asked for."""
        if inputs % nf4.BLOCK:
            return fetch(name, (ALL, ALL)).astype(np.float32), (rows, groups)
        in_block = nf4.BLOCK // group
        first, end = groups.start // in_block, -(-groups.stop // in_block)
        x = fetch(name, (rows, slice(first * nf4.BLOCK, end * nf4.BLOCK)))
        at = slice(groups.start - first * in_block, groups.stop - first * in_block)
        return x.astype(np.float32), (ALL, at)

    def codes(name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, packed = index
        groups = slice(packed.start * 2 // group, packed.stop * 2 // group)
        if name in stored:
            found, at = stored[name].codes(rows), (ALL, groups)
        else:
            x, at = values(name, rows, groups)
            found = nf4.quantise(x, nf4.block_absmax(x))
        found = nf4.pack(found, group)
        return found.reshape(len(found), -1, group // 2)[at].reshape(-1, packed.stop - packed.start)

    def absmax(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name in stored:
            return nf4.of_groups(stored[name].absmax(), stored[name].shape, group)[index]
        x, at = values(name, *index)
        return nf4.of_groups(nf4.block_absmax(x), x.shape, group)[at]

    return codes, absmax


def find_stored(
    tensors: Mapping[str, Tensor], fetch: Fetch
) -> tuple[dict[str, Nf4Tensor], set[str]]:
    """Returns the matrices that are nf4 among these, and the names of what belongs to them.

    Raises:
      UserError: one is quantised otherwise, or its parts do not fit.
    """
    found, parts = {}, set()
    for name in tensors:
        if name.endswith(".SCB"):
            raise UserError(f"{name} says that its matrix has 8 bits; wanted nf4, or 16 bits.")
        weight, is_state, kind = name.partition(STATE)
        if not is_state:
            continue
        if kind != "nf4":
            raise UserError(f"{weight} is quantised as {kind}; wanted nf4, or 16 bits.")
        parts |= {name, *(f"{weight}.{part}" for part in PARTS)} & tensors.keys()
        found[weight] = _open_one(weight, name, tensors, fetch)
    return found, parts


def _open_one(
    weight: str, state_name: str, tensors: Mapping[str, Tensor], fetch: Fetch
) -> Nf4Tensor:
    def check(is_so: bool, wanted: str) -> None:
        if not is_so:
            raise UserError(f"{weight} is not nf4 as bitsandbytes stores it: wanted {wanted}.")

    def check_part(name: str, dtype: str, size: int) -> None:
        found = tensors.get(name)
        is_so = found is not None and (found.dtype, math.prod(found.shape)) == (dtype, size)
        check(is_so, f"{name} of {size} {dtype}")

    def read(part: str, at: slice = ALL) -> np.ndarray:
        name = f"{weight}{part}"
        return fetch(name, (at, *(ALL,) * (len(tensors[name].shape) - 1))).reshape(-1)

    num_bytes = math.prod(tensors[state_name].shape)
    check(num_bytes <= STATE_BYTES, f"{state_name} of at most {STATE_BYTES} bytes")
    check_part(state_name, "U8", num_bytes)
    state = _parse(read(state_name.removeprefix(weight)).tobytes())
    shape: list[int] = state.get("shape") or []
    check(list_of(SIZE, "").accepts(shape) and len(shape) == 2, "a shape [out, in]")
    num_values = math.prod(shape)
    blocks = num_values // nf4.BLOCK
    check(state.get("blocksize") == nf4.BLOCK, f"a blocksize of {nf4.BLOCK}")
    check(num_values % nf4.BLOCK == 0 and shape[1] % 2 == 0, "whole blocks, and an even width")
    check_part(weight, "U8", num_values // 2)
    check_part(f"{weight}.quant_map", "F32", len(nf4.CODE))
    check(np.array_equal(read(".quant_map"), nf4.CODE), "the quant_map of nf4")
    nested, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if nested is None:
        check_part(f"{weight}.absmax", "F32", blocks)
    else:
        check(SIZE.accepts(nested), "a nested_blocksize")
        check(isinstance(offset, float) and math.isfinite(offset), "a nested_offset")
        check_part(f"{weight}.absmax", "U8", blocks)
        check_part(f"{weight}.nested_absmax", "F32", -(-blocks // nested))
        check_part(f"{weight}.nested_quant_map", "F32", 256)

    def absmax() -> np.ndarray:
        once = read(".absmax")
        if nested is None:
            return once
        scale = read(".nested_absmax")[np.arange(blocks) // nested]
        return read(".nested_quant_map")[once] * scale + np.float32(offset)

    return Nf4Tensor((shape[0], shape[1]), functools.partial(read, ""), absmax)


def _parse(state: bytes) -> dict[str, Any]:
    try:
        found = json.loads(state)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_quantisation(config: Mapping[str, Any]) -> None:
    """Raises UserError unless the quantization_config of a config.json is of nf4."""
    method, kind = config.get("quant_method"), config.get("bnb_4bit_quant_type", "fp4")
    if (method, config.get("load_in_4bit"), kind) != ("bitsandbytes", True, "nf4"):
        raise UserError(
            f"quantization_config {reprlib.repr(config)} is not supported; wanted the nf4 of "
            "bitsandbytes, or the model as it was before."
        )
