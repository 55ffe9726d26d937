"""Runs commands, some at a time, each in a folder of its own, so that any stop can be gone on from.

What is left of a task is read from its files alone. A lock in the folder is held by the command
itself: where a killed parent left one behind, the next parent waits for it. Its output goes to
stdout.log and stderr.log there, and that of training to train.log as well, which stays.
"""

import contextlib
import fcntl
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from nca_jax import signals
from nca_jax.checks import UserError
from nca_jax.files import read_json, read_lines
from nca_jax.infra.progress import duration
from nca_jax.infra.records import METRICS, RUN, is_metrics

SECONDS = 0.2  # between two looks at what is running
TRAINED = "the last checkpoint"  # in place of the file that a training run makes
GOES_ON = "the same command goes on from there"  # what a command of tasks says when it is stopped


class Task(NamedTuple):
    """Commands to run one after the other, each until the file that it makes is there."""

    name: str
    folder: Path
    steps: tuple[tuple[list[str], str], ...]  # (command, file in the folder or TRAINED)


class Running(NamedTuple):
    task: Task
    command: list[str]
    process: subprocess.Popen
    lock: IO


def commands_left(task: Task) -> list[list[str]]:
    """Returns the commands that are not done: those after the last one that is."""
    done = [
        index
        for index, (_, file) in enumerate(task.steps, start=1)
        if (is_trained(task.folder) if file == TRAINED else (task.folder / file).exists())
    ]
    return [command for command, _ in task.steps[max(done, default=0) :]]


def is_trained(workdir: Path) -> bool:
    """Whether the last step of a run has its checkpoint, which comes whole or not at all."""
    steps = _num_steps(workdir)
    return bool(steps) and (workdir / "checkpoints" / str(steps)).exists()


def run_tasks(tasks: Sequence[Task], *, jobs: int, env: dict[str, str]) -> dict[str, str]:
    """Runs what is left of every task, at most `jobs` at a time; one that breaks stops no other.

    Ctrl-C, SIGTERM and SIGHUP are passed on as SIGTERM, upon which a training run saves and stops;
    it is waited for, unless they come a second time.

    Returns:
      {name: why} of the tasks that broke: the last line that the command wrote.
    Raises:
      Interrupted: after the tasks have stopped.
    """
    waiting = [task for task in tasks if commands_left(task)]
    running: list[Running] = []
    broken: dict[str, str] = {}
    began: dict[str, float] = {}  # when the first command of a task began here
    num_before, start = len(tasks) - len(waiting), time.monotonic()
    bar = tqdm(total=len(tasks), initial=num_before, unit="run", disable=None)
    stops: list[int] = []
    with signals.caught(stops.append), bar, _stopped_at_end(running):
        while waiting or running:
            if stops:
                raise signals.Interrupted(stops[0])
            for task in list(waiting):
                if len(running) < jobs and (started := _start(task, env)):
                    waiting.remove(task)
                    running.append(started)
                    if task.name not in began:
                        began[task.name] = time.monotonic()
                        bar.write(f"{num_before + len(began)} of {len(tasks)}: {task.name} ...")
            bar.set_postfix_str("  ".join(map(_progress, running)) or "another process is at it")
            time.sleep(SECONDS)
            for now in [now for now in running if now.process.poll() is not None]:
                running.remove(now)
                now.lock.close()
                left = commands_left(now.task)
                if left and now.command not in left:
                    waiting.insert(0, now.task)
                    continue
                if left:
                    broken[now.task.name] = _reason(now)
                ended = time.monotonic()
                took, num_left = ended - began[now.task.name], len(waiting) + len(running)
                pace = (ended - start) / (len(tasks) - num_before - num_left)
                said = f", about {duration(pace * num_left)} left" if num_left else ""
                how = "broken after" if left else "done in"
                bar.write(f"{now.task.name}: {how} {duration(took)}{said}")
                bar.update()
    return broken


@contextlib.contextmanager
def _stopped_at_end(running: list[Running]) -> Iterator[None]:
    """Stops what still runs when the body ends, and waits for it."""
    try:
        yield
    finally:
        for now in running:
            now.process.terminate()
        for now in running:
            now.process.wait()


def _start(task: Task, env: dict[str, str]) -> Running | None:
    """Starts the first command that is left; None while another process works in the folder."""
    task.folder.mkdir(parents=True, exist_ok=True)
    lock = open(task.folder / "task.lock", "w")  # "lock" is the command's own
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    # None is left where another process has done it meanwhile.
    command = (commands_left(task) or [["true"]])[0]
    with open(task.folder / "stdout.log", "w") as out, open(task.folder / "stderr.log", "w") as err:
        # A session of its own: Ctrl-C reaches the parent alone, which asks its children to save.
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )
    return Running(task, command, process, lock)


def _reason(now: Running) -> str:
    """Why a command that has ended did not do its work."""
    status = now.process.returncode
    log = now.task.folder / ("stderr.log" if status else "stdout.log")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    killed = f"killed by {signal.Signals(-status).name}; " if status < 0 else ""
    return killed + (lines[-1].strip() if lines else f"exit status {status}, no word in {log}")


def _progress(now: Running) -> str:
    """Returns "name step/steps" of a training run, or the name alone."""
    path = now.task.folder / METRICS
    lines, _ = read_lines(path, is_metrics) if path.exists() else ([], [])
    step = f" {lines[-1]['step']}/{_num_steps(now.task.folder)}" if lines else ""
    return f"{now.task.name}{step}"


def _num_steps(workdir: Path) -> int | None:
    """Returns how many a run has; None where run.json does not say, which the run itself will."""
    try:
        return read_json(workdir / RUN).get("steps")
    except UserError:
        return None
