"""Likelihood: of the responses alone, weighted by their scores, or beside another loss.

Axes: B prompts, K responses a prompt.
"""

import jax
import jax.numpy as jnp

from nca_jax.field import FLAG, NOT_NEGATIVE, Field
from nca_jax.losses.masked import float32_at_least, masked_sum
from nca_jax.losses.record import Fields, Loss, Responses
from nca_jax.losses.targets import targets

NLL_WEIGHT = Field(
    0.0, NOT_NEGATIVE, "of the best response's loss a token, beside the loss", since=5
)


def likelihood(responses: Responses, fields: Fields) -> jax.Array:
    """Supervised fine-tuning on each response by its share: - sum_k p_k log pi(y_k|x), [B] nats.

    p = softmax(s / alpha); alpha = 0 is the best response alone (best of K), and K = 1 is SFT. Each
    log-probability is divided by the response's length where `per_token` is set.
    """
    p = targets(responses, fields)
    logps = per_token(responses) if fields["per_token"] else _logps(responses)
    return -masked_sum(p * logps, responses.mask)


def per_token(responses: Responses) -> jax.Array:
    """pbar, the mean log-probability of a token, end of turn included, [B, K] nats."""
    return _logps(responses) / jnp.maximum(responses.lengths, 1)


def best_nll(responses: Responses) -> jax.Array:
    """- pbar of the best response, the first of those with the highest score, [B] nats."""
    best = jnp.argmax(jnp.where(responses.mask, responses.scores, -jnp.inf), axis=-1)
    return -jnp.take_along_axis(per_token(responses), best[:, None], axis=-1)[:, 0]


def with_nll(loss: Loss) -> Loss:
    """Returns the loss with `nll_weight` * `best_nll` beside it, a field that is 0 by default.

    (Pang et al. 2024, arXiv:2404.19733; Llama 3, arXiv:2407.21783.)
    """

    def per_prompt(responses: Responses, fields: Fields) -> jax.Array:
        alone, weight = loss.per_prompt(responses, fields), float(fields.get("nll_weight", 0))
        return alone + weight * best_nll(responses) if weight else alone

    def floor(responses: Responses, fields: Fields) -> jax.Array | None:
        if fields.get("nll_weight") or loss.floor is None:
            return None
        return loss.floor(responses, fields)

    return loss._replace(
        per_prompt=per_prompt,
        floor=loss.floor and floor,
        fields={**loss.fields, "nll_weight": NLL_WEIGHT},
    )


def _logps(responses: Responses) -> jax.Array:
    """[B, K] nats, 0 where a response is absent."""
    return jnp.where(responses.mask, float32_at_least(responses.logps), 0.0)


LIKELIHOOD = Loss(
    likelihood,
    fields={
        "alpha": Field(0.0, NOT_NEGATIVE, "temperature of the scores, in their unit; 0: the best"),
        "per_token": Field(False, FLAG, "log-probabilities are divided by their lengths"),
    },
    reads=("scores", "lengths"),
    k=(1, None),
    soft_labels=True,
)
