"""Which pairs of a prompt's responses a loss of pairs sees, at any K, out of one forward pass.

Axes: B prompts, K responses a prompt; of a pair (i, j), response i is better: [B, i, j].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nca_jax.field import Field, one_of
from nca_jax.losses.masked import float32_at_least
from nca_jax.losses.record import Fields, PerPrompt, Responses

PAIRS = Field(
    "best_worst",
    one_of("best_worst", "best_each", "all"),
    "which responses make a pair: the best and the worst, the best and each, or any two",
    since=5,
)


class Side(NamedTuple):
    """The better or the worse responses of all pairs, [B, K, 1] or [B, 1, K]; 0 where absent."""

    logps: jax.Array  # log pi(y|x), nats
    logratio: jax.Array  # log pi - log pi_ref, nats
    lengths: jax.Array  # scored tokens, end of turn included, 1 at least
    scores: jax.Array

    @property
    def per_token(self) -> jax.Array:
        """The mean log-probability of a token, nats."""
        return self.logps / self.lengths


class Pair(NamedTuple):
    """All pairs of all prompts: what is computed of both is [B, K, K]."""

    better: Side
    worse: Side

    @property
    def gap(self) -> jax.Array:
        """d, the difference of the two log-ratios, nats."""
        return self.better.logratio - self.worse.logratio

    @property
    def score_gap(self) -> jax.Array:
        """How much better by score, above 0; 1 where the two are no pair."""
        gap = self.better.scores - self.worse.scores
        return jnp.where(gap > 0, gap, 1.0)


OfPair = Callable[[Pair, Fields], jax.Array]  # -> [B, K, K] nats


def is_pair(responses: Responses, pairs: str) -> jax.Array:
    """Returns which (better, worse) are a pair, [B, K, K] bool; equal scores are none.

    The best is the first of those with the highest score, the worst the last of the lowest.
    """
    scores, mask = responses.scores, responses.mask
    k = mask.shape[-1]
    found = (scores[:, :, None] > scores[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    if pairs != "all":
        best = jnp.argmax(jnp.where(mask, scores, -jnp.inf), axis=-1)  # [B]
        found &= jax.nn.one_hot(best, k, dtype=bool)[:, :, None]
    if pairs == "best_worst":
        from_last = jnp.where(mask, scores, jnp.inf)[:, ::-1]
        worst = k - 1 - jnp.argmin(from_last, axis=-1)
        found &= jax.nn.one_hot(worst, k, dtype=bool)[:, None, :]
    return found


def over_pairs(of_pair: OfPair) -> PerPrompt:
    """Returns the mean of a loss over a prompt's pairs, as `fields["pairs"]` has them.

    A prompt without a pair has loss 0, and counts as a prompt all the same.
    """

    def per_prompt(responses: Responses, fields: Fields) -> jax.Array:
        mask = responses.mask
        logps, ref_logps, scores = (
            jnp.where(mask, float32_at_least(x), 0.0)
            for x in (responses.logps, responses.ref_logps, responses.scores)
        )
        lengths = jnp.maximum(responses.lengths, 1).astype(logps.dtype)
        side = Side(logps, logps - ref_logps, lengths, scores)
        better, worse = (Side(*(jnp.expand_dims(x, axis) for x in side)) for axis in (2, 1))
        found = is_pair(responses, str(fields["pairs"]))
        total = jnp.sum(of_pair(Pair(better, worse), fields), axis=(1, 2), where=found)
        return total / jnp.maximum(jnp.sum(found, axis=(1, 2)), 1)

    return per_prompt


def floor_of_pairs(value: jax.typing.ArrayLike) -> PerPrompt:
    """Returns a floor that is one value for every prompt with a pair, and 0 without."""

    def floor(responses: Responses, fields: Fields) -> jax.Array:
        has_pair = jnp.any(is_pair(responses, str(fields["pairs"])), axis=(1, 2))
        return jnp.where(has_pair, value, 0.0)

    return floor
