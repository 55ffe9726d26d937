"""What campaigns share: small jobs whose results can be compared, and what became of a fault."""

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from commands import QUICK, ROOT, TIMES
from old_run import ALL_BUT_STEPS, MODEL, OLD
from safetensors.numpy import load_file

from nca_jax.data.tfds_source import TfdsSource
from nca_jax.infra.checkpoint import restore_params
from nca_jax.infra.mesh import host_mesh
from nca_jax.infra.steps import saved_step
from nca_jax.model_config import MODELS
from nca_jax.models.decoder import Model
from nca_jax.models.formats.hf import read_config

KINDS = ("survived", "refused", "lost")
PATIENCE = int(os.environ.get("FAULT_PATIENCE", "120"))  # seconds after which a command is stuck


class Tally(Counter):
    """Counts (what was tried, what became of it)."""

    def survived(self, what: str) -> None:
        self[what, "survived"] += 1

    def refused(self, what: str) -> None:
        self[what, "refused"] += 1

    def lost(self, what: str, why: str) -> None:
        self[what, "lost"] += 1
        raise AssertionError(f"{what}: {why}")


class Job(NamedTuple):
    """A command that fills a folder, started again until it has."""

    name: str
    command: Callable[[Path], list[str]]
    result: Callable[[Path], Any]  # what the folder holds once it is done


def start(command: Sequence[str], **more) -> subprocess.Popen:
    """Starts a command as a group of processes of its own."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **more,
    )


def send(process: subprocess.Popen, number: int) -> None:
    """Sends a signal to a process and all that it has started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def finish(process: subprocess.Popen, what: str) -> str:
    """Returns stdout of a command that ends well."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, f"{what}: status {process.returncode}: {out[-500:]} {err}"
    return out


def is_one_line(err: str) -> bool:
    """Whether stderr has one error for a person, and no traceback."""
    return "Traceback" not in err and err.count("error: ") == 1


def whole(job: Job, folder: Path) -> tuple[Any, float]:
    """Returns the result of a job that nothing has disturbed, and its seconds."""
    folder.mkdir(parents=True)
    begin = time.perf_counter()
    finish(start(job.command(folder)), job.name)
    return job.result(folder), time.perf_counter() - begin


def stop_at_random(
    job: Job, folder: Path, numbers: Sequence[int], *, tries: int, seed: int, tally: Tally
) -> None:
    """Sends a job a signal at random moments, starts it again, and compares what it ends with.

    Five times at most in one folder: then it may finish.
    """
    want, seconds = whole(job, folder / "whole")
    rng = random.Random(f"{job.name} {numbers} {seed}")
    left, places = tries, itertools.count()
    while left:
        place = folder / f"{next(places)}"
        place.mkdir()
        sent = []
        while left and len(sent) < 5:
            began, process = time.monotonic(), start(job.command(place))
            try:
                _, err = process.communicate(timeout=rng.uniform(0.2, 1.05) * seconds)
                if process.returncode != 0:
                    tally.lost(f"stops of {job.name}", err)
                # Of a job that goes on; the first one may have had a busier machine.
                seconds = seconds if sent else min(seconds, time.monotonic() - began)
                break
            except subprocess.TimeoutExpired:
                number = rng.choice(numbers)
                send(process, number)
            try:
                out, err = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                send(process, signal.SIGKILL)
                tally.lost(name_of(number, job), f"stuck after {sent}")
            if "Traceback" in err:
                tally.lost(name_of(number, job), err)
            sent.append(number)
            left -= 1
        finish(start(job.command(place)), job.name)
        got = job.result(place)
        for number in sent:
            if got == want:
                tally.survived(name_of(number, job))
            else:
                tally.lost(name_of(number, job), f"{place} is not {folder / 'whole'}")


def name_of(number: int, job: Job) -> str:
    return f"{signal.Signals(number).name} in {job.name}"


# What jobs leave behind


def run_result(workdir: Path, model: Path | str = MODEL) -> Any:
    """The metrics of a run, without times, and its last parameters. `model`: a folder or a size."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    config = MODELS[model] if isinstance(model, str) else read_config(model)
    shapes = Model(config).abstract_params()
    params = restore_params(workdir, shapes, host_mesh())
    digest = hashlib.sha256()
    for x in jax.tree.leaves(params):
        digest.update(np.asarray(x).tobytes())
    metrics = [{x: v for x, v in line.items() if x not in TIMES} for line in lines]
    return metrics, saved_step(workdir), digest.hexdigest()


def files_result(folder: Path) -> dict[str, str]:
    """The digest of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def cache_result(folder: Path) -> dict[str, list]:
    """The arrays of every part of a cached reference."""
    return {
        part.name: [(name, x.tobytes()) for name, x in sorted(load_file(part).items())]
        for part in sorted(folder.glob("part-*.safetensors"))
    }


def prepared_result(data_dir: Path) -> tuple[list[str], list[dict]]:
    """The files of a data set, and its records: in the files their fields have no order."""
    os.environ["TFDS_DATA_DIR"] = str(data_dir)
    source = TfdsSource("tfds:scored_jsonl:train")
    files = [str(x.relative_to(data_dir)) for x in sorted(data_dir.rglob("*")) if x.is_file()]
    return [x for x in files if "lock" not in x], [source[i][1] for i in range(len(source))]


# Jobs


def nca_jax(name: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"nca_jax.{name}", *flags]


def run_flags(records: Path | str = OLD / "rows.jsonl") -> list[str]:
    """A run of token ids on a model of a few thousand parameters."""
    _, *flags = (flag for flag in ALL_BUT_STEPS if "data.rows=" not in flag)
    return [
        f"--config=configs/jsonl.py:files={records},init_from={MODEL},k=3",
        *flags,
        "--config.data.rows=1",  # for one device
        "--config.steps=6",
        "--config.eval_every=3",
        "--config.save_every=2",
    ]


def text_flags(records: Path) -> list[str]:
    """A run of texts as bytes on a tiny model with random weights."""
    return [
        f"--config=configs/jsonl.py:files={records},smoke",
        "--config.data.row_len=256",
        "--config.generate.max_new_tokens=8",
        "--config.generate.batch_size=2",
        "--config.data.eval_fraction=0.2",
    ]
