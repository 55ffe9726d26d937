"""Which steps a run has checkpoints of, and which of them is the best."""

import dataclasses
import math
from collections.abc import Sequence

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationPolicy

from nca_jax.checks import UserError
from nca_jax.files import AnyPath, absolute, read_json
from nca_jax.protocols import CheckpointSection


@dataclasses.dataclass(kw_only=True)
class Best(PreservationPolicy):
    """Keeps the checkpoint whose metric is best, the latest of equals.

    One without this metric, or where it is not finite, is never it.
    """

    metric: str
    is_high: bool

    def value(self, metrics: dict[str, float] | None) -> float | None:
        """Returns what is highest at the best checkpoint; None for one that cannot be it."""
        value = (metrics or {}).get(self.metric, math.nan)
        return (value if self.is_high else -value) if math.isfinite(value) else None

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context
    ) -> Sequence[bool]:
        values = [self.value(one.metrics) for one in checkpoints]
        known = [(value, i) for i, value in enumerate(values) if value is not None]
        best = max(known)[1] if known else None
        return [i == best for i in range(len(checkpoints))]


def best_of(checkpoint: CheckpointSection, *, best_is_high: bool) -> Best | None:
    """Returns what `config.checkpoint` keeps the best checkpoint by; None for no metric."""
    metric = checkpoint.best_metric
    return Best(metric=metric, is_high=best_is_high) if metric else None


def saved_steps(workdir: AnyPath) -> list[int]:
    """Returns the steps of a run's checkpoints, ascending; without any it has not begun."""
    folder = absolute(workdir / "checkpoints")
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def saved_step(workdir: AnyPath, step: int = 0) -> int:
    """Returns `step` if the run has a checkpoint of it; 0 asks for the latest.

    Raises:
      UserError: there is none; names those that are there.
    """
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(f"{workdir} has no checkpoint; give the --workdir of a training run.")
    if step and step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has those of {steps}.")
    return step or steps[-1]


def best_step(workdir: AnyPath, checkpoint: CheckpointSection, *, best_is_high: bool) -> int | None:
    """Returns the step of the best checkpoint that a run has; None where none can be it.

    The arguments are those of `open_checkpoints`, which keeps it.

    Raises:
      UserError: metrics that it goes by are damaged.
    """
    best, values = best_of(checkpoint, best_is_high=best_is_high), []
    if best is None:
        return None
    for step in saved_steps(workdir):
        file = workdir / "checkpoints" / str(step) / "metrics" / "metrics"
        value = best.value(read_json(file)) if file.exists() else None
        values += [] if value is None else [(value, step)]
    return max(values)[1] if values else None
