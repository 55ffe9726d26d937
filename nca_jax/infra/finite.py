"""Whether what is saved, opened or measured is made of numbers: no NaN and no infinity."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nca_jax.axes import flatten_paths, on_device
from nca_jax.checks import first_few


@jax.jit
def _are_finite(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(x).all() for x in on_device(arrays)]


def not_finite(arrays: Any) -> str:
    """Names the arrays of a tree that hold NaN or infinity, the first few by path; "" for none.

    Each is looked at in the dtype that it has, all in one program, sharded as they are.
    """
    floats = {
        path: x
        for path, x in flatten_paths(arrays).items()
        if jnp.issubdtype(x.dtype, jnp.floating)
    }
    are_finite = jax.device_get(_are_finite(list(floats.values())))
    return first_few([path for path, is_it in zip(floats, are_finite, strict=True) if not is_it])


def bad_metrics(metrics: Mapping[str, float]) -> str:
    """Returns "loss is nan, ..." of the metrics that are not finite; "" for none."""
    return ", ".join(f"{name} is {x}" for name, x in metrics.items() if not math.isfinite(x))
