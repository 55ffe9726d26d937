"""Checkpoints of a run: asynchronous, whole or absent, the last few and the best kept.

workdir/config.json     the config of the run      workdir/run.json   commit, reference, steps
workdir/checkpoints/N/  the TrainState after N updates
"""

import json
import os
import subprocess
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from nca_jax.axes import flatten_paths
from nca_jax.checks import UserError
from nca_jax.files import AnyPath, absolute, write_whole
from nca_jax.infra.mesh import param_shardings


def open_checkpoints(
    workdir: AnyPath, checkpoint, *, best_is_high: bool = True
) -> ocp.CheckpointManager:
    """Returns the manager of workdir/checkpoints, keeping what `config.checkpoint` says.

    `best_is_high` says whether `best_metric` is best where it is highest.
    """
    policies = [LatestN(checkpoint.keep_last)]
    if checkpoint.best_metric:
        policies.append(
            BestN(
                get_metric_fn=lambda metrics: metrics[checkpoint.best_metric],
                reverse=not best_is_high,
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(policies), cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(
        absolute(workdir / "checkpoints"),
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),
    )


def save(manager: ocp.CheckpointManager, state, eval_metrics: dict[str, float] | None) -> None:
    """Starts to save `state` under its step; returns once the arrays may be donated again."""
    manager.save(int(state.step), args=ocp.args.StandardSave(state), metrics=eval_metrics)


def restore(manager: ocp.CheckpointManager, step: int, abstract, shardings):
    """Returns the TrainState saved at `step`, sharded as asked whatever mesh wrote it.

    Raises:
      UserError: the checkpoint is of another model; names the arrays that differ.
    """
    saved = manager.item_metadata(step).tree
    _check_same_arrays(manager.directory, flatten_paths(saved), flatten_paths(abstract))
    target = _with_shardings(abstract, shardings)
    return manager.restore(step, args=ocp.args.StandardRestore(target))


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


def restore_params(workdir: AnyPath, abstract: dict, mesh, *, step: int = 0) -> dict:
    """Returns the params alone of a checkpoint of a run; step 0 is the latest.

    Raises:
      UserError: there is no checkpoint, or it is of another model.
    """
    folder = absolute(workdir / "checkpoints")
    path = folder / str(saved_step(workdir, step)) / "default"
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree["params"]
        _check_same_arrays(path, flatten_paths(saved), flatten_paths(abstract))
        target = {"params": _with_shardings(abstract, param_shardings(mesh, abstract))}
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        restored = checkpointer.restore(
            path,
            args=ocp.args.PyTreeRestore(
                item=target, restore_args=restore_args, partial_restore=True
            ),
        )
    return restored["params"]


def _check_same_arrays(where, saved: dict, wanted: dict) -> None:
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


def _shape(arrays: dict, path: str) -> tuple[int, ...] | str:
    return tuple(arrays[path].shape) if path in arrays else "missing"


def _with_shardings(abstract, shardings):
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def git_commit() -> str:
    """The commit of this code, "-dirty" if it was changed; without a checkout $NCA_JAX_COMMIT."""
    where = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=where,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("NCA_JAX_COMMIT", "unknown")
    return run.stdout.strip()


def write_json(path: AnyPath, content: dict) -> None:
    """Writes a JSON file that is whole or absent."""
    write_whole(path, (json.dumps(content, indent=2, default=str) + "\n").encode())
