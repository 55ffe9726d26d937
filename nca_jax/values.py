"""From packed rows to what a reward model says of each response: its head at the last token.

Axes: R rows, T tokens, D width.
"""

import jax
import jax.numpy as jnp

from nca_jax.axes import Params
from nca_jax.batch import PROMPT_SEGMENT, Rows
from nca_jax.logprobs import sum_by_slot
from nca_jax.models.decoder import Model


def sequence_values(
    model: Model, params: Params, rows: Rows[jax.Array], *, shape: tuple[int, int], block: int
) -> jax.Array:
    """The value of every response in the rows; of a model of several labels that of the first.

    Args:
      model: of a reward model.
      rows: one micro-batch of the step, [R, T].
      shape: (B, K) of the step, which `rows.logp_slot` points into.
      block: tokens in an attention block.
    Returns:
      [B, K] float32; 0 for a response that is not in these rows.
    """
    num_slots = shape[0] * shape[1]
    hidden = model.rows(params, rows, block=block).astype(jnp.float32)
    kernel = params["score"]["kernel"][:, 0].astype(jnp.float32)
    values = jnp.einsum("rtd,d->rt", hidden, kernel)
    at_ends = rows._replace(logp_slot=_ends(rows, num_slots))
    return sum_by_slot(values, at_ends, num_slots).reshape(shape)


def _ends(rows: Rows[jax.Array], num_slots: int) -> jax.Array:
    """The slot of the response whose last token is at a place, num_slots at all others, [R, T]."""
    is_end = _goes_on_otherwise(rows.segments) | _goes_on_otherwise(rows.prompt_ids)
    is_end &= rows.segments > PROMPT_SEGMENT
    # The slots of the scored tokens are in the order in which the responses lie in the row.
    is_last = _goes_on_otherwise(rows.logp_slot) & (rows.logp_slot < num_slots)
    lasts_first = jnp.argsort(~is_last, axis=1, stable=True)
    slots = jnp.take_along_axis(rows.logp_slot, lasts_first, axis=1)
    nth = jnp.maximum(jnp.cumsum(is_end, axis=1) - 1, 0)
    return jnp.where(is_end, jnp.take_along_axis(slots, nth, axis=1), num_slots)


def _goes_on_otherwise(x: jax.Array) -> jax.Array:
    """Whether the next of a row is another one, or there is none, [R, T] bool."""
    return jnp.pad(x[:, 1:] != x[:, :-1], ((0, 0), (0, 1)), constant_values=True)
