"""Mixture of experts as in Mixtral: each token goes to its top experts, and none is dropped.

Axes: R rows, T tokens, D width, F MLP width, E experts, C experts a token is routed to.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nca_jax.axes import constrain
from nca_jax.model_config import ModelConfig
from nca_jax.models.attention.attend import KEPT
from nca_jax.models.layers import Kernel

# mix(x [R, T, D], shares [R, T, C] float32, chosen [R, T, C] int32, gate [E, D, F], up [E, D, F],
# down [E, F, D]) -> [R, T, D]: sum over a token's chosen experts of share * expert(token).
Mix = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class Moe(nnx.Module):
    """y = sum over the top experts e of softmax(router logits of the top)_e * MLP_e(x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, mix: Mix):
        e, d, f = config.num_experts, config.width, config.mlp_width
        self.router = Kernel((d, e), d, rngs)
        self.gate = Kernel((e, d, f), d, rngs)
        self.up = Kernel((e, d, f), d, rngs)
        self.down = Kernel((e, f, d), f, rngs)
        self.experts_per_token = config.experts_per_token
        self.mix = mix

    def __call__(self, x: jax.Array) -> jax.Array:
        """[R, T, D] -> [R, T, D]."""
        logits = jnp.einsum("rtd,de->rte", x, self.router(x.dtype)).astype(jnp.float32)
        top, chosen = jax.lax.top_k(logits, self.experts_per_token)  # [R, T, C]
        shares = jax.nn.softmax(top, axis=-1)
        kernels = (kernel(x.dtype) for kernel in (self.gate, self.up, self.down))
        return self.mix(x, shares, chosen, *kernels)


def dense(
    x: jax.Array,
    shares: jax.Array,
    chosen: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    """A `Mix` of plain einsums: every expert computes every token, the shares choose."""
    weights = jnp.einsum("rtc,rtce->rte", shares, jax.nn.one_hot(chosen, gate.shape[0]))
    gated, hidden = (
        checkpoint_name(jnp.einsum("rtd,edf->rtef", x, kernel), KEPT) for kernel in (gate, up)
    )
    hidden *= jax.nn.silu(gated)
    hidden = constrain(hidden, "rows", None, None, "mlp")
    hidden *= weights.astype(x.dtype)[..., None]
    return jnp.einsum("rtef,efd->rtd", hidden, down)
