"""InfoNCA and NCA: contrastive losses of K responses with soft labels (arXiv:2402.05369).

Axes: B prompts, K responses a prompt.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from nca_jax.checks import check_same_shape
from nca_jax.field import NOT_NEGATIVE, POSITIVE, Field
from nca_jax.losses.masked import all_if_none, float32_at_least, masked_sum, num_responses
from nca_jax.losses.record import Fields, Loss, PerPrompt, Responses
from nca_jax.losses.targets import entropy, implicit_rewards, targets


def infonca(
    implicit_rewards: jax.Array, targets: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """InfoNCA: which of the K responses is it? A K-way classification (section 3).

        L_b = - sum_k p_bk log softmax(r_b)_k

    Only differences of r matter. The gradient is softmax(r) - p and the floor is the entropy H(p).

    Args:
      implicit_rewards: r = beta * (log pi(y|x) - log pi_ref(y|x)), [B, K].
      targets: p, rows sum to one, [B, K]. See `targets_from_scores`.
      mask: responses that are there, [B, K] bool.
    Returns:
      One loss a prompt in nats, [B]. The caller averages.
    Raises:
      ValueError: the shapes differ (they could silently broadcast).
    """
    check_same_shape(implicit_rewards=implicit_rewards, targets=targets, mask=mask)
    r, mask = float32_at_least(implicit_rewards), all_if_none(mask, targets)
    log_softmax = jax.nn.log_softmax(r, axis=-1, where=mask)
    return -masked_sum(targets * jnp.where(mask, log_softmax, 0.0), mask)


def nca(
    implicit_rewards: jax.Array, targets: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """NCA: tell data from noise, for each response on its own (section 4).

        L_b = - sum_k [ p_bk log sigmoid(r_bk) + (1/K) log sigmoid(-r_bk) ]

    A constant added to a row of r changes this loss but not `infonca`: NCA fixes the level of each
    likelihood, InfoNCA only their differences. The minimum is at r = log(K p), see `nca_floor`;
    the gradient is sigmoid(r) / K - p sigmoid(-r).

    Args, Returns, Raises: as `infonca`.
    """
    check_same_shape(implicit_rewards=implicit_rewards, targets=targets, mask=mask)
    r, mask = float32_at_least(implicit_rewards), all_if_none(mask, targets)
    r = jnp.where(mask, r, 0.0)
    noise = mask / num_responses(mask, r.dtype)  # 1/K
    return -masked_sum(targets * log_sigmoid(r) + noise * log_sigmoid(-r), mask)


def nca_floor(targets: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The least value that NCA can take, at r = log(K p); it is not 0.

        F_b = sum_k [ p log(1 + 1/(K p)) + (1/K) log(1 + K p) ],  0 log(1/0) = 0

    Hard targets: 0.9548 for K = 2, 0.6255 for K = 4.

    Args:
      targets: p [B, K], rows sum to one.
      mask: responses that are there, [B, K] bool.
    Returns:
      [B], nats.
    """
    check_same_shape(targets=targets, mask=mask)
    p, mask = float32_at_least(targets), all_if_none(mask, targets)
    k = num_responses(mask, p.dtype)  # [B, 1]
    kp = k * p
    attract = jnp.where(p > 0, p * (jnp.log1p(kp) - jnp.log(jnp.where(p > 0, kp, 1.0))), 0.0)
    return masked_sum(attract + jnp.log1p(kp) / k, mask)


# (implicit_rewards [B, K], targets [B, K], mask [B, K] or None) -> [B] nats, as `infonca`.
OfTargets = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


def with_targets(loss: OfTargets) -> PerPrompt:
    """Returns `per_prompt` of a function of (implicit_rewards, targets, mask)."""

    def per_prompt(responses: Responses, fields: Fields) -> jax.Array:
        r, p = implicit_rewards(responses, fields), targets(responses, fields)
        return loss(r, p, responses.mask)

    return per_prompt


def entropy_of_targets(responses: Responses, fields: Fields) -> jax.Array:
    """The floor of the InfoNCA family, reached where softmax(r) = p."""
    return entropy(targets(responses, fields))


def nca_floor_of_targets(responses: Responses, fields: Fields) -> jax.Array:
    """The floor of the NCA family, see `nca_floor`."""
    return nca_floor(targets(responses, fields), responses.mask)


ALPHA = Field(0.1, NOT_NEGATIVE, "temperature of the scores, in their unit; 0: hard labels")
BETA = Field(0.1, POSITIVE, "implicit reward a nat of log(policy / reference)")

INFONCA = Loss(
    with_targets(infonca),
    fields={"alpha": ALPHA, "beta": BETA},
    soft_labels=True,
    floor=entropy_of_targets,
)
NCA = Loss(
    with_targets(nca),
    fields={"alpha": ALPHA, "beta": BETA},
    soft_labels=True,
    floor=nca_floor_of_targets,
)
