"""Checkpoints of a run: asynchronous, whole or absent, the last few and the best kept.

workdir/checkpoints/N/default  the TrainState after N updates
workdir/checkpoints/N/metrics  those of an evaluation after N updates, where the best is kept
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    LatestN,
    PolicyCheckpointInfo,
    PreservationPolicy,
)

from nca_jax.axes import Params, Tree, flatten_paths
from nca_jax.checks import UserError
from nca_jax.files import AnyPath, absolute, remove
from nca_jax.infra.mesh import param_shardings
from nca_jax.protocols import CheckpointSection

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being saved


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


def open_checkpoints(
    workdir: AnyPath, checkpoint: CheckpointSection, *, best_is_high: bool = True
) -> ocp.CheckpointManager:
    """Returns the manager of workdir/checkpoints, keeping what `config.checkpoint` says.

    `best_is_high` says whether `best_metric` is best where it is highest.
    """
    policies, best = [LatestN(checkpoint.keep_last)], None
    if checkpoint.best_metric:
        best = Best(metric=checkpoint.best_metric, is_high=best_is_high)
        policies.append(best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(policies),
        best_fn=best and best.value,  # it decides nothing; without one the metrics are not stored
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(
        absolute(workdir / "checkpoints"),
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),
    )


class State(Protocol):
    """A `TrainState`, as far as it is looked into here."""

    @property
    def step(self) -> jax.Array: ...


def save(
    manager: ocp.CheckpointManager, state: State, eval_metrics: dict[str, float] | None
) -> None:
    """Starts to save `state` under its step; returns once the arrays may be donated again.

    Args:
      eval_metrics: of an evaluation of this state, which the best is chosen by; None without one.
    """
    manager.save(int(state.step), args=ocp.args.StandardSave(state), metrics=eval_metrics)


def remove_unfinished(workdir: AnyPath) -> None:
    """Removes what a save that failed has left: it may have failed because the disk is full."""
    for path in (workdir / "checkpoints").glob(f"*{UNFINISHED}*"):
        remove(path)


def restore(
    manager: ocp.CheckpointManager,
    step: int,
    abstract: Tree,
    shardings: Tree,
    *,
    dropped: Collection[str] = (),
) -> Tree:
    """Returns the TrainState saved at `step`, sharded as asked whatever mesh wrote it.

    Args:
      abstract, shardings: trees of shapes and dtypes, and of where they go.
      dropped: "/" paths of arrays that an older state had; where they are there they are not read.
    Raises:
      UserError: the checkpoint is of another model; names the arrays that differ.
    """
    path = manager.directory / str(step)
    return _read(path, abstract, shardings, is_left=lambda array: array in dropped)


def saved_step(workdir: AnyPath, step: int = 0) -> int:
    """Returns `step` if the run has a checkpoint of it; 0 asks for the latest.

    Raises:
      UserError: there is none; names those that are there.
    """
    folder = absolute(workdir / "checkpoints")
    steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []
    if not steps:
        raise UserError(f"{workdir} has no checkpoint; give the --workdir of a training run.")
    if step and step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has those of {steps}.")
    return step or steps[-1]


def restore_params(workdir: AnyPath, abstract: Params, mesh: Mesh, *, step: int = 0) -> Params:
    """Returns the params alone of a checkpoint of a run; step 0 is the latest.

    Raises:
      UserError: there is no checkpoint, or it is of another model.
    """
    folder = absolute(workdir / "checkpoints")
    path = folder / str(saved_step(workdir, step))
    shardings = {"params": param_shardings(mesh, abstract)}

    def is_other(array: str) -> bool:
        return not array.startswith("params/")

    return _read(path, {"params": abstract}, shardings, is_left=is_other)["params"]


def _read(
    path: AnyPath, abstract: Tree, shardings: Tree, *, is_left: Callable[[str], bool]
) -> Tree:
    """Returns the arrays of `abstract` out of the checkpoint in a folder.

    Args:
      is_left: whether an array of the checkpoint that `abstract` lacks may be left there, by its
        "/" path.
    Raises:
      UserError: the checkpoint has other arrays; names them.
    """
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = flatten_paths(checkpointer.metadata(path / "default").item_metadata.tree)
        wanted = flatten_paths(abstract)
        saved = {name: x for name, x in saved.items() if name in wanted or not is_left(name)}
        _check_same_arrays(path, saved, wanted)
        target = _with_shardings(abstract, shardings)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        return checkpointer.restore(
            path / "default",
            args=ocp.args.PyTreeRestore(
                item=target, restore_args=restore_args, partial_restore=True
            ),
        )


def _check_same_arrays(where: AnyPath, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    differs = [
        f"{path} is {_shape(saved, path)} there and {_shape(wanted, path)} here"
        for path in sorted(saved.keys() | wanted.keys())
        if _shape(saved, path) != _shape(wanted, path)
    ]
    if differs:
        more = f" and {len(differs) - 3} more" if len(differs) > 3 else ""
        raise UserError(
            f"{where} is of another model or optimizer: {'; '.join(differs[:3])}{more}."
        )


def _shape(arrays: dict[str, Any], path: str) -> tuple[int, ...] | str:
    return tuple(arrays[path].shape) if path in arrays else "missing"


def _with_shardings(abstract: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )
