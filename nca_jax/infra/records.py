"""What a workdir says of its run beside checkpoints: run.json, and the lines of metrics.jsonl.

run.json holds what a run depends on beside its config (`DEPENDS`), which a resume must find again,
and
    commit     of the code that began the run
    commits    of the code of the start and of every resume, in order; one that follows itself once
    jax        its versions, likewise
    early_stop the step after which the run ended by config.eval_patience, if it has
    more_steps [{"from": step, "steps": N}, ...], of each extension by --more_steps=N; "steps" are
               those without
    best_step  of the best checkpoint when the run ended or stopped, where one is kept

A run has begun once it has a checkpoint. What is there without one is of a run that was stopped
before, and means nothing.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import jax

from nca_jax.checks import UserError
from nca_jax.files import AnyPath, as_path, read_json, write_json
from nca_jax.infra import distributed
from nca_jax.infra.fingerprint import PACKAGE

RUN, METRICS = "run.json", "metrics.jsonl"

# {key: what it is, and where a user changes it}. An older run.json has some of them, and those that
# it lacks are not compared.
DEPENDS = {
    "base": "base of the adapters (config.model.init_from, config.lora.base_dtype)",
    "reference": "reference (config.reference, config.model.init_from)",
    "tokenizer": "tokenizer or its chat template (config.data.tokenizer)",
    "eos_ids": "ids that end a turn (of model and tokenizer)",
    "date": "date that a chat template writes",
    "records": "training records (config.data.files)",
    "prompts": "prompts of the rounds (--prompts)",
    "scorer": "scorer of the rounds (--scorer)",
    "heldout": "held-out records (config.data.eval_files, eval_fraction)",
    "score_unit": "unit of the scores (config.data.score_unit, or the training records)",
    "steps": "steps (config.steps, epochs)",
}
KINDS = {  # else str
    "commit": str,
    "commits": list,
    "jax": list,
    "score_unit": float,
    "steps": int,
    "eos_ids": list,
    "early_stop": int,
    "more_steps": list,
    "best_step": int,
}


def record_run(workdir: AnyPath, began: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """Adds a start or a resume to run.json, which process 0 writes and all of them check.

    Args:
      began: what `read_run` gave, of a run that has begun.
      now: {key of DEPENDS: its value}, of this start.
    Returns:
      What is to be said: the code or JAX is another than that which began the run.
    Raises:
      UserError: the run depends on something that has changed; names all, and nothing is written.
    """
    began = {x: v for x, v in (began or {}).items() if x != "early_stop"}  # it may go on now
    _check_same(workdir, began, now)
    versions, notes = {"commits": git_commit(), "jax": jax.__version__}, []
    history = {}
    for name, version in versions.items():
        known = began.get(name, [])
        history[name] = known if known[-1:] == [version] else [*known, version]
        if version != history[name][0]:
            what = {"commits": "commit", "jax": "JAX"}[name]
            notes.append(f"this run began with {what} {history[name][0]}; this is {version}")
    if distributed.is_first():
        run = began | now | {"commit": history["commits"][0]} | history
        write_json(workdir / RUN, run)
    return notes


def _check_same(workdir: AnyPath, began: dict[str, Any], now: dict[str, Any]) -> None:
    differs = [
        f"{words}: {began[name]} there, {now[name]} here"
        for name, words in DEPENDS.items()
        if name in began and name in now and began[name] != now[name]
    ]
    if differs:
        raise UserError(
            f"{workdir} holds a run that began with something else ({'; '.join(differs)}); restore "
            "that, or use a new --workdir."
        )


def check_known(workdir: str, now: dict[str, Any]) -> None:
    """Raises UserError where a run in a workdir depends on something else than `now` has of it."""
    _check_same(as_path(workdir), known_run(workdir), now)


def read_run(workdir: AnyPath) -> dict[str, Any]:
    """Returns run.json of a run that has begun.

    One that was written before there was `commits` knows a single commit, and says "cached" of
    every cached reference, which tells nothing and is left out.

    Raises:
      UserError: it is not there, or damaged.
    """
    path = workdir / RUN
    run = read_json(path)
    wrong = [
        name
        for name in {"commit", "steps"} | run.keys()
        if not isinstance(run.get(name), KINDS.get(name, str))
    ]
    if wrong:
        raise UserError(
            f"{path} is damaged ({', '.join(sorted(wrong))}); restore it, or use a new --workdir."
        )
    return {"commits": [run["commit"]]} | {x: v for x, v in run.items() if v != "cached"}


def note_early_stop(workdir: AnyPath, step: int) -> None:
    """Writes into run.json after which step a run has ended early."""
    write_json(workdir / RUN, read_json(workdir / RUN) | {"early_stop": step})


def extended(began: dict[str, Any] | None, saved: int, more_steps: int) -> list[dict[str, int]]:
    """Returns the extensions of a run, as run.json has them, with that of --more_steps=N.

    The one that is under way goes on: the same command is the one to start again.

    Args:
      began: what `read_run` gave, of a run that has begun.
      saved: the step of its latest checkpoint.
      more_steps: N; 0: none is asked for.
    Raises:
      UserError: there is no run to extend, or it has not finished.
    """
    known = (began or {}).get("more_steps", [])
    if not more_steps:
        return known
    asked = f"--more_steps={more_steps}"
    if more_steps < 0:
        raise UserError(f"{asked}: wanted a whole number of at least 1.")
    if began is None:
        raise UserError(f"{asked} extends a run that has finished; there is none in --workdir.")
    total = began["steps"] + sum(one["steps"] for one in known)
    if saved >= total:
        return [*known, {"from": total, "steps": more_steps}]
    if known and known[-1]["steps"] == more_steps:
        return known
    how = (
        "It ended early: raise config.eval_patience, and it goes on."
        if began.get("early_stop") == saved
        else "Let it finish first: the same command without --more_steps."
    )
    raise UserError(
        f"{asked} extends a run that has finished; this one is at step {saved} of {total}. {how}"
    )


def note_best(workdir: AnyPath, step: int | None) -> None:
    """Writes into run.json which step the best checkpoint is of; None: there is none."""
    if step is not None:
        write_json(workdir / RUN, read_json(workdir / RUN) | {"best_step": step})


def known_run(workdir: str) -> dict[str, Any]:
    """Returns `read_run`, or nothing where there is no run.json, or for ""."""
    folder = as_path(workdir)
    return read_run(folder) if workdir and (folder / RUN).exists() else {}


def date_of(workdir: str) -> str:
    """Returns the date that a run's chat templates write; "" where none is known."""
    return known_run(workdir).get("date", "")


def score_unit_of(workdir: str) -> float | None:
    """Returns what a run divides scores by; None where none is known."""
    return known_run(workdir).get("score_unit")


def is_metrics(line: dict[str, Any]) -> bool:
    """Whether an object is a line of metrics.jsonl."""
    numbers = [value for name, value in line.items() if name != "split"]
    is_kind = isinstance(line.get("step"), int) and isinstance(line.get("split"), str)
    return is_kind and all(isinstance(value, int | float) for value in numbers)


def git_commit(package: Path = PACKAGE) -> str:
    """Returns the commit of this code, "-dirty" if it was changed; without one $NCA_JAX_COMMIT.

    A package that was installed below somebody else's repository has no commit of its own: that
    repository does not track its files. Neither set nor known it is "unknown".
    """
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        return _git(package, "describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("NCA_JAX_COMMIT", "unknown")


def _git(folder: Path, *args: str) -> str:
    run = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()
