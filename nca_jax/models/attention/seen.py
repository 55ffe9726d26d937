"""What the tokens of a packed row see: the rule of `nca_jax.batch` and a window, as places in it.

Axes: R rows, T tokens of each, Q blocks of T / Q tokens.

A window goes by positions, and so by places, as `data.pack` lays a row out: of a prompt of P tokens
that ends at place A the token at place k has position k - A + P; of a response that starts at place
A + gap the token at t has position P + t - A - gap. So these two are t - k - gap positions apart,
and two tokens of one segment t - k.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nca_jax.batch import PROMPT_SEGMENT, Rows


class Seen(NamedTuple):
    """Two stretches of keys that each token sees, [R, T] int32 places in its row.

    They are those of its prompt from `prompt` on, before `prompt_end`, and those of its segment
    from `own` on, up to itself. In a prompt the first is empty. Padding sees itself.
    """

    prompt: jax.Array
    prompt_end: jax.Array
    own: jax.Array


def seen_by_tokens(rows: Rows[jax.Array], window: int) -> Seen:
    """Returns what the tokens of rows see, keys that are off too.

    Args:
      window: positions that a query sees, its own included; 0: all.
    """
    place = _places(rows.tokens)
    in_prompt, in_response = rows.segments == PROMPT_SEGMENT, rows.segments > PROMPT_SEGMENT

    def differs(x):  # from the token before
        return jnp.diff(x, prepend=-1) != 0

    def last(there):  # where the latest one was
        return jax.lax.cummax(jnp.where(there, place, 0), axis=1)

    begins = differs(rows.segments) | differs(rows.prompt_ids)
    start, prompt_end = last(begins), last(in_prompt) + 1
    oldest = place - (window or place.size) + 1
    of_prompt = jnp.maximum(last(begins & in_prompt), oldest - (start - prompt_end))
    return Seen(
        jnp.where(in_response, of_prompt, 0),
        jnp.where(in_response, prompt_end, 0),
        jnp.where(in_prompt | in_response, jnp.maximum(start, oldest), place),
    )


def seen_by_blocks(seen: Seen, num_blocks: int) -> jax.Array:
    """Which blocks of keys some token of a block of queries sees: [R, Q, Q] bool."""
    place = _places(seen.own)
    block, of_key = place.size // num_blocks, jnp.arange(num_blocks)[None, None]

    def touched(first, last):  # [R, T], [R, T] -> [R, T, Q]
        first, last = first[..., None], last[..., None]
        return (first <= last) & (first // block <= of_key) & (of_key <= last // block)

    by_token = touched(seen.prompt, seen.prompt_end - 1) | touched(seen.own, place)
    return by_token.reshape(-1, num_blocks, block, num_blocks).any(axis=2)


def _places(x: jax.Array) -> jax.Array:
    """[R, T] -> [1, T] int32."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None]
