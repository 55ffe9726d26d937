"""The layers of a decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Axes: R rows, T tokens, V padded vocabulary, D width, N query heads, G kv heads, H head width,
      F MLP width. Parameters are cast to the activations' dtype where used.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nca_jax.axes import constrain
from nca_jax.model_config import ModelConfig
from nca_jax.models.attention.attend import KEPT, Attend, Cache


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[R, T, *in], [*in, *out] -> [R, T, *out] in the dtype of x; the kernel is cast to it.

    The gradient of the kernel has the kernel's dtype; it is x^T g or (g^T x)^T: whichever
    transposes the narrower of the two, which costs a CPU a copy. Automatic differentiation takes
    the latter.
    """
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=x.ndim - 2)


def _product_forward(x, kernel):
    return product(x, kernel), (x, kernel)


def _product_backward(saved, grad):
    x, kernel = saved
    axes_out = grad.ndim - 2
    last = [tuple(range(y.ndim - axes_out, y.ndim)) for y in (grad, kernel)]
    grad_x = jnp.tensordot(grad, kernel.astype(grad.dtype), axes=last)
    if x.size <= grad.size:
        return grad_x, _outer(x, grad, kernel.dtype)
    outer = _outer(grad, x, kernel.dtype)
    return grad_x, jnp.moveaxis(outer, range(axes_out), range(-axes_out, 0))


def _outer(x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Sums over tokens: [R, T, *a], [R, T, *b] -> [*a, *b] in `dtype`."""
    tokens = (((0, 1), (0, 1)), ((), ()))
    return jax.lax.dot_general(x, y, tokens, preferred_element_type=dtype)


product.defvjp(_product_forward, _product_backward)


class Kernel(nnx.Module):
    """A matrix without a product: each caller writes its own. N(0, 1/fan_in) at start."""

    def __init__(self, shape: tuple[int, ...], fan_in: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * fan_in**-0.5)

    def __call__(self, dtype: jnp.dtype) -> jax.Array:
        return self.kernel[...].astype(dtype)


class Linear(Kernel):
    """`product` with a matrix, without a bias."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return checkpoint_name(product(x, self.kernel[...]), KEPT)


class Projection(Linear):
    """D to heads, with an optional bias per head."""

    def __init__(self, width: int, heads: int, head_dim: int, bias: bool, rngs: nnx.Rngs):
        super().__init__((width, heads, head_dim), width, rngs)
        self.bias = nnx.Param(jnp.zeros((heads, head_dim))) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[R, T, D] -> [R, T, heads, H]."""
        y = super().__call__(x)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)[None, None]
        return constrain(y, "rows", None, "heads", None)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    def __init__(self, width: int, eps: float):
        self.scale, self.eps = nnx.Param(jnp.ones(width)), eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (y * scale).astype(x.dtype)


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """[H / 2] float32 radians a position: theta^(-2i/H), stretched as Llama 3 does where asked.

    Made on the host, each step rounded to float32 as where the models were trained: at position
    4000 one rounding of a frequency is 2e-4 radians.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = (config.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    freqs = np.float32(1) / powers
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    # Long wavelengths are slowed by `factor`, short ones kept, those between blended linearly in
    # the number of turns over the original context.
    turns = scaling.original_max_position / (np.float32(2 * math.pi) / freqs)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return (1 - keep) * freqs / np.float32(scaling.factor) + keep * freqs


def rotate(x: jax.Array, positions: jax.Array, freqs: np.ndarray) -> jax.Array:
    """Rotary embedding of [R, T, heads, H], halves rotated; float32, as bfloat16 has no 257."""
    angles = positions.astype(jnp.float32)[..., None] * freqs[None, None]  # [R, T, H/2]
    sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention; which token sees which is the caller's `attend`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.q = Projection(c.width, c.num_heads, c.head_dim, c.qkv_bias, rngs)
        self.k = Projection(c.width, c.num_kv_heads, c.head_dim, c.qkv_bias, rngs)
        self.v = Projection(c.width, c.num_kv_heads, c.head_dim, c.qkv_bias, rngs)
        self.o = Linear((c.num_heads, c.head_dim, c.width), c.num_heads * c.head_dim, rngs)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None

    def __call__(
        self, x: jax.Array, positions: jax.Array, attend: Attend, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """[R, T, D] and positions [R, T] -> [R, T, D]."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        freqs = rotary_frequencies(self.config)
        out, cache = attend(rotate(q, positions, freqs), rotate(k, positions, freqs), v, cache)
        out = constrain(out, "rows", None, "heads", None)
        return self.o(out), cache


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, f = config.width, config.mlp_width
        self.gate, self.up = Linear((d, f), d, rngs), Linear((d, f), d, rngs)
        self.down = Linear((f, d), f, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(constrain(hidden, "rows", None, "mlp"))
