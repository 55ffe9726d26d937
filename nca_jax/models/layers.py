"""The layers of a decoder: RMSNorm, grouped-query attention, a gated MLP.

Axes: R rows, T tokens, V padded vocabulary, D width, N query heads, G kv heads, H head width,
      F MLP width. Parameters are cast to the activations' dtype where used.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nca_jax.axes import constrain, pin, spec_in_use
from nca_jax.model_config import ModelConfig
from nca_jax.models import nf4
from nca_jax.models.attention.attend import KEPT, Attend, Cache
from nca_jax.models.lora import Adapter, Lora, adapter_of
from nca_jax.models.product import Matrix, product


class Kernel(nnx.Module):
    """A matrix without a product: each caller writes its own. N(0, 1/in) at start.

    Args:
      ins, outs: its axes, [*in, *out].
      lora: of its adapter; None: it has none.
      lead: axes before those, of matrices that are stacked.
    """

    codes: nnx.Param  # these two in place of the kernel where `is_nf4`
    absmax: nnx.Param

    def __init__(
        self,
        ins: tuple[int, ...],
        outs: tuple[int, ...],
        rngs: nnx.Rngs,
        *,
        lora: Lora | None = None,
        lead: tuple[int, ...] = (),
    ):
        normal = jax.random.normal(rngs.params(), (*lead, *ins, *outs))
        self.kernel = nnx.Param(normal * math.prod(ins) ** -0.5)
        self.lora = None if lora is None else Adapter(lora, lead, ins, outs, rngs)
        self.lead, self.ins, self.outs, self.is_nf4 = lead, ins, outs, False

    def make_nf4(self, path: str) -> None:
        """Keeps codes and absmax in place of the kernel `path`; this makes their shapes alone."""
        shape = self.kernel.shape  # layers are stacked before `lead`
        lead = shape[: len(shape) - len(self.ins) - len(self.outs)]
        codes, absmax = nf4.shapes(lead, math.prod(self.ins), math.prod(self.outs))
        self.codes = nnx.Param(jnp.zeros(codes.shape, codes.dtype))
        self.absmax = nnx.Param(jnp.zeros(absmax.shape, absmax.dtype))
        self.spec = spec_in_use(path.replace("kernel", "codes"), codes.shape)
        del self.kernel
        self.is_nf4 = True

    def matrix(self) -> Matrix:
        """The kernel as it is kept, for the caller to cast: its gradient has the dtype of that."""
        if self.is_nf4:
            shape = (*self.lead, *self.ins, *self.outs)
            # Pinned, what devices send each other are codes, not what is made of them.
            codes, absmax = pin(self.codes[...], self.spec), pin(self.absmax[...], self.spec)
            return nf4.Nf4(codes, absmax, shape)
        return self.kernel[...]

    def adapted(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns y, the product of x with the kernel, with what the adapter adds."""
        return y if self.lora is None else self.lora(x, y, self.matrix)


class Linear(Kernel):
    """`product` with a matrix, without a bias."""

    def __call__(self, x: jax.Array) -> jax.Array:
        y = checkpoint_name(product(x, self.matrix()), KEPT)
        return self.adapted(x, y)


class Projection(Linear):
    """D to heads, with an optional bias per head."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        rngs: nnx.Rngs,
        *,
        bias: bool,
        lora: Lora | None,
    ):
        super().__init__((width,), (heads, head_dim), rngs, lora=lora)
        self.bias = nnx.Param(jnp.zeros((heads, head_dim))) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[R, T, D] -> [R, T, heads, H]."""
        y = super().__call__(x)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)[None, None]
        return constrain(y, "rows", None, "heads", None)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axes, in float32; * (1 + scale) where the config says so.

    Args:
      shape: of those axes.
    """

    def __init__(self, config: ModelConfig, *shape: int):
        self.has_offset, self.eps = config.norm_offset, config.norm_eps
        self.scale = nnx.Param(jnp.zeros(shape) if self.has_offset else jnp.ones(shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        y, scale = x.astype(jnp.float32), self.scale[...]
        axes = tuple(range(-scale.ndim, 0))
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + self.eps)
        if self.has_offset:
            scale = 1 + scale.astype(jnp.float32)
        scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
        return (y * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention; which token sees which is the caller's `attend`."""

    def __init__(self, config: ModelConfig, lora: Lora | None, rngs: nnx.Rngs):
        c = config

        def projection(name: str, heads: int) -> Projection:
            on = adapter_of(lora, name)
            return Projection(c.width, heads, c.head_dim, rngs, bias=c.qkv_bias, lora=on)

        self.q = projection("q", c.num_heads)
        self.k = projection("k", c.num_kv_heads)
        self.v = projection("v", c.num_kv_heads)
        heads = (c.num_heads, c.head_dim)
        self.o = Linear(heads, (c.width,), rngs, lora=adapter_of(lora, "o"))

        def norm(heads: int) -> RMSNorm | None:
            if c.qk_norm is None:
                return None
            return RMSNorm(c, *((heads,) if c.qk_norm == "width" else ()), c.head_dim)

        self.q_norm, self.k_norm = norm(c.num_heads), norm(c.num_kv_heads)

    def __call__(
        self, x: jax.Array, attend: Attend, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """[R, T, D] -> [R, T, D], and what attention keeps."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out, kept = attend(q, k, v, cache)
        out = constrain(out, "rows", None, "heads", None)
        return self.o(out), kept


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}


class Mlp(nnx.Module):
    """A gated MLP: down(activation(gate(x)) * up(x)), SwiGLU by default."""

    def __init__(self, config: ModelConfig, lora: Lora | None, rngs: nnx.Rngs):
        d, f = (config.width,), (config.mlp_width,)
        self.gate = Linear(d, f, rngs, lora=adapter_of(lora, "gate"))
        self.up = Linear(d, f, rngs, lora=adapter_of(lora, "up"))
        self.down = Linear(f, d, rngs, lora=adapter_of(lora, "down"))
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.activation(self.gate(x)) * self.up(x)
        return self.down(constrain(hidden, "rows", None, "mlp"))
