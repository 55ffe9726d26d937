"""What a step reports: scalars from [B, K] log-probabilities, alike in training and evaluation.

Axes:  B prompts, K responses a prompt; a prompt without any response is an empty slot.
Ranks: 0 is the best response by score, ties in data order. A prompt with fewer than k + 1 responses
       takes no part in rank k.
"""

import jax
import jax.numpy as jnp

from nca_jax.losses import Fields, Loss, Responses, entropy, implicit_rewards
from nca_jax.losses.targets import targets

# Metrics by which the best checkpoint may be kept, and whether it is where they are highest.
IS_BETTER_HIGH = {
    "loss": False,
    "excess": False,
    "accuracy": True,
    "accuracy_half_ties": True,
    "top1": True,
    "margin": True,
    "chosen_logp_drift": True,
}


def response_rewards(
    loss: Loss, responses: Responses, fields: Fields, *, has_reference: bool
) -> jax.Array:
    """r [B, K]: implicit rewards, nats; without a reference the log-probability a token.

    Those of a reward model are beta times its values. The arguments are those of
    `alignment_metrics`.
    """
    if has_reference or _is_reward(loss, has_reference):
        return implicit_rewards(responses, fields)
    lengths = jnp.maximum(responses.lengths, 1)
    return jnp.where(responses.mask, responses.logps / lengths, 0.0)


def _is_reward(loss: Loss, has_reference: bool) -> bool:
    """Whether it is a reward model that learns: the loss wants a reference, and there is none."""
    return "ref_logps" in loss.reads and not has_reference


def prompt_weights(loss: Loss, responses: Responses, fields: Fields) -> jax.Array:
    """Returns the weight w of each prompt in the loss of a step, [B]; 0 for an empty slot.

    It depends on lengths, scores and mask alone, so it is known before any log-probability is.
    """
    present = jnp.any(responses.mask, axis=-1)
    if loss.weight is None:
        return present.astype(jnp.float32)
    return jnp.where(present, loss.weight(responses, fields), 0.0)


def alignment_metrics(
    loss: Loss, responses: Responses, fields: Fields, *, losses: jax.Array, has_reference: bool
) -> dict[str, jax.Array]:
    """All metrics of a set of prompts, [] float32.

    Those of the loss are means over prompts by the loss's own weights, the others plain means.

    Args:
      loss, fields: the loss and the hyperparameters that the config gives it.
      responses: [B, K].
      losses: `loss.per_prompt` of these responses, [B] nats.
      has_reference: whether `responses.ref_logps` are those of a reference.
    Returns:
      loss                      nats
      floor, excess             nats, where the floor is known; loss - floor is what training can
                                still win
      start_loss                the loss that policy = reference would have, where that is known
      target_entropy            nats, of a loss with soft labels; near 0 when alpha has made them
                                one-hot
      perplexity                exp of minus the log-probability a token of the best responses, all
                                tokens together; without a reference
      accuracy                  mean over the others of [r_best > r_other]; chance is 1/2
      accuracy_half_ties        the same, where r_best = r_other is half a win: 1/2 at the reference
      top1                      argmax r = argmax score
      margin                    r_best - mean of the others' r
      rewards/k                 r, the implicit reward, at rank k: beta * log(pi / pi_ref), nats; of
                                a reward model beta times its value
      logps/k                   log-probability at rank k, nats
      logratio/k                log pi - log pi_ref at rank k, nats
      chosen_logp_drift         logratio/0: what happens to the likelihood of the best response
      max_abs_logratio          the largest |log pi - log pi_ref|, nats
      max_abs_logratio_per_token  the same divided by the response's length, nats a token
      mean_logratio_per_token   log pi - log pi_ref of all tokens together, nats a token: how far
                                the policy is lifted, or lowered, as a whole
    Without a reference r is the log-probability a token, rewards/k is called logps_per_token/k, and
    what speaks of a reference (start_loss, logratio/k and the last four) is absent; where a loss
    that wants one has none, it is a reward model that learns, and what speaks of log-probabilities
    is absent too. Where K = 1 there are no others: accuracy, accuracy_half_ties, top1 and margin
    are absent.
    """
    mask, scores = responses.mask, responses.scores
    lengths = jnp.maximum(responses.lengths, 1)
    r = response_rewards(loss, responses, fields, has_reference=has_reference)
    is_reward = _is_reward(loss, has_reference)
    is_per_token = not (has_reference or is_reward)
    weights = prompt_weights(loss, responses, fields)
    present = jnp.any(mask, axis=-1)  # [B]

    def mean(values: jax.Array, weights: jax.Array = present) -> jax.Array:
        return jnp.sum(values * weights, where=present) / jnp.maximum(jnp.sum(weights), 1e-30)

    order = jnp.argsort(jnp.where(mask, -scores, jnp.inf), axis=-1, stable=True)

    def by_rank(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, order, axis=-1)

    there, ranked = by_rank(mask), by_rank(r)
    others = jnp.maximum(jnp.sum(there, axis=-1) - 1, 1)  # [B]
    beaten = jnp.sum(ranked[:, :1] > ranked[:, 1:], axis=-1, where=there[:, 1:]) / others
    tied = jnp.sum(ranked[:, :1] == ranked[:, 1:], axis=-1, where=there[:, 1:]) / others
    rest = jnp.sum(ranked[:, 1:], axis=-1, where=there[:, 1:]) / others
    picked = jnp.argmax(jnp.where(there, ranked, -jnp.inf), axis=-1)

    metrics = {"loss": mean(losses, weights)}
    floor = loss.floor(responses, fields) if loss.floor else None
    if floor is not None:
        metrics["floor"] = mean(floor, weights)
        metrics["excess"] = metrics["loss"] - metrics["floor"]
    start = loss.at_reference(responses, fields) if has_reference else None
    if start is not None:
        metrics["start_loss"] = mean(start, weights)
    if loss.soft_labels:
        metrics["target_entropy"] = mean(entropy(targets(responses, fields)))
    if scores.shape[1] > 1:
        metrics |= {
            "accuracy": mean(beaten),
            "accuracy_half_ties": mean(beaten + tied / 2),
            "top1": mean(picked == 0),
            "margin": mean(ranked[:, 0] - rest),
        }
    if is_per_token:
        of_best, num_best = (by_rank(x)[:, 0] for x in (responses.logps, responses.lengths))
        total = jnp.maximum(jnp.sum(num_best, where=present), 1)
        metrics["perplexity"] = jnp.exp(-jnp.sum(of_best, where=present) / total)
    at_ranks = {"logps_per_token" if is_per_token else "rewards": ranked}
    if not is_reward:
        at_ranks["logps"] = by_rank(responses.logps)
    if has_reference:
        logratio = jnp.where(mask, responses.logps - responses.ref_logps, 0.0)
        at_ranks["logratio"] = by_rank(logratio)
        metrics["chosen_logp_drift"] = mean(at_ranks["logratio"][:, 0])
        metrics["max_abs_logratio"] = jnp.max(jnp.abs(logratio))
        metrics["max_abs_logratio_per_token"] = jnp.max(jnp.abs(logratio) / lengths)
        total = jnp.maximum(jnp.sum(responses.lengths, where=mask), 1)
        metrics["mean_logratio_per_token"] = jnp.sum(logratio) / total
    for name, values in at_ranks.items():
        for k in range(scores.shape[1]):
            total = jnp.sum(values[:, k], where=there[:, k])
            metrics[f"{name}/{k}"] = total / jnp.maximum(jnp.sum(there[:, k]), 1)
    return metrics
