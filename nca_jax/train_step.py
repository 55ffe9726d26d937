"""The training step: B packed prompts in micro-batches, one gradient, one update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nca_jax import losses
from nca_jax.batch import Batch
from nca_jax.logprobs import sequence_logps
from nca_jax.metrics import alignment_metrics


class TrainState(NamedTuple):
    """What a checkpoint holds; the data position is `step` alone."""

    step: jax.Array  # [] int32: updates done
    key: jax.Array  # raw random key of the run; samples taken at step s use fold_in(key, s)
    params: dict  # the policy, float32
    opt_state: optax.OptState


def make_logps(model, config, *, shape: tuple[int, int]) -> Callable:
    """Returns `logps(params, rows) -> [B, K]`: `sequence_logps` as the config has it."""

    def logps(params, rows):
        return sequence_logps(
            model,
            params,
            rows,
            shape=shape,
            block=config.data.block,
            chunk=config.loss.logits_chunk,
        )

    return logps


def make_step_logps(model, config) -> Callable:
    """Returns `step_logps(params, batch) -> [B, K]`: the whole step forward, for evaluation."""

    def step_logps(params, batch: Batch):
        logps_of = make_logps(model, config, shape=batch.scores.shape)

        def add_micro(m, total):
            return total + logps_of(params, jax.tree.map(lambda x: x[m], batch.rows))

        zeros = jnp.zeros(batch.scores.shape, jnp.float32)
        return jax.lax.fori_loop(0, batch.num_micro, add_micro, zeros)

    return step_logps


def make_train_step(
    model, tx: optax.GradientTransformation, schedule: optax.Schedule, config
) -> Callable:
    """Returns `train_step(state, ref_params, batch) -> (state, metrics)`: pure and unjitted.

    `ref_params` is None where the batch brings cached `ref_logps`. The number of micro-batches is
    known at run time only: one compiled loop runs those that hold something. Gradients and losses
    are summed in float32 and divided once by the number of prompts, so the mean over prompts is
    exact however they were packed.

    The metrics are those of `alignment_metrics` before the update, with grad_norm (before
    clipping), lr, and prompt_loss [B].
    """
    loss_of = losses.LOSSES[config.loss.name]
    alpha, beta = config.loss.alpha, config.loss.beta

    def train_step(state: TrainState, ref_params: dict | None, batch: Batch):
        logps_of = make_logps(model, config, shape=batch.scores.shape)
        targets = losses.targets_from_scores(batch.scores, alpha=alpha, mask=batch.mask)
        num_prompts = jnp.sum(jnp.any(batch.mask, axis=-1))

        def micro_loss(params, rows, ref_logps, here):
            logps = logps_of(params, rows)  # [B, K], 0 for prompts in other micro-batches
            implicit_rewards = beta * jnp.where(here[:, None], logps - ref_logps, 0.0)
            per_prompt = loss_of(implicit_rewards, targets, batch.mask)  # [B]
            return jnp.sum(per_prompt, where=here) / num_prompts, logps

        def add_micro(m, carry):
            grads, logps, ref_logps = carry
            rows = jax.tree.map(lambda x: x[m], batch.rows)
            here = batch.micro_of_prompt == m  # [B]
            if ref_params is not None:
                ref_logps = ref_logps + logps_of(ref_params, rows)
            grad_of = jax.grad(micro_loss, has_aux=True)
            micro_grads, micro_logps = grad_of(state.params, rows, ref_logps, here)
            return jax.tree.map(jnp.add, grads, micro_grads), logps + micro_logps, ref_logps

        zeros = jnp.zeros(batch.scores.shape, jnp.float32)
        start = (
            jax.tree.map(jnp.zeros_like, state.params),
            zeros,
            batch.ref_logps if ref_params is None else zeros,
        )
        grads, logps, ref_logps = jax.lax.fori_loop(0, batch.num_micro, add_micro, start)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = alignment_metrics(
            logps,
            ref_logps,
            batch.scores,
            batch.mask,
            loss=config.loss.name,
            alpha=alpha,
            beta=beta,
        )
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["lr"] = schedule(state.step)
        metrics["prompt_loss"] = loss_of(beta * (logps - ref_logps), targets, batch.mask)
        return TrainState(state.step + 1, state.key, params, opt_state), metrics

    return train_step
