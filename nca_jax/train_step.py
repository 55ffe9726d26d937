"""The training step: B packed prompts in micro-batches, one gradient, one update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from nca_jax.axes import Params, constrain_params, on_device
from nca_jax.batch import Batch, Rows
from nca_jax.infra.optim import merge_trained, split_trained
from nca_jax.logprobs import sequence_logps
from nca_jax.losses import LOSSES, Fields, Loss, Responses
from nca_jax.metrics import alignment_metrics, prompt_weights
from nca_jax.models.decoder import Model
from nca_jax.values import sequence_values


class TrainState(NamedTuple):
    """What a checkpoint holds; the data position is `step` alone."""

    step: jax.Array  # [] int32: updates done
    # Of the policy, float32: all, or its adapters. Those that optim.freeze names stay as they are.
    params: Params
    opt_state: optax.OptState


class Frozen(NamedTuple):
    """What nothing differentiates, donates or saves."""

    base: Params | None = None  # what adapters sit on; None: all parameters are trained
    # Of a reference that the step runs, but what is in `base`; None: the batch brings ref_logps, or
    # there are none.
    reference: Params | None = None

    def whole(self, params: Params) -> Params:
        """Returns parameters as a model takes them: with the base."""
        return merge_trained(params, self.base or {})

    def whole_reference(self) -> Params | None:
        """Returns `reference` so, where the step runs one."""
        return None if self.reference is None else self.whole(self.reference)


Logps = Callable[[Params, Rows[jax.Array]], jax.Array]  # of one micro-batch, -> [B, K] nats
StepLogps = Callable[[Params, Batch[jax.Array]], jax.Array]  # of a whole step, -> [B, K] nats
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Frozen, Batch[jax.Array]], tuple[TrainState, Metrics]]


def loss_of(config: ConfigDict) -> tuple[Loss, Fields]:
    """Returns the loss that a config names, and the hyperparameters that it gives it."""
    loss = LOSSES[config.loss.name]
    return loss, {name: config.loss[name] for name in loss.fields}


def responses_of(batch: Batch, logps: jax.Array, ref_logps: jax.Array | None) -> Responses:
    """Returns what a loss sees of a step; log-probabilities are 0 where there is no reference."""
    if ref_logps is None:
        ref_logps = jnp.zeros_like(logps)
    return Responses(logps, ref_logps, batch.lengths, batch.scores, batch.mask)


def make_logps(model: Model, config: ConfigDict, *, shape: tuple[int, int]) -> Logps:
    """Returns `logps(params, rows) -> [B, K]`: `sequence_logps` as the config has it.

    Of a reward model they are its values, in the place of log-probabilities.
    """

    def logps(params: Params, rows: Rows[jax.Array]) -> jax.Array:
        if model.config.num_labels:
            return sequence_values(model, params, rows, shape=shape, block=config.data.block)
        return sequence_logps(
            model,
            params,
            rows,
            shape=shape,
            block=config.data.block,
            chunk=config.loss.logits_chunk,
        )

    return logps


def make_step_logps(model: Model, config: ConfigDict) -> StepLogps:
    """Returns `step_logps(params, batch) -> [B, K]`: the whole step forward, for evaluation."""

    def step_logps(params: Params, batch: Batch[jax.Array]) -> jax.Array:
        b, k = batch.scores.shape
        logps_of = make_logps(model, config, shape=(b, k))

        def add_micro(m, total):
            return total + logps_of(params, _micro(batch, m))

        zeros = jnp.zeros(batch.scores.shape, jnp.float32)
        return jax.lax.fori_loop(0, batch.num_micro, add_micro, zeros)

    return step_logps


def make_train_step(
    model: Model, tx: optax.GradientTransformation, schedule: optax.Schedule, config: ConfigDict
) -> TrainStep:
    """Returns `train_step(state, frozen, batch) -> (state, metrics)`: pure and unjitted.

        loss = sum_b w_b L_b / sum_b w_b

    A reference in `frozen` is run beside the policy; without one the batch brings its `ref_logps`,
    or there are none. The number of micro-batches is known at run time only: one compiled loop runs
    those that hold something. Gradients and losses are summed in float32 over micro-batches that
    are already divided by the weight of the whole step, so the mean over prompts is exact however
    they were packed.

    The metrics are those of `alignment_metrics` before the update, with grad_norm (before
    clipping), lr, and prompt_loss [B].
    """
    loss, fields = loss_of(config)

    def train_step(
        state: TrainState, frozen: Frozen, batch: Batch[jax.Array]
    ) -> tuple[TrainState, Metrics]:
        b, k = batch.scores.shape
        trained, untrained = split_trained(state.params, config.optim.freeze)
        logps_of = make_logps(model, config, shape=(b, k))
        reference = frozen.whole_reference()
        zeros = jnp.zeros(batch.scores.shape, jnp.float32)
        weights = prompt_weights(loss, responses_of(batch, zeros, None), fields)  # [B]
        total_weight = jnp.sum(weights)

        # The backward pass adds to these in place, layer by layer: a micro-batch has no gradients
        # of its own beside them.
        start = constrain_params(jax.tree.map(jnp.zeros_like, trained))
        sums = jax.tree.map(jax.new_ref, start)

        def add_micro(m, carry):
            logps, ref_logps, losses = carry
            rows = _micro(batch, m)
            here = batch.micro_of_prompt == m  # [B]
            if reference is not None:
                ref_logps = ref_logps + logps_of(reference, rows)

            def micro_loss(trained: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                params = frozen.whole(merge_trained(trained, untrained))
                logps = logps_of(params, rows)  # [B, K], 0 for prompts in other micro-batches
                responses = responses_of(batch, logps, ref_logps)
                responses = responses._replace(mask=batch.mask & here[:, None])
                per_prompt = jnp.where(here, loss.per_prompt(responses, fields), 0.0)  # [B]
                return jnp.sum(weights * per_prompt) / total_weight, (logps, per_prompt)

            _, backward, of_micro = jax.vjp(micro_loss, trained, has_aux=True)
            backward.with_refs(sums)(1.0)  # pyright: ignore[reportFunctionMemberAccess]
            micro_logps, micro_losses = of_micro
            return logps + micro_logps, ref_logps, losses + micro_losses

        start = (
            zeros,
            batch.ref_logps if reference is None else zeros,
            jnp.zeros(batch.scores.shape[:1], jnp.float32),
        )
        logps, ref_logps, losses = jax.lax.fori_loop(0, batch.num_micro, add_micro, start)
        grads = jax.tree.map(jax.freeze, sums)

        # Moments in the host's memory are back there by the shardings of what the step returns.
        updates, opt_state = tx.update(grads, on_device(state.opt_state), trained)
        params = merge_trained(optax.apply_updates(trained, updates), untrained)
        metrics = alignment_metrics(
            loss,
            responses_of(batch, logps, ref_logps),
            fields,
            losses=losses,
            has_reference=ref_logps is not None,
        )
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["lr"] = schedule(state.step)
        metrics["prompt_loss"] = losses
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def _micro(batch: Batch[jax.Array], m: jax.Array) -> Rows[jax.Array]:
    """Returns micro-batch m of a step, [R, ...]."""
    return jax.tree.map(lambda x: x[m], batch.rows)
