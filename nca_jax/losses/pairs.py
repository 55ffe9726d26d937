"""Losses of pairs: K = 2, and the label is hard.

Axes: B prompts, K responses a prompt.
"""

import jax
from jax.nn import log_sigmoid

from nca_jax.checks import check_same_shape
from nca_jax.losses.contrastive import (
    BETA,
    entropy_of_targets,
    infonca,
    log_k,
    nca,
    nca_floor_of_targets,
    two_log_2,
    with_targets,
)
from nca_jax.losses.masked import all_if_none, float32_at_least, masked_sum
from nca_jax.losses.record import Fields, Loss, Responses


def dpo(
    implicit_rewards: jax.Array, targets: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """DPO, -log sigmoid(r_w - r_l): `infonca` at K = 2 with hard targets (section 3)."""
    _check_pair("dpo", targets)
    return infonca(implicit_rewards, targets, mask)


def pairwise_nca(
    implicit_rewards: jax.Array, targets: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Pairwise NCA: `nca` at K = 2 with hard targets (section 4).

    L_b = - log sigmoid(r_w) - 0.5 log sigmoid(-r_w) - 0.5 log sigmoid(-r_l)
    """
    _check_pair("pairwise_nca", targets)
    return nca(implicit_rewards, targets, mask)


def biased_nca(
    implicit_rewards: jax.Array, targets: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """The released code's biasedNCA for pairs: raise the winner, lower only the loser.

        L_b = - log sigmoid(r_w) - log sigmoid(-r_l)

    With soft targets each response counts by its own weight: p_k for raising, 1 - p_k for lowering.

    Args, Returns: as `infonca`, with K = 2 and no absent response.
    Raises:
      ValueError: K is not 2, or the shapes differ.
    """
    check_same_shape(implicit_rewards=implicit_rewards, targets=targets, mask=mask)
    _check_pair("biased_nca", targets)
    r, mask = float32_at_least(implicit_rewards), all_if_none(mask, targets)
    return -masked_sum(targets * log_sigmoid(r) + (1 - targets) * log_sigmoid(-r), mask)


def _check_pair(name: str, targets: jax.Array) -> None:
    if targets.shape[-1] != 2:
        raise ValueError(f"{name} wants K = 2 responses a prompt, got K = {targets.shape[-1]}.")


def _biased_nca_floor(responses: Responses, fields: Fields) -> jax.Array:
    """Two Bernoullis, each with entropy H(p_w): 0 unless the two are tied."""
    return 2 * entropy_of_targets(responses, fields)


DPO = Loss(
    with_targets(dpo),
    fields={"beta": BETA},
    k=(2, 2),
    floor=entropy_of_targets,
    at_reference=log_k,
)
PAIRWISE_NCA = Loss(
    with_targets(pairwise_nca),
    fields={"beta": BETA},
    k=(2, 2),
    floor=nca_floor_of_targets,
    at_reference=two_log_2,
)
BIASED_NCA = Loss(
    with_targets(biased_nca),
    fields={"beta": BETA},
    k=(2, 2),
    floor=_biased_nca_floor,
    at_reference=two_log_2,
)
