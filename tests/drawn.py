"""Sampling in one call, for tests: all prompts at once, each in a lane of its own."""

import jax
import jax.numpy as jnp

from nca_jax.models.decoder import Model
from nca_jax.sampling.draw import How
from nca_jax.sampling.sampler import BLOCK, make_sampler


def sampler_of(
    model: Model,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    temperature: float = 0.0,
    eos_ids: tuple[int, ...] = (),
    key_off_ids: tuple[int, ...] = (),
    top_p: float = 1.0,
):
    """Returns `sample(params, prompts [N, P], lengths [N], keys [N]) -> Found`, jitted."""
    sampler = make_sampler(
        model,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        how=How(temperature, top_p=top_p),
        eos_ids=eos_ids,
        key_off_ids=key_off_ids,
        logps=True,
    )

    @jax.jit
    def sample(params, prompts, lengths, keys):
        num, width = prompts.shape
        lanes = sampler.empty(num, width)
        lengths = jnp.asarray(lengths)
        lanes = sampler.prefill(params, lanes, prompts, lengths, jnp.arange(num), keys)
        ended = jnp.zeros((num, num_samples), bool)
        lanes, found = sampler.decode(params, lanes, ended)
        for _ in range(max_new_tokens // BLOCK):
            lanes, found = sampler.decode(params, lanes, ended)
        return found

    return sample
