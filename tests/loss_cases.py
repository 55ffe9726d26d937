"""What the tests of losses share: the pure functions by name, and a record's answers at targets."""

import jax
import jax.numpy as jnp
import numpy as np

from nca_jax import losses
from nca_jax.losses import LOSSES, Responses

FUNCTIONS = {name: getattr(losses, name) for name in LOSSES}
PAIRS = [name for name, loss in LOSSES.items() if loss.k == (2, 2)]  # hard labels
SOFT = [name for name, loss in LOSSES.items() if "alpha" in loss.fields]  # any K, any targets


def responses_with(p, mask=None) -> Responses:
    """Returns responses at the reference whose targets are p at alpha = 1, [B, K]."""
    scores = jnp.log(p)
    zeros = jnp.zeros_like(scores)
    mask = np.ones(scores.shape, bool) if mask is None else mask
    return Responses(zeros, zeros, zeros + 1, scores, mask)


FIELDS = {"alpha": 1.0, "beta": 1.0}


def floor(name: str, p, mask=None) -> jax.Array:
    """The floor of a loss where its targets are p, [B]; p is hard for a loss of pairs."""
    return LOSSES[name].floor(responses_with(p, mask), _own(name))


def at_reference(name: str, p, mask=None) -> jax.Array:
    """The loss where policy = reference and its targets are p, [B]."""
    return LOSSES[name].at_reference(responses_with(p, mask), _own(name))


def _own(name: str) -> dict[str, float]:
    return {x: FIELDS[x] for x in LOSSES[name].fields}
