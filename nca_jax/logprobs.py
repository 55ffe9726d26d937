"""From packed rows to log-probabilities: the only road, for training, reference and evaluation.

Axes: R rows, T tokens, D width, V padded vocabulary, C tokens of a row in one chunk.
Units: nats, float32.

Only hidden states that predict a response token reach the head, C tokens of each row at a time:
[T, V] logits never exist whole, forward or backward.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nca_jax.axes import ROWS, WIDTH, Params, constrain
from nca_jax.batch import Rows
from nca_jax.models.decoder import Model


def sequence_logps(
    model: Model,
    params: Params,
    rows: Rows[jax.Array],
    *,
    shape: tuple[int, int],
    block: int,
    chunk: int,
) -> jax.Array:
    """log pi(y|x) of every response in the rows, summed over its tokens.

    Args:
      model: has `rows(params, rows, block=...)`, `head(params)` and `config.vocab_size`.
      rows: one micro-batch of the step, [R, T].
      shape: (B, K) of the step, which `rows.logp_slot` points into.
      block: tokens in an attention block.
      chunk: C; divides T. It bounds the logits: R * C * V float32.
    Returns:
      [B, K] float32 nats; 0 for a response that is not in these rows.
    """
    num_slots = shape[0] * shape[1]
    logps = token_logps(model, params, rows, num_slots=num_slots, block=block, chunk=chunk)
    return sum_by_slot(logps, rows, num_slots).reshape(shape)


def sum_by_slot(values: jax.Array, rows: Rows[jax.Array], num_slots: int) -> jax.Array:
    """Sums [R, T] values of scored tokens into their responses, [num_slots] float32."""
    # One slot more collects the filler and is dropped.
    sums = jnp.zeros(num_slots + 1, jnp.float32)
    return sums.at[rows.logp_slot.reshape(-1)].add(values.reshape(-1))[:-1]


def token_logps(
    model: Model,
    params: Params,
    rows: Rows[jax.Array],
    *,
    num_slots: int,
    block: int,
    chunk: int,
) -> jax.Array:
    """The log-probability of each `rows.logp_token`, [R, T] float32; 0 for filler."""
    hidden = model.rows(params, rows, block=block)
    hidden = jnp.take_along_axis(hidden, rows.logp_at[..., None], axis=1)  # [R, T, D]
    scored = rows.logp_slot < num_slots  # the scored tokens come first
    num_chunks = -(-jnp.max(jnp.sum(scored, axis=1)) // chunk)
    logps = head_logps(
        hidden, model.head(params), rows.logp_token, num_chunks, model.config.vocab_size, chunk
    )
    return jnp.where(scored, logps, 0.0)


def head_logps(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    num_chunks: jax.Array,
    vocab_size: int,
    chunk: int,
) -> jax.Array:
    """log softmax(hidden @ head)[tokens], [R, T]; what lies beyond `num_chunks` chunks is 0.

    Over a mesh each device does its own rows with the slice of D that it holds of the head. Left to
    the partitioner, the head's gradient would be whole on every device, or summed over devices in
    every chunk; here it is scattered once: see `_whole` and `_to_slices`.
    """

    def of_rows(hidden, head, tokens, num_chunks):
        return _chunked_logps(hidden, head, tokens, num_chunks, vocab_size, chunk)

    if not _is_split():
        return of_rows(hidden, head, tokens, num_chunks)
    return jax.shard_map(
        of_rows,
        in_specs=(P(ROWS), P(WIDTH), P(ROWS), P()),
        out_specs=P(ROWS),
        axis_names=set(ROWS),
        check_vma=False,
    )(hidden, head, tokens, num_chunks)


def _is_split() -> bool:
    """Whether rows are over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and math.prod(mesh.shape[axis] for axis in ROWS) > 1


def _whole(slices: jax.Array) -> jax.Array:
    """[D here, V] -> [D, V]."""
    return jax.lax.all_gather(slices, WIDTH, axis=0, tiled=True) if _is_split() else slices


def _to_slices(sums: jax.Array) -> jax.Array:
    """[D, V] of each device -> their sum, [D here, V]; over copies of the head autodiff sums it."""
    if not _is_split():
        return sums
    slices = jax.lax.psum_scatter(sums, WIDTH, scatter_dimension=0, tiled=True)
    # Else a compiler may scatter once a step: sums of micro-batches would be whole on each device.
    return jax.lax.optimization_barrier(slices)


def _plain_logps(hidden, head, tokens, num_chunks, vocab_size, chunk) -> jax.Array:
    """`head_logps` of the rows that are here.

    The number of chunks is known at run time only, so that no chunk of filler is computed; hence
    the gradient by hand: d logp = onehot(token) - softmax, with the logits computed again. A head
    that nothing differentiates has none.
    """
    return _with_totals(hidden, head, tokens, num_chunks, vocab_size, chunk)[0]


_chunked_logps = jax.custom_vjp(_plain_logps, nondiff_argnums=(4, 5))


def _forward(hidden, head, tokens, num_chunks, vocab_size, chunk):
    is_trained = head.perturbed
    hidden, head, tokens, num_chunks = (x.value for x in (hidden, head, tokens, num_chunks))
    logps, *saved = _with_totals(hidden, head, tokens, num_chunks, vocab_size, chunk)
    # In the structure, as it decides what is traced.
    return logps, (hidden, tokens, num_chunks, *saved, () if is_trained else None)


def _with_totals(hidden, head, tokens, num_chunks, vocab_size, chunk):
    """Returns the log-probabilities [R, T], log-sum-exps [R, T] and the head as it was used."""
    weights = _whole(head.astype(hidden.dtype))  # once, outside the chunk loop

    def one_chunk(i, carry):
        logps, log_totals = carry
        logits = _logits(_chunk(hidden, i, chunk), weights, vocab_size)  # [R, C, V]
        log_total = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.sum(jnp.where(_is_token(tokens, i, chunk, logits), logits, 0.0), axis=-1)
        return _put(logps, picked - log_total, i), _put(log_totals, log_total, i)

    empty = jnp.zeros(tokens.shape, jnp.float32)
    logps, log_totals = jax.lax.fori_loop(0, num_chunks, one_chunk, (empty, empty))
    return logps, log_totals, weights


def _backward(vocab_size, chunk, saved, grad_logps):
    hidden, tokens, num_chunks, log_totals, weights, trained = saved
    is_trained = trained is not None

    def one_chunk(i, carry):
        grad_hidden, grad_head = carry
        x = _chunk(hidden, i, chunk)
        logits = _logits(x, weights, vocab_size)
        softmax = jnp.exp(logits - _chunk(log_totals, i, chunk)[..., None])
        grad_logits = jnp.where(_is_token(tokens, i, chunk, logits), 1.0, 0.0) - softmax
        grad_logits = (grad_logits * _chunk(grad_logps, i, chunk)[..., None]).astype(x.dtype)
        grad_x = jnp.einsum("rcv,dv->rcd", grad_logits, weights)
        if grad_head is not None:
            grad_head += jnp.einsum(
                "rcd,rcv->dv", x, grad_logits, preferred_element_type=jnp.float32
            )
        return _put(grad_hidden, grad_x, i), grad_head

    of_head = jnp.zeros(weights.shape, jnp.float32) if is_trained else None
    start = jnp.zeros_like(hidden), of_head
    grad_hidden, grad_head = jax.lax.fori_loop(0, num_chunks, one_chunk, start)
    return grad_hidden, _to_slices(grad_head) if is_trained else None, None, None


_chunked_logps.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunk(x: jax.Array, i: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _put(x: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * part.shape[1], axis=1)


def _logits(x: jax.Array, weights: jax.Array, vocab_size: int) -> jax.Array:
    """[R, C, D] -> [R, C, V] float32, padded columns far below every token."""
    logits = jnp.einsum("rcd,dv->rcv", x, weights, preferred_element_type=jnp.float32)
    logits = constrain(logits, None, None, "vocab")
    if vocab_size == weights.shape[1]:
        return logits
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    return jnp.where(column < vocab_size, logits, -1e30)


def _is_token(tokens: jax.Array, i: jax.Array, chunk: int, logits: jax.Array) -> jax.Array:
    """[R, C, V] bool, never materialised: fused into the reduction or the product that reads it."""
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    return column == _chunk(tokens, i, chunk)[..., None]
