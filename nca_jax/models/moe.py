"""Mixture of experts: each token goes to its top experts, and none is dropped.

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
from nca_jax.models.lora import Lora, adapter_of

# The kernel W of all experts, [E, in, out]; with adapters also a [E, in, r] and b [E, r, out], and
# the product with x is x W + (x a) b.
Matrices = tuple[jax.Array, ...]
# mix(x [R, T, D], shares [R, T, C] float32, chosen [R, T, C] int32, gate D to F, up D to F,
# down F to D) -> [R, T, D]: sum over a token's chosen experts of share * expert(token).
Mix = Callable[[jax.Array, jax.Array, jax.Array, Matrices, Matrices, Matrices], jax.Array]


class Experts(Kernel):
    """The kernel of all experts."""

    def __call__(self, dtype: jnp.dtype) -> Matrices:
        """The matrices of a `Mix`, in a dtype."""
        adapter = () if self.lora is None else (self.lora.a[...], self.lora.scaled_b)
        return tuple(x.astype(dtype) for x in (self.matrix(), *adapter))


class Moe(nnx.Module):
    """y = sum over the top experts e of share_e * MLP_e(x).

    The shares are the softmax of the router's logits: of those of the top experts, or of all where
    the config says that they are not renormalised.
    """

    def __init__(self, config: ModelConfig, lora: Lora | None, rngs: nnx.Rngs, mix: Mix):
        e, d, f = (config.num_experts,), (config.width,), (config.mlp_width,)
        self.router = Kernel(d, e, rngs, lora=adapter_of(lora, "router"))
        self.gate = Experts(d, f, rngs, lora=adapter_of(lora, "gate"), lead=e)
        self.up = Experts(d, f, rngs, lora=adapter_of(lora, "up"), lead=e)
        self.down = Experts(f, d, rngs, lora=adapter_of(lora, "down"), lead=e)
        self.config = config
        self.mix = mix

    def __call__(self, x: jax.Array) -> jax.Array:
        """[R, T, D] -> [R, T, D]."""
        router = self.router.matrix().astype(x.dtype)
        logits = self.router.adapted(x, jnp.einsum("rtd,de->rte", x, router)).astype(jnp.float32)
        top, chosen = jax.lax.top_k(logits, self.config.experts_per_token)  # [R, T, C]
        if self.config.renormalise:
            shares = jax.nn.softmax(top, axis=-1)
        else:
            shares = jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        gate, up, down = (experts(x.dtype) for experts in (self.gate, self.up, self.down))
        return self.mix(x, shares, chosen, gate, up, down)


def dense(
    x: jax.Array,
    shares: jax.Array,
    chosen: jax.Array,
    gate: Matrices,
    up: Matrices,
    down: Matrices,
) -> jax.Array:
    """A `Mix` of plain einsums: every expert computes every token, the shares choose."""
    num_experts = gate[0].shape[0]
    weights = jnp.einsum("rtc,rtce->rte", shares, jax.nn.one_hot(chosen, num_experts))

    def each(kernel: jax.Array, *adapter: jax.Array) -> jax.Array:  # [R, T, E, F]
        y = jnp.einsum("rtd,edf->rtef", x, kernel)
        if adapter:
            a, b = adapter
            y += jnp.einsum("rtek,ekf->rtef", jnp.einsum("rtd,edk->rtek", x, a), b)
        return checkpoint_name(y, KEPT)

    gated, hidden = each(*gate), each(*up)
    hidden *= jax.nn.silu(gated)
    hidden = constrain(hidden, "rows", None, None, "mlp")
    hidden *= weights.astype(x.dtype)[..., None]
    kernel, *adapter = down
    y = jnp.einsum("rtef,efd->rtd", hidden, kernel)
    if adapter:
        a, b = adapter
        y += jnp.einsum("rtek,ekd->rtd", jnp.einsum("rtef,efk->rtek", hidden, a), b)
    return y
