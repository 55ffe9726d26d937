"""Adapters (LoRA, arXiv:2106.09685): y = x W + scale (x a) b, of which a and b alone are trained.

A target whose kernel W is `P/kernel`, [*lead, *in, *out], has `P/lora/a` [*lead, *in, rank] and
`P/lora/b` [*lead, rank, *out], float32; with DoRA (arXiv:2402.09353) also `P/lora/m` [*lead, *out].
What an adapter sits on is the base: the parameters that a model without adapters has.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nca_jax.axes import Params, constrain, flatten_paths, nest_paths
from nca_jax.models.attention.attend import KEPT
from nca_jax.models.product import Matrix, product

GetMatrix = Callable[[], Matrix]  # the kernel W, [*in, *out]: see `layers.Kernel`


@dataclasses.dataclass(frozen=True)
class Lora:
    """What adapters a model has.

    Attributes:
      rank: columns of a and rows of b.
      alpha: numerator of the scale.
      targets: names of the layers' matrices that have an adapter, of TARGETS.
      rslora: the scale is alpha / sqrt(rank), else alpha / rank.
      dora: y is scaled to the trained norm m of each output's column of W + scale a b.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def adapter_of(lora: Lora | None, target: str) -> Lora | None:
    """Returns what adapter a target has; None: none."""
    return lora if lora is not None and target in lora.targets else None


class Adapter(nnx.Module):
    """What is added to x W. At start a is U(-1/sqrt(in), 1/sqrt(in)) and b 0, so it adds nothing.

    Random numbers are of a stream of their own: those of the base are as without adapters.
    """

    def __init__(
        self,
        lora: Lora,
        lead: tuple[int, ...],
        ins: tuple[int, ...],
        outs: tuple[int, ...],
        rngs: nnx.Rngs,
    ):
        bound = math.prod(ins) ** -0.5
        shape = (*lead, *ins, lora.rank)
        self.a = nnx.Param(jax.random.uniform(rngs.lora(), shape, minval=-bound, maxval=bound))
        self.b = nnx.Param(jnp.zeros((*lead, lora.rank, *outs)))
        self.m = nnx.Param(jnp.ones((*lead, *outs))) if lora.dora else None
        self.scale, self.axes_in = lora.scale, len(ins)

    def __call__(self, x: jax.Array, y: jax.Array, matrix: GetMatrix) -> jax.Array:
        """Returns y = x W, [R, T, *out], with what the adapter adds; x is [R, T, *in]."""
        inner = constrain(product(x, self.a[...]), "rows", None, None)
        y += product(checkpoint_name(inner, KEPT), self.scaled_b)
        if self.m is None:
            return y
        ratio = self.m[...] / jax.lax.stop_gradient(self.norm(matrix))
        return y * ratio.astype(y.dtype)[None, None]

    def start_norm(self, matrix: GetMatrix) -> None:
        """Makes m what leaves y as it is."""
        if self.m is not None:
            self.m[...] = self.norm(matrix)

    @property
    def scaled_b(self) -> jax.Array:
        return self.scale * self.b[...]

    def norm(self, matrix: GetMatrix) -> jax.Array:
        """The norm of each output's column of W + scale a b, [*out] float32."""
        whole = matrix().astype(jnp.float32)
        whole += jnp.tensordot(self.a[...], self.scaled_b, axes=1)
        return jnp.sqrt(jnp.sum(whole**2, axis=tuple(range(self.axes_in))))


def split_adapters(params: Params) -> tuple[Params, Params]:
    """Returns (the adapters, the base) of parameters; either may be empty."""
    flat = flatten_paths(params)
    adapters = {path: x for path, x in flat.items() if "/lora/" in path}
    return nest_paths(adapters), nest_paths({k: x for k, x in flat.items() if k not in adapters})
