"""Sampling with a key-value cache, jitted: ragged prompts, several samples of each.

Axes: N prompts, S samples a prompt, P prompt slots, T new tokens, V padded vocabulary.

Prompts are padded on the right, so slot = position inside a prompt, and new tokens go to slots P,
P + 1, ... in every row; their positions still follow the prompt's own length.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from nca_jax.axes import ROWS
from nca_jax.build import Run
from nca_jax.data.released import key_off_ids
from nca_jax.infra.mesh import compiler_options, param_shardings, put_whole, row_shards
from nca_jax.models.attention.cached import cached

WIDTH_MULTIPLE = 16  # prompt slots are rounded up, so that few widths are compiled


def make_generator(run: Run) -> Callable:
    """Returns `generate(params, prompts, seed) -> samples` as `config.generate` says.

    `prompts` are token ids; samples[n] holds `num_samples` int32 arrays, each with its end-of-turn
    token where it has one. A prompt's samples depend on its index and the seed, not on its batch.
    """
    how = run.config.generate
    sampler = jit_sampler(run)
    batch, rows = prompts_at_once(run), NamedSharding(run.mesh, P(ROWS))

    def generate(
        params: dict, prompts: Sequence[Sequence[int]], seed: int
    ) -> list[list[np.ndarray]]:
        width = -(-max(map(len, prompts)) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        key = jax.random.key(seed)
        samples = []
        for first in tqdm(range(0, len(prompts), batch), unit="batch", disable=None):
            now = prompts[first : first + batch]
            filled = [*now, *[now[-1]] * (batch - len(now))]  # one shape
            padded = np.stack([np.pad(ids, (0, width - len(ids))) for ids in filled])
            lengths = np.array([len(ids) for ids in filled], np.int32)
            keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(first + jnp.arange(batch))
            sampled = sampler(
                params,
                put_whole(padded.astype(np.int32), rows),
                put_whole(lengths, rows),
                keys,
            )
            tokens, sizes = jax.device_get(sampled)
            samples += [
                [tokens[n, s, : sizes[n, s]] for s in range(how.num_samples)]
                for n in range(len(now))
            ]
        return samples

    return generate


def prompts_at_once(run: Run) -> int:
    """Returns N: what `config.generate.batch_size` asks for, rounded up to fill every device."""
    how, shards = run.config.generate, row_shards(run.mesh)
    return -(-max(1, how.batch_size // how.num_samples) // shards) * shards


def jit_sampler(run: Run) -> Callable:
    """Returns `make_sampler` as `config.generate` says, jitted over the mesh."""
    how = run.config.generate
    sampler = make_sampler(
        run.model,
        num_samples=how.num_samples,
        max_new_tokens=how.max_new_tokens,
        temperature=how.temperature,
        top_p=how.top_p,
        eos_ids=run.eos_ids,
        key_off_ids=(
            key_off_ids(run.tokenizer, run.eos_ids) if run.config.data.format == "released" else ()
        ),
    )
    params = param_shardings(run.mesh, run.model.abstract_params())
    rows, everywhere = NamedSharding(run.mesh, P(ROWS)), NamedSharding(run.mesh, P())
    return jax.jit(
        sampler,
        in_shardings=(params, rows, rows, None),
        out_shardings=everywhere,
        compiler_options=compiler_options(run.mesh),
    )


def to_text(run: Run, ids: np.ndarray) -> str:
    """Returns a response as text: no end-of-turn token, cut at `config.generate.stop`."""
    text = run.tokenizer.decode([i for i in ids.tolist() if i not in run.eos_ids])
    stop = run.config.generate.stop
    return text.split(stop)[0] if stop else text


def make_sampler(
    model,
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos_ids: tuple[int, ...],
    key_off_ids: tuple[int, ...] = (),
) -> Callable:
    """Returns `sample(params, prompts, lengths, keys) -> (tokens, num_tokens)`, to be jitted.

    `prompts` [N, P] int32 with `lengths` [N] >= 1, and one random key a prompt, [N]: what is drawn
    for a prompt does not depend on its batch. `tokens` is [N, S, T] int32, `num_tokens` [N, S] is
    how many are the response, its end-of-turn token included. temperature = 0 is greedy. Nothing
    attends to the `key_off_ids` of a prompt.
    """

    def sample(params, prompts, lengths, keys):
        num_prompts, width = prompts.shape
        slot = jnp.arange(width + max_new_tokens)  # [P + T]
        cache = model.make_cache(num_prompts, width + max_new_tokens)
        positions = jnp.broadcast_to(slot[None, :width], prompts.shape)
        key_on = positions < lengths[:, None]  # [N, P]
        key_on &= ~jnp.isin(prompts, jnp.array(key_off_ids, jnp.int32))
        mask = _visible(model, positions, positions, key_on, slot)
        attend = cached(mask, jnp.int32(0))
        hidden, cache = model.hidden(params, prompts, positions, attend, cache)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [N, D]

        # From here on a row is one sample.
        rows_axis = 1 if model.scan_layers else 0
        cache = jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=rows_axis), cache)
        logits = jnp.repeat(model.logits(params, last), num_samples, axis=0)  # [N * S, V]
        lengths, key_on = (jnp.repeat(x, num_samples, axis=0) for x in (lengths, key_on))
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
            step, logits, cache, done, tokens, num_tokens = carry
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
            token = _draw(logits, step_keys, temperature, top_p)  # [N * S]
            tokens = tokens.at[:, step].set(jnp.where(done, 0, token))
            num_tokens += ~done
            done |= jnp.any(token[:, None] == ends[None], axis=1)

            position = (lengths + step)[:, None]
            mask = _visible(model, position, slot_positions, key_on, slot)
            mask &= (slot <= width + step)[None, None]
            attend = cached(mask, width + step)
            hidden, cache = model.hidden(params, token[:, None], position, attend, cache)
            return step + 1, model.logits(params, hidden[:, 0]), cache, done, tokens, num_tokens

        rows = num_prompts * num_samples
        start = (
            jnp.int32(0),
            logits,
            cache,
            jnp.zeros(rows, bool),
            jnp.zeros((rows, max_new_tokens), jnp.int32),
            jnp.zeros(rows, jnp.int32),
        )
        *_, tokens, num_tokens = jax.lax.while_loop(is_running, next_token, start)
        shape = (num_prompts, num_samples)
        return tokens.reshape(*shape, max_new_tokens), num_tokens.reshape(shape)

    return sample


def _visible(model, query_positions, slot_positions, key_on, slot) -> jax.Array:
    """[rows, queries, slots] bool: keys that are on and lie behind the query, within the window."""
    new = slot.shape[0] - key_on.shape[1]
    in_use = jnp.pad(key_on, ((0, 0), (0, new)), constant_values=True)  # [rows, P + T]
    pad = slot.shape[0] - slot_positions.shape[1]  # before the first new token: all later slots
    slot_positions = jnp.pad(slot_positions, ((0, 0), (0, pad)), constant_values=2**30)
    distance = query_positions[:, :, None] - slot_positions[:, None]
    mask = in_use[:, None] & (distance >= 0)
    if model.config.sliding_window:
        mask &= distance < model.config.sliding_window
    return mask


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
