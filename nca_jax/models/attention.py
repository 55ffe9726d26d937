"""Attention: over packed rows that share prompts, and over a key-value cache.

Axes: R rows, T tokens, N query heads, G kv heads (J = N / G queries share one), H head width,
      P live pairs of (query block, key block), C tokens in a block, S cache slots.

Packed rows go by the plan in `Rows.pairs`: only blocks with a live token pair are computed, so the
cost follows the prompts and responses in a row, not the square of its length.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nca_jax.batch import PROMPT_SEGMENT, Rows

NEVER = -1e30  # finite: a fully masked block gives exp(NEVER - max) = 0, never nan

# attend(q [R, T, N, H], k [R, T, G, H], v [R, T, G, H], cache) -> (out [R, T, N, H], cache)
Attend = Callable[..., tuple[jax.Array, object]]


def packed(rows: Rows, *, sliding_window: int, num_blocks: int) -> Attend:
    """Returns the attention of these rows by the rule of `nca_jax.batch`; the cache is unused.

    The masks [R, P, C, C] are made here, once for all layers.

    Args:
      rows: one micro-batch; T is a multiple of `num_blocks`.
      sliding_window: keys further back than this by logical position are hidden; 0: none.
      num_blocks: blocks a row.
    """
    query_block, key_block = jnp.maximum(rows.pairs[..., 0], 0), rows.pairs[..., 1]  # [R, P]
    key_block = jnp.maximum(key_block, 0)
    live = rows.pairs[..., 0] >= 0  # [R, P]
    length = rows.tokens.shape[1]
    place = jnp.broadcast_to(jnp.arange(length)[None], rows.tokens.shape)

    def at(blocks: jax.Array, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda b, y: y.reshape(num_blocks, -1)[b])(blocks, x)  # [R, P, C]

    def queries(x):
        return at(query_block, x)[..., :, None]

    def keys(x):
        return at(key_block, x)[..., None, :]

    mask = (
        live[..., None, None]
        & (keys(place) <= queries(place))
        & (keys(rows.prompt_ids) == queries(rows.prompt_ids))
        & (
            (keys(rows.segments) == PROMPT_SEGMENT)
            | (keys(rows.segments) == queries(rows.segments))
        )
        & keys(rows.key_on)
    )  # [R, P, C, C]
    if sliding_window:
        mask &= queries(rows.positions) - keys(rows.positions) < sliding_window

    def attend(q, k, v, cache):
        return jax.vmap(_attend_pairs)(q, k, v, mask, query_block, key_block), cache

    return attend


def _attend_pairs(q, k, v, mask, query_block, key_block) -> jax.Array:
    """One row: softmax(q k) v over the live pairs; float32 softmax. Returns [T, N, H]."""
    num_pairs, block = mask.shape[:2]
    length, num_heads, head_dim = q.shape
    num_blocks, groups = length // block, k.shape[1]
    q = q.reshape(num_blocks, block, groups, -1, head_dim)[query_block]  # [P, C, G, J, H]
    k = k.reshape(num_blocks, block, groups, head_dim)[key_block]  # [P, C, G, H]
    v = v.reshape(num_blocks, block, groups, head_dim)[key_block]

    scores = jnp.einsum("pcgjh,pdgh->pgjcd", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, NEVER)  # [P, G, J, C, C]
    # The softmax of a query runs over all pairs of its block. Any shift gives the same result, so
    # no gradient flows through it.
    top = jax.ops.segment_max(
        jax.lax.stop_gradient(jnp.max(scores, axis=-1)), query_block, num_blocks
    )
    weights = jnp.exp(scores - top[query_block][..., None])  # [P, G, J, C, C]
    total = jax.ops.segment_sum(jnp.sum(weights, axis=-1), query_block, num_blocks)
    out = jnp.einsum(
        "pgjcd,pdgh->pcgjh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = jax.ops.segment_sum(out, query_block, num_blocks)  # [blocks, C, G, J, H]
    out /= jnp.moveaxis(total, -1, 1)[..., None]
    return out.reshape(length, num_heads, head_dim).astype(v.dtype)


def cached(mask: jax.Array, write_at: jax.Array) -> Attend:
    """Returns attention over a cache {"k", "v"} of [R, S, G, H], into which k and v are written.

    Args:
      mask: which slots each query sees after the write, [R, T, S] bool.
      write_at: the slot of the first of the T tokens, [] int32, the same in every row.
    """

    def attend(q, k, v, cache):
        write = jax.lax.dynamic_update_slice_in_dim
        cache = {
            "k": write(cache["k"], k.astype(cache["k"].dtype), write_at, axis=1),
            "v": write(cache["v"], v.astype(cache["v"].dtype), write_at, axis=1),
        }
        rows, length, num_heads, head_dim = q.shape
        q = q.reshape(rows, length, k.shape[2], -1, head_dim)  # [R, T, G, J, H]
        scores = jnp.einsum("rtgjh,rsgh->rgjts", q, cache["k"], preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, NEVER)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("rgjts,rsgh->rtgjh", weights, cache["v"])
        return out.reshape(rows, length, num_heads, head_dim), cache

    return attend
