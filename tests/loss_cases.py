"""What the tests of losses share: those of the paper as functions of implicit rewards and targets.

NAMES are all losses that the released code has; of them SOFT are of K responses and any targets,
PAIRS of two, with a hard label.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nca_jax import losses
from nca_jax.losses import LOSSES, Responses

SOFT = ["nca", "infonca"]
PAIRS = ["dpo", "pairwise_nca", "biased_nca"]
NAMES = [*SOFT, *PAIRS]


def responses_with(p, mask=None, r=None, *, scores=jnp.log) -> Responses:
    """Returns responses whose implicit rewards are r (None: 0) and whose targets are p, [B, K]."""
    p = jnp.asarray(p)
    zeros = jnp.zeros_like(p)
    mask = np.ones(p.shape, bool) if mask is None else mask
    return Responses(zeros if r is None else jnp.asarray(r), zeros, zeros + 1, scores(p), mask)


def own_fields(name: str) -> dict:
    """Returns the fields of a loss: alpha and beta are 1, the others their defaults."""
    loss = LOSSES[name]
    return loss.defaults(**{x: 1.0 for x in ("alpha", "beta") if x in loss.fields})


def of_pair(name: str, r, p, mask=None) -> jax.Array:
    """The loss of pairs with rewards r, of which the one with p = 1 is the better, [B]."""
    given = responses_with(p, mask, r, scores=lambda p: p)
    return LOSSES[name].per_prompt(given, own_fields(name))


FUNCTIONS = {"nca": losses.nca, "infonca": losses.infonca} | {
    name: functools.partial(of_pair, name) for name in PAIRS
}


def floor(name: str, p, mask=None) -> jax.Array:
    """The floor of a loss where its targets are p, [B]; p is hard for a loss of pairs."""
    return LOSSES[name].floor(responses_with(p, mask), own_fields(name))


def at_reference(name: str, p, mask=None) -> jax.Array:
    """The loss where policy = reference and its targets are p, [B]."""
    return LOSSES[name].at_reference(responses_with(p, mask), own_fields(name))
