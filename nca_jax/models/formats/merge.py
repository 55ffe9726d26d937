"""Adapters merged into the matrices that they belong to: W + scale a b, with DoRA on its length."""

import functools
from collections.abc import Mapping

import numpy as np

from nca_jax.models.formats.names import FLOAT32, Param
from nca_jax.models.lora import Lora


def merge(base: Mapping[str, Param], lora: Lora, adapters: Mapping[str, Param]) -> dict[str, Param]:
    """Returns the parameters of one model without adapters; nothing is read before a `read`.

    The sum is made in float32, so merged parameters have that dtype; the others keep theirs.

    Args:
      base: {"P/kernel": Param, ...} of the whole model.
      lora: what the adapters are.
      adapters: {"P/lora/a": Param, ...}.
    """
    merged = dict(base)
    for path, a in adapters.items():
        if path.endswith("/lora/a"):
            module = path.removesuffix("/lora/a")
            kernel, b = base[f"{module}/kernel"], adapters[f"{module}/lora/b"]
            m = adapters[f"{module}/lora/m"] if lora.dora else None
            read = functools.partial(_read, kernel, a, b, m, lora.scale)
            merged[f"{module}/kernel"] = Param(kernel.shape, read)
    return merged


def _read(
    kernel: Param,
    a: Param,
    b: Param,
    m: Param | None,
    scale: float,
    index: tuple[slice, ...],
    dtype: np.dtype = FLOAT32,
) -> np.ndarray:
    """Returns `index` of kernel + scale a b [.., *in, *out]."""
    num_stacked = len(a.shape) + len(b.shape) - 2 - len(kernel.shape)
    stacked, ins = index[:num_stacked], index[num_stacked : len(a.shape) - 1]
    outs, all_of = index[len(a.shape) - 1 :], slice(None)
    inner = ins if m is None else (all_of,) * len(ins)  # DoRA's lengths are over all of `in`

    a_part, b_part = a.read((*stacked, *inner, all_of)), b.read((*stacked, all_of, *outs))
    lead = a_part.shape[:num_stacked]
    a_part = a_part.reshape(*lead, -1, a.shape[-1])
    b_part = b_part.reshape(*lead, a.shape[-1], -1)
    value = kernel.read((*stacked, *inner, *outs))
    value = value + np.float32(scale) * (a_part @ b_part).reshape(value.shape)
    if m is not None:
        over = tuple(range(num_stacked, len(a.shape) - 1))
        length = np.sqrt(np.sum(value**2, axis=over, keepdims=True))
        value *= np.expand_dims(m.read((*stacked, *outs)), over) / length
        value = value[(all_of,) * num_stacked + ins]
    return value.astype(dtype)
