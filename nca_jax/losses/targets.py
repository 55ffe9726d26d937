"""From scores to soft labels, and from log-probabilities to implicit rewards.

Axes: B prompts, K responses a prompt.
"""

import jax
import jax.numpy as jnp

from nca_jax.checks import check_same_shape
from nca_jax.losses.masked import all_if_none, float32_at_least
from nca_jax.losses.record import Fields, Responses


def targets_from_scores(
    scores: jax.Array, *, alpha: float, mask: jax.Array | None = None
) -> jax.Array:
    """Soft labels p = softmax(scores / alpha) of each row (section 3).

    The row's largest score is subtracted before the division, so any alpha > 0 that float32 has is
    safe; a config has no other. alpha = 0 is the limit: one-hot on the best response, shared evenly
    among ties.

    Args:
      scores: rewards r(x, y) in the data's own unit, [B, K].
      alpha: temperature in the scores' unit, >= 0.
      mask: responses that are there, [B, K] bool; a row needs at least one.
    Returns:
      p [B, K]; rows sum to one, absent responses get 0.
    """
    check_same_shape(scores=scores, mask=mask)
    scores, mask = float32_at_least(scores), all_if_none(mask, scores)
    best = jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=-jnp.inf)
    below = jnp.where(mask, scores - jnp.where(jnp.isfinite(best), best, 0.0), -jnp.inf)  # <= 0
    if alpha == 0:
        weights = (below == 0).astype(scores.dtype)
    else:
        weights = jnp.exp(below / alpha)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1)


def targets(responses: Responses, fields: Fields) -> jax.Array:
    """`targets_from_scores` at the loss's alpha, [B, K]; hard labels where it has none."""
    alpha = float(fields["alpha"]) if "alpha" in fields else 0.0
    return targets_from_scores(responses.scores, alpha=alpha, mask=responses.mask)


def implicit_rewards(responses: Responses, fields: Fields) -> jax.Array:
    """r = beta * (logps - ref_logps), [B, K] nats, 0 where a response is absent.

    Of a loss without a beta it is the log-ratio itself.
    """
    beta = float(fields["beta"]) if "beta" in fields else 1.0
    logratios = float32_at_least(responses.logps) - float32_at_least(responses.ref_logps)
    return beta * jnp.where(responses.mask, logratios, 0.0)


def scores_of(responses: Responses) -> jax.Array:
    """s [B, K] in their own unit, 0 where a response is absent."""
    return jnp.where(responses.mask, float32_at_least(responses.scores), 0.0)


def entropy(targets: jax.Array) -> jax.Array:
    """H(p) = - sum_k p log p, [B] nats, with 0 log 0 = 0: near 0 where alpha has collapsed."""
    p = float32_at_least(targets)
    return jnp.sum(-jax.scipy.special.xlogy(p, p), axis=-1)
