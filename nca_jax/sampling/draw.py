"""Drawing the next token: which tokens may come, and one of them.

Axes: R rows, V padded vocabulary.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


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
    """[R, V] of `allowed` and a random key a row, [R] -> [R] int32."""
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
