"""Alignment losses: pure functions of [B, K] arrays.

Axes:   B prompts, K responses a prompt. `mask` [B, K] bool says which responses are there (None:
        all); an absent one changes neither a loss nor a gradient, and "K" counts those present.
Units:  log-probabilities are in nats, summed (not averaged) over response tokens.
Dtypes: computed in the dtype of the input, float32 at least.
Paper:  Chen et al. 2024, arXiv:2402.05369. InfoNCA is section 3, NCA is section 4.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from nca_jax.checks import check_same_shape


def targets_from_scores(
    scores: jax.Array, *, alpha: float, mask: jax.Array | None = None
) -> jax.Array:
    """Soft labels p = softmax(scores / alpha) of each row (section 3).

    The row's largest score is subtracted before the division, so any alpha > 0 is safe. alpha = 0
    is the limit: one-hot on the best response, shared evenly among ties.

    Args:
      scores: rewards r(x, y) in the data's own unit, [B, K].
      alpha: temperature in the scores' unit, >= 0.
      mask: responses that are there, [B, K] bool; a row needs at least one.
    Returns:
      p [B, K]; rows sum to one, absent responses get 0.
    """
    check_same_shape(scores=scores, mask=mask)
    scores, mask = _float32_at_least(scores), _all_if_none(mask, scores)
    best = jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=-jnp.inf)
    below = jnp.where(mask, scores - jnp.where(jnp.isfinite(best), best, 0.0), -jnp.inf)  # <= 0
    if alpha == 0:
        weights = (below == 0).astype(scores.dtype)
    else:
        weights = jnp.exp(below / alpha)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1)


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
    r, mask = _float32_at_least(implicit_rewards), _all_if_none(mask, targets)
    log_softmax = jax.nn.log_softmax(r, axis=-1, where=mask)
    return -_masked_sum(targets * jnp.where(mask, log_softmax, 0.0), mask)


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
    r, mask = _float32_at_least(implicit_rewards), _all_if_none(mask, targets)
    r = jnp.where(mask, r, 0.0)
    noise = mask / _num_responses(mask, r.dtype)  # 1/K
    return -_masked_sum(targets * log_sigmoid(r) + noise * log_sigmoid(-r), mask)


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
    r, mask = _float32_at_least(implicit_rewards), _all_if_none(mask, targets)
    return -_masked_sum(targets * log_sigmoid(r) + (1 - targets) * log_sigmoid(-r), mask)


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


LOSSES = {
    "nca": nca,
    "infonca": infonca,
    "dpo": dpo,  # wants alpha = 0
    "pairwise_nca": pairwise_nca,  # wants alpha = 0
    "biased_nca": biased_nca,  # wants alpha = 0
}
PAIR_LOSSES = ("dpo", "pairwise_nca", "biased_nca")  # K = 2, hard targets


def entropy(targets: jax.Array) -> jax.Array:
    """H(p) = - sum_k p log p, [B] nats, with 0 log 0 = 0: near 0 where alpha has collapsed."""
    p = _float32_at_least(targets)
    return jnp.sum(-jax.scipy.special.xlogy(p, p), axis=-1)


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
    p, mask = _float32_at_least(targets), _all_if_none(mask, targets)
    k = _num_responses(mask, p.dtype)  # [B, 1]
    kp = k * p
    attract = jnp.where(p > 0, p * (jnp.log1p(kp) - jnp.log(jnp.where(p > 0, kp, 1.0))), 0.0)
    return _masked_sum(attract + jnp.log1p(kp) / k, mask)


def floor(name: str, targets: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The least value of `LOSSES[name]` at these targets, [B] nats; loss - floor is the excess."""
    if name in ("nca", "pairwise_nca"):
        return nca_floor(targets, mask)
    if name in ("infonca", "dpo"):
        return entropy(targets)
    return 2 * entropy(targets)  # biased_nca: two Bernoullis, each with entropy H(p_w)


def loss_at_reference(name: str, targets: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`LOSSES[name]` where policy = reference, [B]: 2 ln 2, or ln K for the InfoNCA family.

    A run whose first step shows anything else has a bug in tokens, masks, dtype or sharding.
    """
    num_responses = jnp.sum(_all_if_none(mask, targets), axis=-1)
    if name in ("infonca", "dpo"):
        return jnp.log(num_responses.astype(jnp.float32))
    return jnp.full(num_responses.shape, 2 * jnp.log(2.0))


def _float32_at_least(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _all_if_none(mask: jax.Array | None, like: jax.Array) -> jax.Array:
    return jnp.ones(like.shape, bool) if mask is None else mask


def _num_responses(mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, 1]; 1 for an empty row, so that nothing is divided by 0."""
    return jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1).astype(dtype)


def _masked_sum(terms: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(terms, axis=-1, where=mask)


def _check_pair(name: str, targets: jax.Array) -> None:
    if targets.shape[-1] != 2:
        raise ValueError(f"{name} wants K = 2 responses a prompt, got K = {targets.shape[-1]}.")
