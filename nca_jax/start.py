"""What a run starts with: the state that it left or begins with, and what it is evaluated by."""

from collections.abc import Mapping, Sequence

from orbax.checkpoint import CheckpointManager

from nca_jax.axes import Params
from nca_jax.build import Run
from nca_jax.data.pipeline import HostBatch
from nca_jax.evaluators import HostLogps, fill_reference, heldout_metrics
from nca_jax.fit import Evaluator
from nca_jax.infra import checkpoint, progress
from nca_jax.params import copy_to_train, start_trained, starts_at_reference
from nca_jax.programs import Optimizer, abstract_state, start_state
from nca_jax.reference import Reference
from nca_jax.train_step import Frozen, TrainState

DROPPED = ("key",)  # leaves that older checkpoints have and nothing reads


def open_state(
    run: Run,
    optimizer: Optimizer,
    checkpoints: CheckpointManager,
    base: Params | None,
    reference: Reference,
) -> tuple[TrainState, int | None]:
    """Returns the state of the latest checkpoint and its step; else that before step 1, and None.

    A state that begins is 1. of the reference's parameters, where both start equal, 2. of
    config.model.init_from, 3. random.

    Raises:
      UserError: as `checkpoint.restore_latest` and `start_trained`.
    """
    config = run.config
    abstract, shardings = abstract_state(run, optimizer.tx)
    state = checkpoint.restore_latest(
        checkpoints,
        abstract,
        shardings,
        dropped=DROPPED,
        on_damage=config.checkpoint.on_damage,
    )
    if state is not None:
        return state, int(state.step)
    if base is None and reference.params is not None and starts_at_reference(config):
        params = copy_to_train(reference.params)
    else:
        params = start_trained(run, base)
    with progress.phase("making the optimizer's state"):
        return start_state(run, optimizer, params), None


def make_evaluators(
    run: Run,
    step_logps: HostLogps,
    frozen: Frozen,
    heldout: Mapping[str, Sequence[HostBatch]],
) -> list[Evaluator]:
    """Returns what measures each held-out split; nothing where config.eval_every is 0.

    Args:
      step_logps: from `programs.jit_step_logps`.
    """
    config, evaluators = run.config, []
    for split, batches in heldout.items() if config.eval_every else ():
        batches = fill_reference(step_logps, frozen.whole_reference(), batches)

        def measured(trained: Params, batches: Sequence[HostBatch] = batches):
            return heldout_metrics(step_logps, frozen.whole(trained), batches, config)

        measure = progress.first_call("the held-out metrics", measured)
        evaluators.append(Evaluator(split, config.eval_every, measure))
    return evaluators
