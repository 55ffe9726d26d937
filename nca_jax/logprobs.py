"""From packed rows to log-probabilities: the only road, for training, reference and evaluation.

Axes: R rows, T tokens, D width, V padded vocabulary, C tokens of a row in one chunk.
Units: nats, float32.

Only hidden states that predict a response token reach the head, C tokens of each row at a time:
[T, V] logits never exist whole, forward or backward. Of a head that devices share each has a piece
of the columns whole at a time, and of its gradient.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nca_jax.axes import ROWS, WIDTH, Params, constrain, pin
from nca_jax.batch import Rows
from nca_jax.models.decoder import Model
from nca_jax.models.logits import Logits, token_of

PIECE = 16384  # columns of a head that is split, which a device has whole at once


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
      model: has `rows(params, rows, block=...)`, `head(params)` and `config`.
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
    hidden, scored, num_chunks = _predicting(model, params, rows, num_slots, block, chunk)
    logps = head_logps(
        hidden, model.head(params), rows.logp_token, num_chunks, Logits.of(model.config), chunk
    )
    return jnp.where(scored, logps, 0.0)


def token_logps_and_misses(
    model: Model,
    params: Params,
    rows: Rows[jax.Array],
    *,
    num_slots: int,
    block: int,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """`token_logps`, and 1 for each token that is not the likeliest one, [R, T] float32 both."""
    hidden, scored, num_chunks = _predicting(model, params, rows, num_slots, block, chunk)
    head, to_logits = model.head(params), Logits.of(model.config)
    logps = head_logps(hidden, head, rows.logp_token, num_chunks, to_logits, chunk)
    misses = head_likeliest(hidden, head, num_chunks, to_logits, chunk) != rows.logp_token
    return jnp.where(scored, logps, 0.0), jnp.where(scored, misses, False).astype(jnp.float32)


def _predicting(
    model: Model,
    params: Params,
    rows: Rows[jax.Array],
    num_slots: int,
    block: int,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The hidden states that predict [R, T, D], which predict a scored token, and their chunks."""
    hidden = model.rows(params, rows, block=block)
    hidden = jnp.take_along_axis(hidden, rows.logp_at[..., None], axis=1)  # [R, T, D]
    scored = rows.logp_slot < num_slots  # the scored tokens come first
    return hidden, scored, -(-jnp.max(jnp.sum(scored, axis=1)) // chunk)


def head_logps(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    num_chunks: jax.Array,
    to_logits: Logits,
    chunk: int,
) -> jax.Array:
    """log softmax(to_logits(hidden @ head))[tokens], [R, T]; beyond `num_chunks` chunks it is 0.

    Over a mesh each device does its own rows with the slice of D that it holds of the head. Left to
    the partitioner, the head's gradient would be whole on every device, or summed over devices in
    every chunk; here a piece of V columns is gathered, gone through and its gradient scattered
    before the next: see `_pieces`.
    """

    def of_rows(hidden, head, tokens, num_chunks):
        return _chunked_logps(hidden, head, tokens, num_chunks, to_logits, chunk)

    if not _is_split():
        return of_rows(hidden, head, tokens, num_chunks)
    # It is laid out so already. But jax 0.12 adds no gradient up in place (as `train_step` does)
    # that comes straight out of the map.
    head = pin(head, P(WIDTH, P.UNCONSTRAINED))
    return jax.shard_map(
        of_rows,
        in_specs=(P(ROWS), P(WIDTH), P(ROWS), P()),
        out_specs=P(ROWS),
        axis_names=set(ROWS),
        check_vma=False,
    )(hidden, head, tokens, num_chunks)


def head_likeliest(
    hidden: jax.Array, head: jax.Array, num_chunks: jax.Array, to_logits: Logits, chunk: int
) -> jax.Array:
    """argmax(to_logits(hidden @ head)), [R, T] int32; beyond `num_chunks` chunks it is 0."""

    def of_rows(hidden, head, num_chunks):
        columns, weights = slice(0, head.shape[1]), _whole(head.astype(hidden.dtype))

        def one_chunk(i, tokens):
            logits = _logits(_chunk(hidden, i, chunk), weights, columns, to_logits)
            return _put(tokens, jnp.argmax(logits, axis=-1).astype(jnp.int32), i)

        start = jnp.zeros(hidden.shape[:2], jnp.int32)
        return jax.lax.fori_loop(0, num_chunks, one_chunk, start)

    if not _is_split():
        return of_rows(hidden, head, num_chunks)
    return jax.shard_map(
        of_rows,
        in_specs=(P(ROWS), P(WIDTH), P()),
        out_specs=P(ROWS),
        axis_names=set(ROWS),
        check_vma=False,
    )(hidden, head, num_chunks)


def _is_split() -> bool:
    """Whether rows are over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and math.prod(mesh.shape[axis] for axis in ROWS) > 1


def _pieces(num_columns: int) -> list[slice]:
    """The columns of each piece of a head: one piece where a device has them to itself.

    `tensor` splits columns too, so it leaves one piece.
    """
    if not _is_split() or jax.sharding.get_abstract_mesh().shape["tensor"] > 1:
        return [slice(0, num_columns)]
    starts = range(0, num_columns, PIECE)
    return [slice(start, min(start + PIECE, num_columns)) for start in starts]


def _at_once(*values):
    """`values`, of which nothing goes on before all are there.

    Else a compiler gathers pieces before their time, or keeps their gradients to scatter them
    together: once a step, not once a micro-batch, for all it may.
    """
    return jax.lax.optimization_barrier(values) if _is_split() else values


def _whole(slices: jax.Array) -> jax.Array:
    """[D here, columns] -> [D, columns]."""
    return jax.lax.all_gather(slices, WIDTH, axis=0, tiled=True) if _is_split() else slices


def _to_slices(sums: jax.Array) -> jax.Array:
    """[D, columns] of each device -> their sum, [D here, columns]; autodiff sums it over copies."""
    return jax.lax.psum_scatter(sums, WIDTH, tiled=True) if _is_split() else sums


def _plain_logps(hidden, head, tokens, num_chunks, to_logits, chunk) -> jax.Array:
    """`head_logps` of the rows that are here.

    The number of chunks is known at run time only, so that no chunk of filler is computed; hence
    the gradient by hand: d logp = onehot(token) - softmax, times the slope of `to_logits`. A head
    that is trained wants the logits again, when the gradient of each logp is known. Through one
    that is frozen a logp has the slope (onehot - softmax) head^T, which needs no more than the
    logits that are there: no pass but this one computes any.
    """
    return _with_totals(hidden, head, tokens, num_chunks, to_logits, chunk)[0]


_chunked_logps = jax.custom_vjp(_plain_logps, nondiff_argnums=(4, 5))


def _forward(hidden, head, tokens, num_chunks, to_logits, chunk):
    is_trained = head.perturbed
    hidden, head, tokens, num_chunks = (x.value for x in (hidden, head, tokens, num_chunks))
    if not is_trained:
        return _with_slopes(hidden, head, tokens, num_chunks, to_logits, chunk)
    logps, log_totals = _with_totals(hidden, head, tokens, num_chunks, to_logits, chunk)
    return logps, (hidden, head, tokens, num_chunks, log_totals)


def _with_totals(hidden, head, tokens, num_chunks, to_logits, chunk):
    """Returns the log-probabilities and the log-sum-exps, [R, T] each."""
    rest = head
    picked = log_totals = jnp.zeros(tokens.shape, jnp.float32)
    for columns in _pieces(head.shape[1]):
        weights = _whole(rest[:, columns].astype(hidden.dtype))  # once, outside the chunk loop

        def one_chunk(i, carry, columns=columns, weights=weights):
            picked, log_totals = carry
            logits = _logits(_chunk(hidden, i, chunk), weights, columns, to_logits)  # [R, C, .]
            here = _picked(logits, tokens, i, chunk, columns)
            log_total = jax.nn.logsumexp(logits, axis=-1)
            if columns.start:
                here += _chunk(picked, i, chunk)
                log_total = jnp.logaddexp(log_total, _chunk(log_totals, i, chunk))
            return _put(picked, here, i), _put(log_totals, log_total, i)

        picked, log_totals = jax.lax.fori_loop(0, num_chunks, one_chunk, (picked, log_totals))
        rest, picked, log_totals = _at_once(rest, picked, log_totals)
    return picked - log_totals, log_totals


def _with_slopes(hidden, head, tokens, num_chunks, to_logits, chunk):
    """Returns the log-probabilities [R, T] and their gradients with respect to `hidden`."""
    columns, weights = slice(0, head.shape[1]), _whole(head.astype(hidden.dtype))

    def one_chunk(i, carry):
        logps, slopes = carry
        logits = _logits(_chunk(hidden, i, chunk), weights, columns, to_logits)
        log_total = jax.nn.logsumexp(logits, axis=-1)
        logp = _picked(logits, tokens, i, chunk, columns) - log_total
        of_logits = _slopes_of_logits(logits, log_total, tokens, i, chunk, columns)
        of_product = to_logits.slope(logits, of_logits).astype(hidden.dtype)
        slope = _float32("rcv,dv->rcd", of_product, weights)
        return _put(logps, logp, i), _put(slopes, slope.astype(hidden.dtype), i)

    start = jnp.zeros(tokens.shape, jnp.float32), jnp.zeros_like(hidden)
    return jax.lax.fori_loop(0, num_chunks, one_chunk, start)


def _backward(to_logits, chunk, saved, grad_logps):
    if isinstance(saved, jax.Array):  # slopes
        grad_hidden = grad_logps[..., None] * saved
        return grad_hidden.astype(saved.dtype), None, None, None
    hidden, rest, tokens, num_chunks, log_totals = saved
    grad_hidden, slices = jnp.zeros(hidden.shape, jnp.float32), []
    for columns in _pieces(rest.shape[1]):
        weights = _whole(rest[:, columns].astype(hidden.dtype))

        def one_chunk(i, carry, columns=columns, weights=weights):
            grad_hidden, grad_head = carry
            x = _chunk(hidden, i, chunk)
            logits = _logits(x, weights, columns, to_logits)
            log_total = _chunk(log_totals, i, chunk)
            of_logits = _slopes_of_logits(logits, log_total, tokens, i, chunk, columns)
            grad = to_logits.slope(logits, of_logits) * _chunk(grad_logps, i, chunk)[..., None]
            grad = grad.astype(x.dtype)
            grad_x = _chunk(grad_hidden, i, chunk) + _float32("rcv,dv->rcd", grad, weights)
            return _put(grad_hidden, grad_x, i), grad_head + _float32("rcd,rcv->dv", x, grad)

        start = grad_hidden, jnp.zeros(weights.shape, jnp.float32)
        grad_hidden, grad_head = jax.lax.fori_loop(0, num_chunks, one_chunk, start)
        slices = [*slices, _to_slices(grad_head)]
        rest, grad_hidden, slices = _at_once(rest, grad_hidden, slices)
    grad_hidden, grad_head = _at_once(grad_hidden, jnp.concatenate(slices, axis=1))
    return grad_hidden.astype(hidden.dtype), grad_head, None, None


_chunked_logps.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunk(x: jax.Array, i: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _put(x: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * part.shape[1], axis=1)


def _float32(equation: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _logits(x: jax.Array, weights: jax.Array, columns: slice, to_logits: Logits) -> jax.Array:
    """[R, C, D] -> [R, C, columns] float32, padded columns far below every token."""
    product = constrain(_float32("rcd,dv->rcv", x, weights), None, None, "vocab")
    return to_logits(product, columns.start)


def _picked(
    logits: jax.Array, tokens: jax.Array, i: jax.Array, chunk: int, columns: slice
) -> jax.Array:
    """The logit of each token of a chunk, [R, C]; 0 where it is not among the columns."""
    return jnp.sum(jnp.where(_is_token(tokens, i, chunk, logits, columns), logits, 0.0), axis=-1)


def _slopes_of_logits(
    logits: jax.Array,
    log_total: jax.Array,
    tokens: jax.Array,
    i: jax.Array,
    chunk: int,
    columns: slice,
) -> jax.Array:
    """d logp / d logits = onehot(token) - softmax, [R, C, columns] float32."""
    softmax = jnp.exp(logits - log_total[..., None])
    return jnp.where(_is_token(tokens, i, chunk, logits, columns), 1.0, 0.0) - softmax


def _is_token(
    tokens: jax.Array, i: jax.Array, chunk: int, logits: jax.Array, columns: slice
) -> jax.Array:
    """[R, C, columns] bool, never materialised: fused into the sum or product that reads it."""
    return token_of(logits, columns.start) == _chunk(tokens, i, chunk)[..., None]
