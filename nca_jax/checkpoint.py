"""Checkpoints of a run: asynchronous, whole or absent, the last few and the best kept.

workdir/config.json     the config of the run      workdir/run.json   commit, reference
workdir/checkpoints/N/  the TrainState after N updates
"""

import json
import subprocess
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from nca_jax.axes import flatten_paths
from nca_jax.checks import UserError


def open_checkpoints(workdir: Path, checkpoint) -> ocp.CheckpointManager:
    """Returns the manager of workdir/checkpoints, keeping what `config.checkpoint` says."""
    policies = [LatestN(checkpoint.keep_last)]
    if checkpoint.keep_best:
        policies.append(
            BestN(
                get_metric_fn=lambda metrics: metrics[checkpoint.best_metric],
                reverse=checkpoint.best_mode == "min",
                n=checkpoint.keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(policies), cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, state, eval_metrics: dict[str, float] | None) -> None:
    """Starts to save `state` under its step; returns once the arrays may be donated again."""
    manager.save(int(state.step), args=ocp.args.StandardSave(state), metrics=eval_metrics)


def restore(manager: ocp.CheckpointManager, step: int, abstract, shardings):
    """Returns the TrainState saved at `step`, sharded as asked whatever mesh wrote it.

    Raises:
      UserError: the checkpoint is of another model; names the arrays that differ.
    """
    saved = {
        path: tuple(x.shape) for path, x in flatten_paths(manager.item_metadata(step).tree).items()
    }
    wanted = {path: tuple(x.shape) for path, x in flatten_paths(abstract).items()}
    differs = [
        f"{path} is {saved.get(path, 'missing')} there and {wanted.get(path, 'missing')} here"
        for path in sorted(saved.keys() | wanted.keys())
        if saved.get(path) != wanted.get(path)
    ]
    if differs:
        raise UserError(
            f"{manager.directory} is of another model or optimizer: {'; '.join(differs[:3])}"
            f"{f' and {len(differs) - 3} more' if len(differs) > 3 else ''}."
        )
    target = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    return manager.restore(step, args=ocp.args.StandardRestore(target))


def git_commit() -> str:
    """The commit of this code, "-dirty" if it was changed, or "unknown" outside a checkout."""
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
        return "unknown"
    return run.stdout.strip()


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file that is whole or absent."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n")
    partial.replace(path)
