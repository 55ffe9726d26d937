"""Mixture of experts as in Mixtral: each token goes to its top experts, and none is dropped.

Axes: R rows, T tokens, D width, F MLP width, E experts.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from nca_jax.axes import constrain
from nca_jax.model_config import ModelConfig
from nca_jax.models.layers import Kernel


class Moe(nnx.Module):
    """y = sum over the top experts e of softmax(router logits of the top)_e * MLP_e(x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        e, d, f = config.num_experts, config.width, config.mlp_width
        self.router = Kernel((d, e), d, rngs)
        self.gate = Kernel((e, d, f), d, rngs)
        self.up = Kernel((e, d, f), d, rngs)
        self.down = Kernel((e, f, d), f, rngs)
        self.experts_per_token = config.experts_per_token

    def __call__(self, x: jax.Array) -> jax.Array:
        """[R, T, D] -> [R, T, D]; a dense einsum over the experts, weighted by the router."""
        logits = jnp.einsum("rtd,de->rte", x, self.router(x.dtype)).astype(jnp.float32)
        top, chosen = jax.lax.top_k(logits, self.experts_per_token)  # [R, T, 2]
        one_hot = jax.nn.one_hot(chosen, logits.shape[-1])  # [R, T, 2, E]
        weights = jnp.einsum("rtc,rtce->rte", jax.nn.softmax(top, axis=-1), one_hot)
        hidden = jax.nn.silu(jnp.einsum("rtd,edf->rtef", x, self.gate(x.dtype)))
        hidden *= jnp.einsum("rtd,edf->rtef", x, self.up(x.dtype))
        hidden = constrain(hidden, "rows", None, None, "mlp")
        hidden *= weights.astype(x.dtype)[..., None]
        return jnp.einsum("rtef,efd->rtd", hidden, self.down(x.dtype))
