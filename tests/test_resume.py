"""A run killed at any moment and started again is the run that was never stopped, bit for bit."""

import itertools
import random
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import command, finish, metric_lines, write_records
from helpers import stopping
from ml_collections import ConfigDict
from old_run import ALL_BUT_STEPS, MODEL

from nca_jax import build
from nca_jax import train as train_command
from nca_jax.build import open_model_config
from nca_jax.infra.checkpoint import restore_params
from nca_jax.infra.mesh import host_mesh, make_mesh
from nca_jax.model_config import MODELS, ModelConfig
from nca_jax.models.decoder import Model

STEPS = 24


def train(workdir: Path, rows: Path) -> subprocess.Popen:
    return command(
        "train",
        f"--config=configs/jsonl.py:files={rows},smoke",
        f"--workdir={workdir}",
        f"--config.steps={STEPS}",
        "--config.optim.lr=1e-3",
        "--config.data.row_len=256",
        "--config.save_every=3",
        "--config.eval_every=4",
        "--config.log_every=2",
    )


def final_params(workdir: Path, config: ModelConfig = MODELS["tiny"]) -> dict:
    return restore_params(workdir, Model(config).abstract_params(), host_mesh())


def leaves(tree: dict) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_same_run(got: Path, want: Path) -> None:
    assert metric_lines(got) == metric_lines(want)
    for a, b in zip(leaves(final_params(got)), leaves(final_params(want)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    rows = write_records(folder / "rows.jsonl")
    finish(train(folder / "run", rows))
    return folder / "run", rows


@pytest.fixture(scope="module")
def run():
    """Returns a function that goes on with a small run on one device and returns its metrics."""

    def go_on(workdir: Path, stop_after: int = 99) -> list[dict]:
        steps = itertools.count(1)
        flags = ("--config.steps=5", "--config.save_every=4", "--config.eval_every=4")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "make_mesh", lambda sizes, _: make_mesh(sizes, jax.devices()[:1]))
            asked = lambda: next(steps) == stop_after  # noqa: E731
            patch.setattr(train_command, "stop_asked", stopping(asked))
            keep = "--config.checkpoint.keep_last=2"
            train_command.main(["train", *ALL_BUT_STEPS, f"--workdir={workdir}", *flags, keep])
        return metric_lines(workdir)

    return go_on


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir)
    return workdir


def assert_same_small_run(got: Path, want: Path) -> None:
    assert metric_lines(got) == metric_lines(want)
    model = open_model_config(ConfigDict({"name": "", "init_from": str(MODEL), "head": "lm"}))
    for a, b in zip(*(leaves(final_params(x, model)) for x in (got, want)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_that_stops_and_goes_on_is_the_run_that_did_not_bit_for_bit(tmp_path, run, whole):
    assert [line["step"] for line in run(tmp_path, stop_after=2)] == [0, 1, 2]
    run(tmp_path)
    assert_same_small_run(tmp_path, whole)


@pytest.mark.slow
def test_a_run_goes_on_from_before_a_damaged_checkpoint_bit_for_bit(tmp_path, run, whole, capsys):
    run(tmp_path, stop_after=2)
    run(tmp_path, stop_after=1)
    state = tmp_path / "checkpoints/3/default"
    for path in state.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-100])
    capsys.readouterr()
    run(tmp_path)
    said = capsys.readouterr().out
    assert said.count(f"{state} is damaged") == 1 and "resumed after step 2" in said
    assert_same_small_run(tmp_path, whole)


def steps_done(workdir: Path) -> int:
    """Returns the last logged step; 0 before the first."""
    if not (workdir / "metrics.jsonl").exists():
        return 0
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return max((int(line.split('"step": ')[1].split(",")[0]) for line in lines), default=0)


def kill_at(workdir: Path, rows: Path, step: int, rng: random.Random) -> None:
    """Starts the run and kills it a moment after it has logged `step`."""
    process = train(workdir, rows)
    while steps_done(workdir) < step and process.poll() is None:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.3))
    process.kill()
    process.communicate()


def kills_and_resumes(workdir: Path, rows: Path, num_kills: int, seed: int) -> None:
    rng = random.Random(seed)
    for step in sorted(rng.choices(range(1, STEPS), k=num_kills)):
        kill_at(workdir, rows, step, rng)
    finish(train(workdir, rows))


@pytest.mark.slow
def test_a_run_killed_ten_times_is_the_uninterrupted_run(tmp_path, uninterrupted):
    want, rows = uninterrupted
    kills_and_resumes(tmp_path / "run", rows, num_kills=10, seed=1)
    assert_same_run(tmp_path / "run", want)


@pytest.mark.slow
def test_sigterm_saves_says_so_and_the_same_command_goes_on(tmp_path, uninterrupted):
    want, rows = uninterrupted
    process = train(tmp_path / "run", rows)
    while steps_done(tmp_path / "run") < 6:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saved after step" in finish(process)
    saved = [int(p.name) for p in (tmp_path / "run/checkpoints").iterdir()]
    assert 6 <= max(saved) < STEPS
    assert f"resumed after step {max(saved)}" in finish(train(tmp_path / "run", rows))
    assert_same_run(tmp_path / "run", want)
