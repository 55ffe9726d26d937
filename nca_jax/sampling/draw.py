"""Drawing the next token: which tokens may come, and one of them.

Axes: R rows, V padded vocabulary.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

GROUPS = 128  # of neighbouring tokens; devices that share a vocabulary hold whole ones


class How(NamedTuple):
    """How tokens are drawn.

    Attributes:
      temperature: logits are divided by it; 0 is greedy, whatever the others say.
      top_k: only so many of the likeliest tokens may come; 0: all.
      top_p: only the fewest likeliest tokens whose probabilities reach it, among those of top_k.
      min_p: only tokens at least so likely as this share of the likeliest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def allowed(logits: jax.Array, how: How) -> jax.Array:
    """[R, V] float32 -> the same at the temperature, -inf for tokens that may not come.

    Tokens as likely as the last that may come may come too.
    """
    if how.temperature == 0:
        return logits
    logits = logits / how.temperature
    kept, num = logits, logits.shape[-1]
    best_first = None
    if 0 < how.top_k < num:
        best_first = jax.lax.top_k(logits, how.top_k)[0]
        kept = jnp.where(logits >= best_first[:, -1:], kept, -jnp.inf)
    if how.top_p < 1:
        if best_first is None:
            best_first = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(best_first, axis=-1), axis=-1)
        before = jnp.pad(before[:, :-1], ((0, 0), (1, 0)))
        least = jnp.min(jnp.where(before < how.top_p, best_first, jnp.inf), axis=-1, keepdims=True)
        kept = jnp.where(logits >= least, kept, -jnp.inf)
    if how.min_p > 0:
        least = jnp.max(logits, axis=-1, keepdims=True) + math.log(how.min_p)
        kept = jnp.where(logits >= least, kept, -jnp.inf)
    return kept


def draw(logits: jax.Array, keys: jax.Array, how: How) -> jax.Array:
    """[R, V] of `allowed` and a random key a row, [R] -> [R] int32.

    One of GROUPS groups is drawn, then one of its tokens: two uniform numbers a row, where the
    largest of logits with Gumbel noise would take V of them and V logarithms.
    """
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % GROUPS)), constant_values=-jnp.inf)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    groups = weights.reshape(len(logits), GROUPS, -1)  # [R, GROUPS, tokens]
    at_group, at_token = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys).T
    group = _drawn(jnp.sum(groups, axis=-1), at_group)
    # A masked sum, not a gather: where the vocabulary is split, a group is sent and not all of it.
    is_drawn = jnp.arange(GROUPS)[None, :, None] == group[:, None, None]
    token = _drawn(jnp.sum(jnp.where(is_drawn, groups, 0), axis=1), at_token)
    return (group * groups.shape[2] + token).astype(jnp.int32)


def _drawn(weights: jax.Array, at: jax.Array) -> jax.Array:
    """[R, n] of any sum and numbers in [0, 1), [R] -> [R]: where the sum of the weights reaches it.

    Never one whose weight is 0, though sums in float32 may fall by a rounding from one to the next.
    """
    so_far = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    return jnp.argmax(so_far > at[:, None] * jnp.max(so_far, axis=-1, keepdims=True), axis=-1)
