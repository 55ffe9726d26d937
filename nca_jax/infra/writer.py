"""Where metrics go: metrics.jsonl, TensorBoard, W&B, and a progress bar on a terminal."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from nca_jax.checks import UserError
from nca_jax.files import AnyPath, copy_into, is_remote, read_lines, said_lines, write_whole
from nca_jax.infra.fingerprint import text_fingerprint
from nca_jax.infra.finite import bad_metrics
from nca_jax.infra.lock import CheckHeld
from nca_jax.infra.progress import say, time_left
from nca_jax.infra.records import METRICS, is_metrics
from nca_jax.protocols import LogSection


class MetricWriter:
    """Writes `{"step": n, "split": "train" | "eval" | "eval/NAME", metric: value, ..}`.

    A resumed run cuts every record back to the restored step, so that no line is there twice and
    none is lost. Nothing can be appended on gs://: the records of such a run are in a local folder,
    and are copied whole at every `sync`. What a kill loses a resume would have cut off.
    """

    def __init__(
        self,
        workdir: AnyPath,
        log: LogSection,
        *,
        restored_step: int | None,
        num_steps: int,
        log_every: int = 1,
        check_held: CheckHeld = lambda: None,
    ):
        """Opens the records of a run.

        Args:
          workdir, log: where they are, and which there are.
          restored_step: the step after which the run goes on; None: it is new.
          num_steps: of the whole run.
          log_every: steps from one line to the next that the run had so far.
          check_held: raises where the workdir is not the run's any more; see `infra.lock`.
        """
        self._workdir, self._staging, self._check_held = workdir, None, check_held
        folder = workdir
        if is_remote(workdir):
            self._staging = tempfile.TemporaryDirectory()
            folder = Path(self._staging.name)
        kept, purge = [], 0
        if restored_step is not None:
            kept = _lines_until(workdir / METRICS, restored_step, log_every)
            purge = restored_step + 1
        write_whole(folder / METRICS, "".join(json.dumps(x) + "\n" for x in kept).encode())
        self._file = open(folder / METRICS, "a")
        self._board = _open_board(folder / "tensorboard", purge) if log.tensorboard else None
        self._wandb = _open_wandb(folder, workdir, log.wandb_project) if log.wandb_project else None
        self._bar = tqdm(
            total=num_steps,
            initial=restored_step or 0,
            unit="step",
            disable=not sys.stderr.isatty(),
        )
        self._num_steps, self._left = num_steps, time_left(num_steps)

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Writes one line.

        Raises:
          UserError: a metric is not finite, which JSON has no number for; names it. Or the file
            was removed under the run.
        """
        if bad := bad_metrics(metrics):
            raise UserError(
                f"Step {step}, {split}: {bad}. The run stops; lower optim.lr, or look "
                "at the data with nca_jax.inspect."
            )
        self._check_there()
        line = {"step": step, "split": split} | metrics
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board:
            for name, value in metrics.items():
                summary = scalar(f"{split}/{name}", value)
                self._board.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._board.flush()
        if self._wandb:
            self._wandb.log({f"{split}/{name}": x for name, x in metrics.items()}, step=step)
        left = self._left(step) if split == "train" else ""
        say(f"{split} step {step} of {self._num_steps}  {_brief(metrics)}  {left}".rstrip())

    def advance(self) -> None:
        """Counts one step on the progress bar."""
        self._bar.update()

    def sync(self) -> None:
        """Returns when every line is stored; a checkpoint must not be ahead of its metrics.

        Raises:
          UserError: the workdir was removed under the run, or another run has taken it over.
        """
        self._check_there()
        self._check_held()
        os.fsync(self._file.fileno())
        if self._staging:
            copy_into(Path(self._staging.name), self._workdir)

    def close(self) -> None:
        """Closes all records; those of a run on gs:// that has lost its workdir stay behind."""
        self._bar.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()
        self._file.close()
        if self._staging:
            with self._staging as folder:
                self._check_held()
                copy_into(Path(folder), self._workdir)

    def _check_there(self) -> None:
        """Raises UserError unless what is written goes to the file that has the name."""
        try:
            is_there = os.path.samestat(os.stat(self._file.name), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            is_there = False
        if not is_there:
            raise UserError(
                f"{self._workdir / METRICS} was removed or replaced under this run, which stops; "
                "the same command goes on from its last checkpoint, if that is there."
            )


class SilentWriter:
    """A `MetricWriter` of the processes that have the same metrics as the first, which writes."""

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None: ...

    def advance(self) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


def _lines_until(path: AnyPath, step: int, log_every: int) -> list[dict[str, Any]]:
    """Returns the lines of an earlier run up to `step`, and says what of them is lost."""
    lines, bad = read_lines(path, is_metrics) if path.exists() else ([], [])
    if bad:
        aside = path.with_name(f"{path.name}.damaged")
        write_whole(aside, path.read_bytes())
        print(f"{path} was damaged ({said_lines(bad)}) and goes on without them; it is in {aside}")
    kept = [line for line in lines if line["step"] <= step]
    last = max((line["step"] for line in kept if line["split"] == "train"), default=0)
    if last < max(1, step - step % log_every):
        print(f"{path} has lost its lines after step {last} of {step}")
    return kept


def _brief(metrics: dict[str, float]) -> str:
    names = ("loss", "accuracy_half_ties", "chosen_logp_drift", "grad_norm", "step_seconds", "mfu")
    names += ("round", "reward", "reward_best", "tied", "kl")
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)


def _open_board(folder: Path, purge: int) -> EventsWriter:
    """Opens the event file of a run in which nothing from step `purge` on counts any more.

    What is written is there after a flush. A SummaryWriter has a thread write what it is given,
    and a flush does not wait for it: a kill would lose lines that metrics.jsonl has.
    """
    folder.mkdir(exist_ok=True)
    board = EventsWriter(str(folder / "events"))
    start = SessionLog(status=SessionLog.START)
    board.write_event(Event(wall_time=time.time(), step=purge, session_log=start))
    return board


def _open_wandb(folder: Path, workdir: AnyPath, project: str):
    """Opens the W&B run of a workdir: the same on every resume, and no other workdir's."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError:
        raise UserError("config.log.wandb_project is set: pip install nca_jax[wandb].") from None
    place = os.fspath(workdir if is_remote(workdir) else workdir.resolve())
    return wandb.init(
        project=project,
        dir=str(folder),
        resume="allow",
        id=text_fingerprint(place),
        name=workdir.name,
    )
