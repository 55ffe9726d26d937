"""What a step reports: scalars from [B, K] log-probabilities, alike in training and evaluation.

Axes:  B prompts, K responses a prompt; a prompt without any response is an empty slot.
Ranks: 0 is the best response by score, ties in data order. A prompt with fewer than k + 1 responses
       takes no part in rank k.
"""

import jax
import jax.numpy as jnp

from nca_jax import losses

# Metrics by which the best checkpoint may be kept, and whether it is where they are highest.
IS_BETTER_HIGH = {
    "loss": False,
    "excess": False,
    "accuracy": True,
    "top1": True,
    "margin": True,
    "chosen_logp_drift": True,
}


def alignment_metrics(
    logps: jax.Array,
    ref_logps: jax.Array,
    scores: jax.Array,
    mask: jax.Array,
    *,
    loss: str,
    alpha: float,
    beta: float,
) -> dict[str, jax.Array]:
    """All metrics of a set of prompts; each is a mean over prompts, [] float32.

    Args:
      logps, ref_logps: [B, K] float32 nats.
      scores: [B, K], the data's unit.
      mask: [B, K] bool.
      loss, alpha, beta: as in the config.
    Returns:
      loss, floor, excess       nats; loss - floor is what training can still win
      start_loss                the loss that policy = reference would have
      target_entropy            nats; near 0 when alpha has made the targets one-hot
      accuracy                  mean over the others of [r_best > r_other]; chance is 1/2
      top1                      argmax r = argmax score
      margin                    r_best - mean of the others' r
      rewards/k, logps/k        implicit reward, log-probability at rank k
      logratio/k                log pi - log pi_ref at rank k, nats
      chosen_logp_drift         logratio/0: what happens to the likelihood of the best response
      max_abs_logratio          the largest |log pi - log pi_ref|, nats
    """
    targets = losses.targets_from_scores(scores, alpha=alpha, mask=mask)
    logratio = jnp.where(mask, logps - ref_logps, 0.0)
    rewards = beta * logratio
    present = jnp.any(mask, axis=-1)  # [B]

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(values, where=present) / jnp.maximum(jnp.sum(present), 1)

    loss_values = losses.LOSSES[loss](rewards, targets, mask)
    floor = losses.floor(loss, targets, mask)

    order = jnp.argsort(jnp.where(mask, -scores, jnp.inf), axis=-1, stable=True)
    by_rank = {
        name: jnp.take_along_axis(values, order, axis=-1)
        for name, values in dict(rewards=rewards, logps=logps, logratio=logratio, mask=mask).items()
    }
    r, there = by_rank["rewards"], by_rank["mask"]
    others = jnp.maximum(jnp.sum(there, axis=-1) - 1, 1)  # [B]
    beaten = jnp.sum(r[:, :1] > r[:, 1:], axis=-1, where=there[:, 1:]) / others
    rest = jnp.sum(r[:, 1:], axis=-1, where=there[:, 1:]) / others
    picked = jnp.argmax(jnp.where(there, r, -jnp.inf), axis=-1)

    metrics = {
        "loss": mean(loss_values),
        "floor": mean(floor),
        "excess": mean(loss_values - floor),
        "start_loss": mean(losses.loss_at_reference(loss, targets, mask)),
        "target_entropy": mean(losses.entropy(targets)),
        "accuracy": mean(beaten),
        "top1": mean(picked == 0),
        "margin": mean(r[:, 0] - rest),
        "chosen_logp_drift": mean(by_rank["logratio"][:, 0]),
        "max_abs_logratio": jnp.max(jnp.abs(logratio)),
    }
    for name in ("rewards", "logps", "logratio"):
        for k in range(scores.shape[1]):
            total = jnp.sum(by_rank[name][:, k], where=there[:, k])
            metrics[f"{name}/{k}"] = total / jnp.maximum(jnp.sum(there[:, k]), 1)
    return metrics
