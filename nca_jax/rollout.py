"""Sampling responses from a policy: what `generate`, `evaluate` and on-policy training share."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from nca_jax.axes import ROWS
from nca_jax.build import Run
from nca_jax.infra.mesh import put_whole
from nca_jax.programs import WIDTH_MULTIPLE, jit_sampler, prompts_at_once


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


def to_text(run: Run, ids: np.ndarray) -> str:
    """Returns a response as text: no end-of-turn token, cut at `config.generate.stop`."""
    text = run.tokenizer.decode([i for i in ids.tolist() if i not in run.eos_ids])
    stop = run.config.generate.stop
    return text.split(stop)[0] if stop else text
