"""Likelihood: of the responses alone, weighted by their scores, or beside another loss.

Axes: B prompts, K responses a prompt.
"""

import jax
import jax.numpy as jnp

from nca_jax.field import FLAG, NOT_NEGATIVE, Field, one_of
from nca_jax.losses.masked import float32_at_least, masked_sum
from nca_jax.losses.record import Fields, Loss, Responses
from nca_jax.losses.targets import targets

NLL_WEIGHT = Field(
    0.0, NOT_NEGATIVE, "of the best response's loss a token, beside the loss", since=5
)


def likelihood(responses: Responses, fields: Fields) -> jax.Array:
    """Supervised fine-tuning on each response by its share: - sum_k p_k log pi(y_k|x), [B] nats.

    p = softmax(s / alpha); alpha = 0 is the best response alone (best of K), and K = 1 is SFT.
    Where `per_token` is set each log-probability is divided by the response's length n_k; with
    `reduce` = tokens it is their sum, - sum_k p_k log pi(y_k|x) / w, that is divided by the
    prompt's tokens w = sum_k p_k n_k, its weight in the step: a mean over the tokens of the step.
    """
    p = targets(responses, fields)
    if fields.get("reduce", "prompts") == "tokens":
        total = -masked_sum(p * _logps(responses), responses.mask)
        return total / jnp.maximum(num_tokens(responses, fields), 1)
    logps = per_token(responses) if fields["per_token"] else _logps(responses)
    return -masked_sum(p * logps, responses.mask)


def num_tokens(responses: Responses, fields: Fields) -> jax.Array:
    """sum_k p_k n_k, [B]: of K = 1 the response's length."""
    p = targets(responses, fields)
    return masked_sum(p * responses.lengths.astype(p.dtype), responses.mask)


def _weight(responses: Responses, fields: Fields) -> jax.Array:
    if fields.get("reduce", "prompts") == "tokens":
        return num_tokens(responses, fields)
    return jnp.any(responses.mask, axis=-1).astype(jnp.float32)


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
        "reduce": Field(
            "prompts",
            one_of("prompts", "tokens"),
            "a step's loss is a mean over its prompts, or with per_token over its tokens",
            since=6,
        ),
    },
    reads=("scores", "lengths"),
    k=(1, None),
    soft_labels=True,
    weight=_weight,
)
