"""Losses of all K responses at once: how their log-probabilities should follow their scores.

Axes: B prompts, K responses a prompt; a mean or a sum is over those that are there. Each function
is (responses, fields) -> [B] nats, with l = log pi(y|x) - log pi_ref(y|x), pbar = log pi(y|x) / n
the mean over a response's n tokens, end of turn included, and s the scores.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.nn import logsumexp, relu, sigmoid, softplus

from nca_jax.field import FRACTION, NOT_NEGATIVE, POSITIVE, Field
from nca_jax.losses.contrastive import BETA
from nca_jax.losses.likelihood import per_token
from nca_jax.losses.masked import masked_mean, masked_sum, pairwise
from nca_jax.losses.record import (
    OF_LOGRATIOS,
    OF_MEAN_TOKENS,
    Fields,
    Floor,
    Loss,
    PerPrompt,
    Responses,
)
from nca_jax.losses.targets import implicit_rewards, scores_of


def exo(responses: Responses, fields: Fields) -> jax.Array:
    """EXO: KL(q || p), q = softmax(beta l), p = softmax(s / alpha) (arXiv:2402.00856).

    `infonca` is the other direction up to H(p); both are least where beta l - s / alpha is the same
    for all responses.
    """
    mask = responses.mask
    log_q, log_p = (
        jax.nn.log_softmax(x, axis=-1, where=mask)
        for x in (
            implicit_rewards(responses, fields),
            scores_of(responses) / float(fields["alpha"]),
        )
    )
    apart = jnp.where(mask, log_q, 0.0) - jnp.where(mask, log_p, 0.0)
    return masked_sum(jnp.exp(jnp.where(mask, log_q, 0.0)) * apart, mask)


def rebel(responses: Responses, fields: Fields) -> jax.Array:
    """REBEL: mean over i < j of (beta (l_i - l_j) - (s_i - s_j))^2 (arXiv:2404.16767).

    Least, 0, where beta l - s is the same for all responses; the paper's eta is 1 / beta. DRO with
    its value function minimised out is this loss times a factor.
    """
    apart = implicit_rewards(responses, fields) - scores_of(responses)
    return masked_mean(pairwise(jnp.subtract, apart) ** 2, _others(responses.mask), axis=(1, 2))


def plackett_luce(responses: Responses, fields: Fields) -> jax.Array:
    """Plackett-Luce: - log of the probability that responses are drawn in the order of their scores

        sum_k [ log sum_{j >= k} e^{beta l_j} - beta l_k ],  sorted by score, ties in data order

    DPO's generalisation to rankings (arXiv:2305.18290, appendix A.3); at K = 2 it is DPO.
    """
    r, mask = implicit_rewards(responses, fields), responses.mask
    left = _not_before(responses)  # [B, k, j]
    total = logsumexp(jnp.broadcast_to(r[:, None, :], left.shape), axis=-1, where=left)
    return masked_sum(jnp.where(mask, total, 0.0) - r, mask)


def lipo(responses: Responses, fields: Fields) -> jax.Array:
    """LiPO-lambda: sum over s_i > s_j of D_ij SP(-beta (l_i - l_j)) (arXiv:2402.01878)

        D_ij = |G_i - G_j| |1 / ln(1 + t_i) - 1 / ln(1 + t_j)|,  G = 2^s - 1

    and t the rank 1, 2, .. by descending l; no gradient goes through D. G explodes for scores
    beyond a few: scale them. (Compared with a summary of the paper, which has these pairs, gains
    and ranks, and with another code of it, where the logarithm is natural too; not with its text.)
    """
    mask, r = responses.mask, implicit_rewards(responses, fields)
    rank = jnp.sum(_ranked_before(jax.lax.stop_gradient(r), mask), axis=-1) + 1  # [B, K]
    gain, discount = 2.0 ** scores_of(responses), 1 / jnp.log1p(rank)
    weight = abs(pairwise(jnp.subtract, gain) * pairwise(jnp.subtract, discount))
    terms = weight * softplus(-pairwise(jnp.subtract, r))
    return jnp.sum(terms, axis=(1, 2), where=_better(responses))


def swepo(responses: Responses, fields: Fields) -> jax.Array:
    """SWEPO: those above the mean score against all, weighted by the distance (arXiv:2412.04628)

    - log [ sum_{s > mean} e^z / sum e^z ],  z = beta l + weight |s - mean|;  0 if all are equal

    (Compared with a review of the paper, which has the two sets and the weight of those above the
    mean; neither its text, so the weight of those below, nor a code of its authors was read.)
    """
    s, mask = scores_of(responses), responses.mask
    here = mask | ~jnp.any(
        mask, axis=-1, keepdims=True
    )  # an empty prompt is as one of equal scores
    deviation = s - masked_mean(s, mask)[:, None]
    z = implicit_rewards(responses, fields) + float(fields["weight"]) * abs(deviation)
    differ = jnp.any(_better(responses), axis=(1, 2))[:, None]
    above = here & ((deviation > 0) | ~differ)  # all of them where none is above
    return logsumexp(z, axis=-1, where=here) - logsumexp(z, axis=-1, where=above)


def sppo(responses: Responses, fields: Fields) -> jax.Array:
    """SPPO: mean of (l_k - (P_k - 1/2) / beta)^2 (Wu et al. 2024, arXiv:2405.00675)

    P_k = mean over the others of sigmoid((s_k - s_j) / alpha): how often response k would win. Like
    `nca` it sees a constant added to l.
    """
    s, mask = scores_of(responses), responses.mask
    wins = sigmoid(pairwise(jnp.subtract, s) / float(fields["alpha"]))
    wanted = (masked_mean(wins, _others(mask)) - 0.5) / float(fields["beta"])
    return masked_mean((_logratios(responses) - wanted) ** 2, mask)


def una(responses: Responses, fields: Fields) -> jax.Array:
    """UNA: mean of (beta l_k - s_k)^2 (Wang et al. 2024, arXiv:2408.15339).

    `rebel` without its shift: a constant added to the scores moves the optimum. The authors' code
    (ZhichaoWang970201/UNA-UFT) compares sigmoid(beta l) with ratings in [0, 1] and sums; here
    scores are of any unit, so beta l stands as it is, as in the paper's implicit reward.
    """
    apart = implicit_rewards(responses, fields) - scores_of(responses)
    return masked_mean(apart**2, responses.mask)


def group_advantage(responses: Responses, fields: Fields) -> jax.Array:
    """GRPO's loss of a group, for whole responses (Shao et al. 2024, arXiv:2402.03300)

        - mean_k min(A_k rho_k, A_k clip(rho_k, 1 - clip, 1 + clip))
        + kl_weight mean_k (1 / rho_k - 1 + l_k)

    rho = e^l, A = (s - mean) / (std + 1e-4) with the unbiased deviation. Responses that the policy
    has not just sampled, such as those of a file, are off-policy for it.
    """
    logratios, s, mask = _logratios(responses), scores_of(responses), responses.mask
    centred = jnp.where(mask, s - masked_mean(s, mask)[:, None], 0.0)
    n = jnp.sum(mask, axis=-1)
    deviation = jnp.sqrt(masked_sum(centred**2, mask) / jnp.maximum(n - 1, 1))
    advantage = centred / (deviation[:, None] + 1e-4)
    # The smaller of the two terms, without an e^l that is clipped away and may be infinite.
    low, high = (math.log1p(x) for x in (-float(fields["clip"]), float(fields["clip"])))
    least = jnp.where(advantage >= 0, jnp.minimum(logratios, high), jnp.maximum(logratios, low))
    loss = -masked_mean(advantage * jnp.exp(least), mask)
    weight = float(fields["kl_weight"])
    return loss + weight * masked_mean(jnp.expm1(-logratios) + logratios, mask) if weight else loss


def rrhf(responses: Responses, fields: Fields) -> jax.Array:
    """RRHF: weight * sum over s_i < s_j of relu(pbar_i - pbar_j) (Yuan et al. 2023, 2304.05302).

    The paper adds the likelihood of the best response: nll_weight = 1.
    """
    wrong = relu(-pairwise(jnp.subtract, per_token(responses)))
    return float(fields["weight"]) * jnp.sum(wrong, axis=(1, 2), where=_better(responses))


def pro(responses: Responses, fields: Fields) -> jax.Array:
    """PRO: each response against those ranked after it (Song et al. 2023, arXiv:2306.17492)

        - sum_{t < K} log [ e^{T_t pbar_t} / (e^{T_t pbar_t} + sum_{j > t} e^{T_tj pbar_j}) ]

    sorted by score, ties in data order; T_tj = s_t - s_j, T_t = max_j T_tj. The paper adds the
    likelihood of the best response: nll_weight.
    """
    mask, pbar = responses.mask, per_token(responses)
    at_or_after = _not_before(responses)  # [B, t, j]
    apart = jnp.where(at_or_after, pairwise(jnp.subtract, scores_of(responses)), 0.0)
    itself = jnp.eye(mask.shape[-1], dtype=bool)[None]
    largest = jnp.max(apart, axis=-1)  # [B, t]
    z = jnp.where(itself, largest[:, :, None], apart) * pbar[:, None, :]
    total = logsumexp(z, axis=-1, where=at_or_after)
    return masked_sum(jnp.where(mask, total, 0.0) - largest * pbar, mask)


def _logratios(responses: Responses) -> jax.Array:
    """l [B, K], nats."""
    return implicit_rewards(responses, {})


def _others(mask: jax.Array) -> jax.Array:
    """Which two are there and are two, [B, K, K]."""
    return pairwise(jnp.logical_and, mask) & ~jnp.eye(mask.shape[-1], dtype=bool)[None]


def _better(responses: Responses) -> jax.Array:
    """Which of two responses has the higher score, [B, i, j]: i than j."""
    both = pairwise(jnp.logical_and, responses.mask)
    return both & pairwise(jnp.greater, responses.scores)


def _ranked_before(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Which of two is larger, or as large and first in data order, [B, k, j]: j than k."""
    first = jnp.tril(jnp.ones((mask.shape[-1],) * 2, bool), -1)[None]
    larger = pairwise(jnp.less, values) | (pairwise(jnp.equal, values) & first)
    return larger & pairwise(jnp.logical_and, mask)


def _not_before(responses: Responses) -> jax.Array:
    """Which are ranked at or after each by score, ties in data order, [B, k, j]: j after k."""
    both = pairwise(jnp.logical_and, responses.mask)
    return both & ~_ranked_before(responses.scores, responses.mask)


def _zero(responses: Responses, fields: Fields) -> jax.Array:
    return jnp.zeros(responses.mask.shape[:1])


def _record(
    per_prompt: PerPrompt,
    reads: tuple[str, ...] = OF_LOGRATIOS,
    floor: Floor | None = _zero,
    **fields: Field,
) -> Loss:
    return Loss(per_prompt, fields, reads=reads, floor=floor)


new = functools.partial(Field, since=5)

# By the name that a config gives them, each with its own fields.
LOSSES_OF_LISTS = {
    "exo": _record(
        exo, beta=BETA, alpha=new(1.0, POSITIVE, "temperature of the scores, in their unit")
    )._replace(soft_labels=True),
    "rebel": _record(rebel, beta=new(1.0, POSITIVE, "units of score a nat of log-ratio")),
    "plackett_luce": _record(plackett_luce, beta=BETA),
    "lipo": _record(lipo, beta=new(0.05, POSITIVE, "implicit reward a nat of log-ratio")),
    "swepo": _record(
        swepo, beta=BETA, weight=new(1.0, NOT_NEGATIVE, "nats a unit of score from the mean")
    ),
    "sppo": _record(
        sppo,
        beta=new(0.001, POSITIVE, "chance of winning a nat of log-ratio"),
        alpha=new(1.0, POSITIVE, "temperature of score differences, in their unit"),
    ),
    "una": _record(una, beta=new(0.1, POSITIVE, "units of score a nat of log-ratio")),
    "group_advantage": _record(
        group_advantage,
        floor=None,
        clip=new(0.2, FRACTION, "how far from 1 the ratio of probabilities still counts"),
        kl_weight=new(0.0, NOT_NEGATIVE, "of the estimate of the KL divergence"),
    ),
    "rrhf": _record(rrhf, OF_MEAN_TOKENS, weight=new(1.0, NOT_NEGATIVE, "of the ranking")),
    "pro": _record(pro, OF_MEAN_TOKENS, None),
}
