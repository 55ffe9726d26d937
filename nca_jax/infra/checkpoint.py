"""Checkpoints of a run: asynchronous, whole or absent, the last few and the best kept.

workdir/checkpoints/N/default  the TrainState after N updates
workdir/checkpoints/N/metrics  those of an evaluation after N updates, where the best is kept
workdir/checkpoints/N/_CHECKPOINT_METADATA
                               what reading compares with: a digest of each array, the metrics
workdir/damaged/N              one that was found damaged by a run that went on from an earlier one

A checkpoint of an older version has no digests and is read without them.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    LatestN,
    PreservationPolicy,
)

from nca_jax.axes import Params, Tree, flatten_paths
from nca_jax.checks import UserError, first_few
from nca_jax.files import AnyPath, absolute, remove
from nca_jax.infra import distributed
from nca_jax.infra.fingerprint import array_digests, array_kind
from nca_jax.infra.finite import not_finite
from nca_jax.infra.mesh import param_shardings, with_shardings
from nca_jax.infra.progress import phase
from nca_jax.infra.steps import best_of, saved_step
from nca_jax.protocols import CheckpointSection

RECORD = "_CHECKPOINT_METADATA"  # orbax's file, which holds a dict of ours
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being saved

T = TypeVar("T")


class Damaged(UserError):
    """A checkpoint is not what was saved; says which file or array, and what is wrong with it."""


def open_checkpoints(
    workdir: AnyPath, checkpoint: CheckpointSection, *, best_is_high: bool = True
) -> ocp.CheckpointManager:
    """Returns the manager of workdir/checkpoints, keeping what `config.checkpoint` says.

    `best_is_high` says whether `best_metric` is best where it is highest.
    """
    policies: list[PreservationPolicy] = [LatestN(checkpoint.keep_last)]
    best = best_of(checkpoint, best_is_high=best_is_high)
    if best:
        policies.append(best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(policies),
        best_fn=best and best.value,  # it decides nothing; without one the metrics are not stored
        cleanup_tmp_directories=True,
        lightweight_initialize=True,
    )
    manager = ocp.CheckpointManager(
        absolute(workdir / "checkpoints"),
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),
    )
    with contextlib.suppress(Damaged):  # `restore_latest` says it, and reads the others' metrics
        for step in manager.all_steps():
            _read_digests(manager.directory / str(step))
        manager.reload()
    return manager


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
    manager.save(
        int(state.step),
        args=ocp.args.StandardSave(state),
        metrics=eval_metrics,
        custom_metadata={"digests": array_digests(state), "metrics": eval_metrics},
    )


def last_good(manager: ocp.CheckpointManager | None) -> str:
    """Says which checkpoint a run that stops leaves."""
    step = None if manager is None else manager.latest_step()
    if step is None:
        return "The run stops; it has no checkpoint yet."
    return f"The run stops; its last checkpoint, of step {step}, is good."


def restore_latest(
    manager: ocp.CheckpointManager,
    abstract: Tree,
    shardings: Tree,
    *,
    dropped: Collection[str] = (),
    on_damage: str,
) -> Tree | None:
    """Returns the latest TrainState that is as it was saved, as `restore`; None: none was saved.

    Args:
      on_damage: "previous": a damaged checkpoint is said and moved to workdir/damaged, so that a
        run that goes on from an earlier one may save its step again; "stop".
    Raises:
      UserError: as `restore`; a checkpoint is damaged, and `on_damage` is "stop"; or no checkpoint
        is whole, and all stay where they are.
    """
    state, damaged = None, {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            if state is None:
                state = restore(manager, step, abstract, shardings, dropped=dropped)
            else:
                _in_all(_read_digests, manager.directory / str(step))
        except Damaged as error:
            if on_damage == "stop":
                raise _to_stop(error) from None
            damaged[step] = error
    if damaged and state is None:
        raise UserError(
            f"No checkpoint is whole: {'; '.join(map(str, damaged.values()))}. Restore one from a "
            "copy, or use a new --workdir."
        )
    if damaged:
        _set_aside(manager, damaged)
    return state


def _to_stop(error: Damaged) -> UserError:
    return UserError(
        f"{error}. Remove this folder to use the one before it, or restore it from a copy."
    )


def _set_aside(manager: ocp.CheckpointManager, damaged: dict[int, Damaged]) -> None:
    """Moves damaged checkpoints to workdir/damaged, and says so."""
    folder = manager.directory.parent / "damaged"
    for step, error in damaged.items():
        aside = folder / str(step)
        print(f"{error}. It is now in {aside}.")
        if distributed.is_first():
            folder.mkdir(exist_ok=True)
            if aside.exists():  # of an earlier time
                aside.rmtree()
            (manager.directory / str(step)).rename(aside)
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")
    manager.reload()


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
      Damaged: the checkpoint is not what was saved.
      UserError: it is of another model, or not finite; names the arrays.
    """
    path = manager.directory / str(step)
    return _read(path, abstract, shardings, is_left=lambda array: array in dropped)


def restore_params(workdir: AnyPath, abstract: Params, mesh: Mesh, *, step: int = 0) -> Params:
    """Returns the params alone of a checkpoint of a run; step 0 is the latest.

    Raises:
      UserError: there is no checkpoint, or it is damaged, of another model, or not finite.
    """
    folder = absolute(workdir / "checkpoints")
    path = folder / str(saved_step(workdir, step))
    shardings = {"params": param_shardings(mesh, abstract)}

    def is_other(array: str) -> bool:
        return not array.startswith("params/")

    try:
        return _read(path, {"params": abstract}, shardings, is_left=is_other)["params"]
    except Damaged as error:
        raise _to_stop(error) from None


def _read(
    path: AnyPath, abstract: Tree, shardings: Tree, *, is_left: Callable[[str], bool]
) -> Tree:
    """Returns the arrays of `abstract` out of the checkpoint in a folder.

    Args:
      is_left: whether an array of the checkpoint that `abstract` lacks may be left there, by its
        "/" path.
    Raises:
      Damaged: the checkpoint is not what was saved.
      UserError: it has other arrays, or they are not finite; names them.
    """
    with phase(f"loading {path}"):
        tree, digests = _in_all(_read_unchecked, path, abstract, shardings, is_left)
        now = array_digests(tree) if digests else {}
        bad = not_finite(tree)
    if differ := [name for name, digest in now.items() if digest != digests[name]]:
        raise Damaged(f"{path} is damaged: {first_few(differ)} changed since it was saved")
    if bad:
        raise UserError(
            f"{path}: {bad} hold NaN or infinity. Remove this folder to use the one before it."
        )
    return tree


def _in_all(read: Callable[..., T], *args: Any) -> T:
    """Returns `read(*args)`. Raises Damaged in all processes where it does in one of them."""
    try:
        found = read(*args)
    except Damaged as error:
        found = error
    said = distributed.gather(str(found).encode() if isinstance(found, Damaged) else b"")
    problems = [one.decode() for one in said if one]
    if isinstance(found, Damaged) or problems:
        raise Damaged(problems[0])
    return found


def _read_unchecked(
    path: AnyPath, abstract: Tree, shardings: Tree, is_left: Callable[[str], bool]
) -> tuple[Tree, dict[str, str]]:
    """Returns the arrays, as far as this process holds them, and the digests of all that are there.

    It waits for no other process, so each may fail by itself.
    """
    digests = _read_digests(path)
    folder = epath.Path(path / "default")
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        with _reading(folder):
            saved = flatten_paths(handler.metadata(folder).tree)
            kinds = {name: array_kind(x) for name, x in saved.items()}
        if digests and kinds != {name: x.rpartition(" ")[0] for name, x in digests.items()}:
            raise Damaged(f"{folder} is damaged: it describes other arrays than were saved")
        wanted = flatten_paths(abstract)
        saved = {name: x for name, x in saved.items() if name in wanted or not is_left(name)}
        _check_same_arrays(path, saved, wanted)
        target = with_shardings(abstract, shardings)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)
        with _reading(folder):
            return handler.restore(folder, args=args), digests


def _read_digests(path: AnyPath) -> dict[str, str]:
    """Returns {array: kind and digest} as they were saved; empty in an older checkpoint.

    Raises:
      Damaged: these, or the metrics that the best is chosen by, are not as they were written.
    """
    with _reading(path / RECORD) as file:
        record = json.loads(file.read_text())["custom_metadata"] or {"digests": {}}
        digests = dict(record["digests"])
    with _reading(path / "metrics" / "metrics") as file:
        if file.exists():
            metrics = {name: float(x) for name, x in json.loads(file.read_text()).items()}
            if metrics != record.get("metrics", metrics):
                raise ValueError("not the metrics that were saved")
    return digests


@contextlib.contextmanager
def _reading(path: AnyPath) -> Iterator[AnyPath]:
    """Makes what goes wrong while a file or folder is read a `Damaged` that names it.

    Whatever may be in a damaged file, its readers raise what they like. One that fails leaves
    others behind, which fail later, in threads and on collection: their tracebacks say no more.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield path
    except (MemoryError, jax.errors.JaxRuntimeError):  # no fault of the file
        raise
    except Exception as error:
        cause = error.__cause__ or error
        said = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise Damaged(f"{path} is damaged ({said:.300})") from error
    sys.unraisablehook = hook


def _check_same_arrays(where: AnyPath, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    differs = [
        f"{path} is {_kind(saved, path)} there and {_kind(wanted, path)} here"
        for path in sorted(saved.keys() | wanted.keys())
        if _kind(saved, path) != _kind(wanted, path)
    ]
    if differs:
        said = first_few(differs, between="; ")
        raise UserError(f"{where} is of another model or optimizer: {said}.")


def _kind(arrays: dict[str, Any], path: str) -> str:
    return array_kind(arrays[path]) if path in arrays else "missing"
