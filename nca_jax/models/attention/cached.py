"""Attention over a key-value cache, for sampling.

Axes: R rows, T tokens, N query heads, G kv heads (J = N / G queries share one), H head width,
      S cache slots.
"""

import jax
import jax.numpy as jnp

from nca_jax.models.attention.attend import NEVER, Attend, Cache


def cached(mask: jax.Array, write_at: jax.Array, *, scale: float, cap: float = 0.0) -> Attend:
    """Returns attention over a cache {"k", "v"}, into which the new k and v are written.

    Args:
      mask: which slots each query sees after the write, [R, T, S] bool.
      write_at: the slot of the first of the T tokens, [] int32, the same in every row.
      scale: of the scores q k.
      cap: scaled scores s become cap tanh(s / cap); 0: they stay.
    """

    def attend(q, k, v, cache):
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # [R, G, H, T], [R, G, T, H]
        write = jax.lax.dynamic_update_slice_in_dim
        cache = {
            "k": write(cache["k"], k.astype(cache["k"].dtype), write_at, axis=3),
            "v": write(cache["v"], v.astype(cache["v"].dtype), write_at, axis=2),
        }
        rows, length, num_heads, head_dim = q.shape
        q = q.reshape(rows, length, k.shape[1], -1, head_dim)  # [R, T, G, J, H]
        scores = jnp.einsum("rtgjh,rghs->rgjts", q, cache["k"], preferred_element_type=jnp.float32)
        scores *= scale
        if cap:
            scores = cap * jnp.tanh(scores / cap)
        scores = jnp.where(mask[:, None, None], scores, NEVER)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("rgjts,rgsh->rtgjh", weights, cache["v"])
        return out.reshape(rows, length, num_heads, head_dim), cache

    return attend


def empty_cache(
    num_rows: int, num_slots: int, num_kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> Cache:
    """One layer's cache: k [R, G, H, S] and v [R, G, S, H], so that neither product transposes."""
    return {
        "k": jnp.zeros((num_rows, num_kv_heads, head_dim, num_slots), dtype),
        "v": jnp.zeros((num_rows, num_kv_heads, num_slots, head_dim), dtype),
    }
