"""Where metrics go: metrics.jsonl, TensorBoard, W&B, and a progress bar on a terminal."""

import json
import math
import os
import sys
import tempfile
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from nca_jax.checks import UserError
from nca_jax.files import AnyPath, copy_into, is_remote, write_whole
from nca_jax.infra.fingerprint import text_fingerprint
from nca_jax.protocols import LogSection

METRICS = "metrics.jsonl"


class MetricWriter:
    """Writes `{"step": n, "split": "train" | "eval", metric: value, ...}` lines.

    A resumed run cuts every record back to the restored step, so that no line is there twice and
    none is lost. Nothing can be appended on gs://: the records of such a run are in a local folder,
    and are copied whole at every `sync`. What a kill loses a resume would have cut off.
    """

    def __init__(
        self, workdir: AnyPath, log: LogSection, *, restored_step: int | None, num_steps: int
    ):
        """Opens the records of a run that goes on after `restored_step` (None: it is new)."""
        self._workdir, self._staging = workdir, None
        folder = workdir
        if is_remote(workdir):
            self._staging = tempfile.TemporaryDirectory()
            folder = Path(self._staging.name)
        kept = [] if restored_step is None else _lines_until(workdir / METRICS, restored_step)
        write_whole(folder / METRICS, "".join(kept).encode())
        self._file = open(folder / METRICS, "a")
        purge = 0 if restored_step is None else restored_step + 1
        self._board = (
            SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
            if log.tensorboard
            else None
        )
        self._wandb = _open_wandb(folder, workdir, log.wandb_project) if log.wandb_project else None
        self._bar = tqdm(
            total=num_steps,
            initial=restored_step or 0,
            unit="step",
            disable=not sys.stderr.isatty(),
        )

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Writes one line.

        Raises:
          UserError: a metric is not finite, which JSON has no number for; names it.
        """
        bad = [f"{name} is {x}" for name, x in metrics.items() if not math.isfinite(x)]
        if bad:
            raise UserError(
                f"Step {step}, {split}: {', '.join(bad)}. The run stops; lower optim.lr, or look "
                "at the data with nca_jax.inspect."
            )
        line = {"step": step, "split": split} | metrics
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board:
            for name, value in metrics.items():
                self._board.add_scalar(f"{split}/{name}", value, step)
        if self._wandb:
            self._wandb.log({f"{split}/{name}": x for name, x in metrics.items()}, step=step)
        if self._bar.disable:
            print(f"{split} step {step}  {_brief(metrics)}", flush=True)
        else:
            self._bar.set_postfix_str(f"{split} {_brief(metrics)}")

    def advance(self) -> None:
        """Counts one step on the progress bar."""
        self._bar.update()

    def sync(self) -> None:
        """Returns when every line is stored; a checkpoint must not be ahead of its metrics."""
        os.fsync(self._file.fileno())
        if self._board:
            self._board.flush()
        if self._staging:
            copy_into(Path(self._staging.name), self._workdir)

    def close(self) -> None:
        self._bar.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()
        self._file.close()
        if self._staging:
            copy_into(Path(self._staging.name), self._workdir)
            self._staging.cleanup()


class SilentWriter:
    """A `MetricWriter` of the processes that have the same metrics as the first, which writes."""

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None: ...

    def advance(self) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


def _lines_until(path: AnyPath, step: int) -> list[str]:
    """The whole lines of an earlier run up to `step`; the last may be torn by a kill."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if json.loads(line)["step"] <= step]


def _brief(metrics: dict[str, float]) -> str:
    names = ("loss", "accuracy", "chosen_logp_drift", "grad_norm", "step_seconds", "mfu")
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)


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
