"""What a run says of itself: run.json, metrics.jsonl, TensorBoard and W&B."""

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from nca_jax.checks import UserError
from nca_jax.files import write_json
from nca_jax.infra import records
from nca_jax.infra.records import git_commit, read_run, record_run
from nca_jax.infra.writer import MetricWriter

OLD_RUN = Path(__file__).parent / "data" / "old_run" / "workdir"


# run.json


def record(workdir: Path, commit: str, monkeypatch, **changes) -> dict:
    """Records a start by the code of a commit; returns run.json."""
    monkeypatch.setattr(records, "git_commit", lambda: commit)
    start = dict(reference="r", origin="models/base", steps=6) | changes
    record_run(workdir, **start)
    return json.loads((workdir / "run.json").read_text())


def test_a_run_keeps_its_first_commit_and_those_of_its_resumes_in_order(tmp_path, monkeypatch):
    assert read_run(tmp_path) is None
    first = record(tmp_path, "a", monkeypatch)
    assert first == {"reference": "r", "commit": "a", "steps": 6, "commits": ["a"]}
    for commit in ("a", "b", "b", "a"):
        run = record(tmp_path, commit, monkeypatch)
    assert run == first | {"commits": ["a", "b", "a"]} == read_run(tmp_path)


def test_a_run_of_before_there_were_commits_goes_on(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text((OLD_RUN / "run.json").read_text())
    old = json.loads((OLD_RUN / "run.json").read_text())
    run = record(tmp_path, "b", monkeypatch, reference=old["reference"])
    assert run == old | {"commits": [old["commit"], "b"]}


def test_another_reference_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    first = record(tmp_path, "a", monkeypatch)
    with pytest.raises(UserError, match=f"{tmp_path} was .* another reference than models/base "):
        record(tmp_path, "b", monkeypatch, reference="other")
    assert read_run(tmp_path) == first


def test_only_the_first_process_writes_what_all_check(tmp_path, monkeypatch):
    monkeypatch.setattr(records.distributed, "is_first", lambda: False)
    record_run(tmp_path, reference="r", origin="this seed", steps=6)
    assert not list(tmp_path.iterdir())


def git(folder: Path, *args: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    run = subprocess.run(["git", *who, *args], cwd=folder, check=True, capture_output=True)
    return run.stdout.decode().strip()


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit, of a file and of the package `nca_jax` in it."""
    package = tmp_path / "nca_jax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message=one")
    return tmp_path


def test_the_commit_is_that_of_the_repository_which_tracks_the_code(repository, monkeypatch):
    monkeypatch.setenv("NCA_JAX_COMMIT", "of the image")
    commit = git(repository, "rev-parse", "--short=12", "HEAD")
    assert git_commit(repository / "nca_jax") == commit
    (repository / "nca_jax" / "__init__.py").write_text("changed")
    assert git_commit(repository / "nca_jax") == f"{commit}-dirty"


def test_code_installed_below_another_repository_has_not_its_commit(repository, monkeypatch):
    installed = repository / "venv" / "nca_jax"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    monkeypatch.delenv("NCA_JAX_COMMIT", raising=False)
    assert git_commit(installed) == "unknown"
    monkeypatch.setenv("NCA_JAX_COMMIT", "of the image")
    assert git_commit(installed) == "of the image"


# JSON


@pytest.mark.parametrize("bad", [np.float32(1), np.ones(2), Path("x"), {1}])
def test_what_json_has_not_is_refused_and_no_file_is_left(tmp_path, bad):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "x.json", {"x": bad})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float64("nan")])
def test_a_number_that_is_not_finite_is_refused_and_no_file_is_left(tmp_path, bad):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"x": [bad]})
    assert not list(tmp_path.iterdir())


# Metrics


def writer_of(workdir: Path, *, restored_step=None, **log) -> MetricWriter:
    workdir.mkdir(parents=True, exist_ok=True)
    log = ConfigDict({"tensorboard": False, "wandb_project": ""} | log)
    return MetricWriter(workdir, log, restored_step=restored_step, num_steps=4)


def test_a_metric_that_is_not_finite_is_named_and_no_line_is_written(tmp_path):
    writer = writer_of(tmp_path)
    writer.write(1, "train", {"loss": 1.5})
    with pytest.raises(UserError, match="Step 2, eval: margin is nan, kl is inf"):
        writer.write(2, "eval", {"loss": 1.0, "margin": math.nan, "kl": math.inf})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "split": "train", "loss": 1.5}']


def test_tensorboard_is_as_far_as_metrics_after_a_sync(tmp_path):
    writer = writer_of(tmp_path, tensorboard=True)
    writer.write(1, "train", {"loss": 1.5})
    writer.sync()
    stored = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    writer.close()
    assert b"train/loss" in stored


@pytest.fixture
def wandb_runs(monkeypatch):
    """Stands for W&B: a list of what each run was opened with."""
    opened = []

    def init(**kwargs):
        opened.append(kwargs)
        return types.SimpleNamespace(log=lambda *args, **kwargs: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return opened


def test_every_workdir_is_one_run_of_wandb_whatever_its_last_name(
    tmp_path, monkeypatch, wandb_runs
):
    monkeypatch.chdir(tmp_path)
    for workdir, step in (("a/x", None), ("b/x", None), ("a/x", 2), (tmp_path / "a/x", 3)):
        writer_of(Path(workdir), restored_step=step, wandb_project="p").close()
    ids = [run["id"] for run in wandb_runs]
    assert ids[0] == ids[2] == ids[3] != ids[1]
    assert all(run["name"] == "x" and run["resume"] == "allow" for run in wandb_runs)
    assert all(run["project"] == "p" and run["id"].isalnum() for run in wandb_runs)
