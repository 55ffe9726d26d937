"""Sampling with a key-value cache, jitted: ragged prompts, several samples of each.

Axes: N prompts, S samples a prompt, P prompt slots, T new tokens, V padded vocabulary.

Prompts are padded on the right, so slot = position inside a prompt, and new tokens go to slots P,
P + 1, ... in every row; their positions still follow the prompt's own length.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nca_jax.axes import Params
from nca_jax.models.decoder import Model

Sample = Callable[
    [Params, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]
]  # see `make_sampler`


def make_sampler(
    model: Model,
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos_ids: tuple[int, ...],
    key_off_ids: tuple[int, ...] = (),
) -> Sample:
    """Returns `sample(params, prompts, lengths, keys) -> (tokens, num_tokens)`, to be jitted.

    `prompts` [N, P] int32 with `lengths` [N] >= 1, and one random key a prompt, [N]: what is drawn
    for a prompt does not depend on its batch. `tokens` is [N, S, T] int32, `num_tokens` [N, S] is
    how many are the response, its end-of-turn token included. temperature = 0 is greedy. Nothing
    attends to the `key_off_ids` of a prompt.
    """

    def sample(
        params: Params, prompts: jax.Array, lengths: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        num_prompts, width = prompts.shape
        slot = jnp.arange(width + max_new_tokens)  # [P + T]
        caches = model.make_caches(num_prompts, width + max_new_tokens)
        positions = jnp.broadcast_to(slot[None, :width], prompts.shape)
        key_on = positions < lengths[:, None]  # [N, P]
        key_on &= ~jnp.isin(prompts, jnp.array(key_off_ids, jnp.int32))
        mask, distance = _visible(positions, positions, key_on, slot)
        attends = model.over_caches(mask, distance, jnp.int32(0))
        # The keys of a prompt are kept: what its samples may read decides how they are turned.
        most = lengths[:, None] + max_new_tokens - 1
        hidden, caches = model.hidden(params, prompts, positions, attends, caches, lengths=most)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [N, D]

        # From here on a row is one sample.
        caches = jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=x.ndim - 4), caches)
        logits = jnp.repeat(model.logits(params, last), num_samples, axis=0)  # [N * S, V]
        lengths, most, key_on = (
            jnp.repeat(x, num_samples, axis=0) for x in (lengths, most, key_on)
        )
        split = jax.vmap(lambda key: jax.random.split(key, num_samples))
        keys = split(keys).reshape(-1)  # [N * S]
        prompt_positions = jnp.repeat(positions, num_samples, axis=0)
        new = jnp.arange(max_new_tokens)
        slot_positions = jnp.concatenate(
            [prompt_positions, lengths[:, None] + new[None]], axis=1
        )  # [N * S, P + T]
        ends = jnp.array(eos_ids, jnp.int32)

        def is_running(carry):
            step, _, _, done, *_ = carry
            return (step < max_new_tokens) & ~jnp.all(done)

        def next_token(carry):
            step, logits, caches, done, tokens, num_tokens = carry
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
            token = _draw(logits, step_keys, temperature, top_p)  # [N * S]
            tokens = tokens.at[:, step].set(jnp.where(done, 0, token))
            num_tokens += ~done
            done |= jnp.any(token[:, None] == ends[None], axis=1)

            position = (lengths + step)[:, None]
            mask, distance = _visible(position, slot_positions, key_on, slot)
            mask &= (slot <= width + step)[None, None]
            attends = model.over_caches(mask, distance, width + step)
            hidden, caches = model.hidden(
                params, token[:, None], position, attends, caches, lengths=most
            )
            return step + 1, model.logits(params, hidden[:, 0]), caches, done, tokens, num_tokens

        rows = num_prompts * num_samples
        start = (
            jnp.int32(0),
            logits,
            caches,
            jnp.zeros(rows, bool),
            jnp.zeros((rows, max_new_tokens), jnp.int32),
            jnp.zeros(rows, jnp.int32),
        )
        *_, tokens, num_tokens = jax.lax.while_loop(is_running, next_token, start)
        shape = (num_prompts, num_samples)
        return tokens.reshape(*shape, max_new_tokens), num_tokens.reshape(shape)

    return sample


def _visible(
    query_positions: jax.Array, slot_positions: jax.Array, key_on: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which keys are on and lie behind the query, and how far: [rows, queries, slots] each."""
    new = slot.shape[0] - key_on.shape[1]
    in_use = jnp.pad(key_on, ((0, 0), (0, new)), constant_values=True)  # [rows, P + T]
    pad = slot.shape[0] - slot_positions.shape[1]  # before the first new token: all later slots
    slot_positions = jnp.pad(slot_positions, ((0, 0), (0, pad)), constant_values=2**30)
    distance = query_positions[:, :, None] - slot_positions[:, None]
    return in_use[:, None] & (distance >= 0), distance


def _draw(logits: jax.Array, keys: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """[rows, V] float32 -> [rows] int32."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits /= temperature
    if top_p < 1:
        # The smallest set of most likely tokens whose probabilities reach top_p.
        best_first = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(best_first, axis=-1), axis=-1)
        before = jnp.pad(before[:, :-1], ((0, 0), (1, 0)))
        least = jnp.min(jnp.where(before < top_p, best_first, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
