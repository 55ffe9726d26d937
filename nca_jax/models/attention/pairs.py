"""Attention over packed rows that share prompts, in XLA, on any platform.

Axes: R rows, T tokens, N query heads, G kv heads (J = N / G queries share one), H head width,
      P pairs of (query block, key block), C tokens in a block, Q = T / C blocks.

Packed rows go by the plan in `Rows.pairs`: only blocks with a live token pair are computed, so the
cost follows the prompts and responses in a row, not the square of its length, and no more than
PAIRS_AT_ONCE blocks of scores, or of masks, exist at a time, forward or backward.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nca_jax.batch import Rows
from nca_jax.models.attention.attend import ATTENDED, NEVER, Attend
from nca_jax.models.attention.seen import Seen, seen_by_blocks, seen_by_tokens

PAIRS_AT_ONCE = 16  # per row; measured on CPU: more leave the cache, fewer pay for the loop


class _Plan(NamedTuple):
    """What is computed of rows, and what their tokens see."""

    pairs: jax.Array  # [R, P, 2] int32, P a multiple of PAIRS_AT_ONCE; -1 is filler
    num_chunks: jax.Array  # [] int32, known at run time only: of PAIRS_AT_ONCE pairs
    seen: Seen  # [R, Q, C] each
    key_on: jax.Array  # [R, Q, C] bool


def packed(
    rows: Rows[jax.Array], *, num_blocks: int, scale: float, window: int = 0, cap: float = 0.0
) -> Attend:
    """Returns the attention of these rows by the rule of `nca_jax.batch`; the cache is unused.

    Args:
      rows: one micro-batch; T is a multiple of `num_blocks`.
      num_blocks: Q, blocks a row.
      scale: of the scores q k.
      window: positions that a query sees, its own included; 0: all.
      cap: scaled scores s become cap tanh(s / cap); 0: they stay.
    """
    seen, pairs = seen_by_tokens(rows, window), rows.pairs
    if window:
        pairs = jax.vmap(_only)(pairs, seen_by_blocks(seen, num_blocks))
    num_chunks = -(-jnp.max(jnp.sum(pairs[..., 0] >= 0, axis=1)) // PAIRS_AT_ONCE)
    fill = -pairs.shape[1] % PAIRS_AT_ONCE
    pairs = jnp.pad(pairs, ((0, 0), (0, fill), (0, 0)), constant_values=-1)
    by_token = (seen, rows.key_on)
    by_block = jax.tree.map(lambda x: x.reshape(x.shape[0], num_blocks, -1), by_token)
    plan = _Plan(pairs, num_chunks, *by_block)

    def attend(q, k, v, cache):
        num_rows, length, num_heads, head_dim = q.shape
        groups = k.shape[2]

        def blocks(x):  # [R, T, heads, H] -> [R, Q, G, J * C, H]
            x = x.reshape(num_rows, num_blocks, -1, groups, x.shape[2] // groups, head_dim)
            return x.transpose(0, 1, 3, 4, 2, 5).reshape(num_rows, num_blocks, groups, -1, head_dim)

        out = _attend_pairs(blocks(q) * scale, blocks(k), blocks(v), plan, cap)
        out = out.reshape(num_rows, num_blocks, groups, num_heads // groups, -1, head_dim)
        return out.transpose(0, 1, 4, 2, 3, 5).reshape(q.shape), cache

    return attend


def _only(pairs: jax.Array, seen: jax.Array) -> jax.Array:
    """[P, 2] pairs of one row, [Q, Q] -> those that are seen, in order, filler behind them."""
    stays = (pairs[:, 0] >= 0) & seen[pairs[:, 0], pairs[:, 1]]
    return jnp.where(stays[:, None], pairs, -1)[jnp.argsort(~stays)]  # a stable sort


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_pairs(q, k, v, plan, cap) -> jax.Array:
    """softmax(q k) v over the pairs of a plan, blockwise.

    The running maximum and sum are those of Milakov and Gimelshein 2018 (arXiv:1805.02867); the
    gradient computes the scores again, as in FlashAttention (arXiv:2205.14135, appendix B).

    Args:
      q: [R, Q, G, JC, H], scaled; k, v: [R, Q, G, C, H].
      cap: as in `packed`.
    Returns:
      [R, Q, G, JC, H] in the dtype of v.
    """
    return _attend_forward(q, k, v, plan, cap)[0]


def _attend_forward(q, k, v, plan, cap):
    def one_chunk(i, carry):
        top, total, out = carry  # [R, Q, G, JC], the same, [R, Q, G, JC, H]
        query_block, key_block, mask_i = _chunk(plan, i)
        scores = _scores(_blocks_of(q, query_block), _blocks_of(k, key_block), cap)
        scores = _masked(scores, mask_i)
        new_top = _into_blocks(top, query_block, jnp.max(scores, axis=-1), "max")
        weights = jnp.exp(scores - _blocks_of(new_top, query_block)[..., None])
        values = _product("rpgcd,rpgdh->rpgch", weights, _blocks_of(v, key_block))
        # Pairs are sorted, so a block that is in the chunk twice is shrunk where it comes first.
        # Only these blocks are touched: the cost does not grow with the row.
        is_first = jnp.diff(query_block, axis=1, prepend=-1) != 0  # [R, p]
        shrink = jnp.exp(_blocks_of(top - new_top, query_block))
        shrink = jnp.where(is_first[..., None, None], shrink, 1.0)  # [R, p, G, JC]
        total = _into_blocks(total, query_block, shrink, "multiply")
        out = _into_blocks(out, query_block, shrink[..., None], "multiply")
        total = _into_blocks(total, query_block, jnp.sum(weights, axis=-1), "add")
        return new_top, total, _into_blocks(out, query_block, values, "add")

    start = (
        jnp.full(q.shape[:-1], NEVER, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    top, total, out = jax.lax.fori_loop(0, plan.num_chunks, one_chunk, start)
    out = checkpoint_name((out / total[..., None]).astype(v.dtype), ATTENDED)
    log_total = checkpoint_name(top + jnp.log(total), ATTENDED)
    return out, (q, k, v, plan, out, log_total)


def _attend_backward(cap, saved, grad_out):
    q, k, v, plan, out, log_total = saved
    shift = jnp.sum(grad_out.astype(jnp.float32) * out, axis=-1)  # [R, Q, G, JC]

    def one_chunk(i, carry):
        grad_q, grad_k, grad_v = carry
        query_block, key_block, mask_i = _chunk(plan, i)
        q_i, k_i = _blocks_of(q, query_block), _blocks_of(k, key_block)
        grad_out_i = _blocks_of(grad_out, query_block)
        log_total_i = _blocks_of(log_total, query_block)
        scores = _scores(q_i, k_i, cap)
        weights = jnp.exp(_masked(scores, mask_i) - log_total_i[..., None])
        grad_weights = _product("rpgch,rpgdh->rpgcd", grad_out_i, _blocks_of(v, key_block))
        grad_scores = weights * (grad_weights - _blocks_of(shift, query_block)[..., None])
        if cap:  # the slope of the tanh
            grad_scores *= 1 - jnp.square(scores / cap)
        grad_q_i = _product("rpgcd,rpgdh->rpgch", grad_scores, k_i)
        grad_k_i = _product("rpgcd,rpgch->rpgdh", grad_scores, q_i)
        grad_v_i = _product("rpgcd,rpgch->rpgdh", weights, grad_out_i)
        return (
            _into_blocks(grad_q, query_block, grad_q_i, "add"),
            _into_blocks(grad_k, key_block, grad_k_i, "add"),
            _into_blocks(grad_v, key_block, grad_v_i, "add"),
        )

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    grads = jax.lax.fori_loop(0, plan.num_chunks, one_chunk, start)
    grads = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return *grads, None


_attend_pairs.defvjp(_attend_forward, _attend_backward)


def _chunk(plan: _Plan, i: jax.Array) -> tuple[jax.Array, ...]:
    """Returns chunk i of query blocks [R, p], key blocks [R, p] and masks [R, p, C, C]."""
    pairs = jax.lax.dynamic_slice_in_dim(plan.pairs, i * PAIRS_AT_ONCE, PAIRS_AT_ONCE, axis=1)
    query_block, key_block = (jnp.maximum(pairs[..., n], 0) for n in (0, 1))  # [R, p]
    size = plan.key_on.shape[2]
    within = jnp.arange(size)[None, None]
    query = (query_block[..., None] * size + within)[..., :, None]
    key = (key_block[..., None] * size + within)[..., None, :]
    prompt, prompt_end, own = (_blocks_of(x, query_block)[..., :, None] for x in plan.seen)
    mask = ((prompt <= key) & (key < prompt_end)) | ((own <= key) & (key <= query))
    is_on = _blocks_of(plan.key_on, key_block) & (pairs[..., :1] >= 0)  # off, where it is filler
    return query_block, key_block, mask & is_on[..., None, :]


def _blocks_of(x: jax.Array, blocks: jax.Array) -> jax.Array:
    """[R, Q, ...], [R, p] -> [R, p, ...]."""
    return jax.vmap(lambda x, blocks: x[blocks])(x, blocks)


def _into_blocks(x: jax.Array, blocks: jax.Array, values: jax.Array, how: str) -> jax.Array:
    """Adds, multiplies or maximises [R, p, ...] values into their blocks of [R, Q, ...]."""
    values = jnp.broadcast_to(values, blocks.shape + x.shape[2:])
    return jax.vmap(lambda x, blocks, values: getattr(x.at[blocks], how)(values))(x, blocks, values)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum in the second array's dtype, summed in float32."""
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _scores(q: jax.Array, k: jax.Array, cap: float) -> jax.Array:
    """[R, p, G, JC, H], [R, p, G, C, H] -> [R, p, G, JC, C] float32."""
    scores = jnp.einsum("rpgch,rpgdh->rpgcd", q, k, preferred_element_type=jnp.float32)
    return cap * jnp.tanh(scores / cap) if cap else scores


def _masked(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """[R, p, G, JC, C], [R, p, C, C] -> the scores, NEVER where the mask is off."""
    per_query = mask[:, :, None].repeat(scores.shape[3] // mask.shape[2], axis=2)
    return jnp.where(per_query.reshape(*mask.shape[:2], 1, *scores.shape[3:]), scores, NEVER)
