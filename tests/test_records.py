"""What a run says of itself: run.json, metrics.jsonl, TensorBoard and W&B."""

import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import memory_gcs
import numpy as np
import pytest
from ml_collections import ConfigDict

from nca_jax.checks import UserError
from nca_jax.files import whole_lines, write_json
from nca_jax.infra import records
from nca_jax.infra.records import git_commit, is_metrics, read_run, record_run
from nca_jax.infra.writer import MetricWriter

OLD_RUN = Path(__file__).parent / "data" / "old_run" / "workdir"


# run.json


START = {
    "reference": "r",
    "tokenizer": "t",
    "eos_ids": [1, 2],
    "date": "2026-01-31",
    "records": "8 (a) + 4 (b)",
    "heldout": "2 (c)",
    "steps": 6,
}


def record(workdir: Path, commit: str, monkeypatch, **changes) -> dict:
    """Records a start, or a resume, by the code of a commit; returns run.json."""
    monkeypatch.setattr(records, "git_commit", lambda: commit)
    began = read_run(workdir) if (workdir / "run.json").exists() else None
    record_run(workdir, began, START | changes)
    return json.loads((workdir / "run.json").read_text())


def test_a_run_keeps_its_first_commit_and_those_of_its_resumes_in_order(tmp_path, monkeypatch):
    first = record(tmp_path, "a", monkeypatch)
    assert first == START | {"commit": "a", "commits": ["a"], "jax": [jax.__version__]}
    for commit in ("a", "b", "b", "a"):
        run = record(tmp_path, commit, monkeypatch)
    assert run == first | {"commits": ["a", "b", "a"]} == read_run(tmp_path)


def test_a_run_of_before_there_were_commits_goes_on_and_is_complete_from_then_on(
    tmp_path, monkeypatch
):
    (tmp_path / "run.json").write_text((OLD_RUN / "run.json").read_text())
    old = json.loads((OLD_RUN / "run.json").read_text())
    run = record(tmp_path, "b", monkeypatch, reference=old["reference"])
    history = {"commits": [old["commit"], "b"], "jax": [jax.__version__]}
    assert run == START | old | history


def test_an_older_run_that_says_only_cached_of_its_reference_goes_on(tmp_path, monkeypatch):
    record(tmp_path, "a", monkeypatch, reference="cached")
    assert record(tmp_path, "a", monkeypatch, reference="digest")["reference"] == "digest"


@pytest.mark.parametrize("name", START)
def test_what_a_run_depends_on_is_refused_by_name_where_it_has_changed(tmp_path, monkeypatch, name):
    first = record(tmp_path, "a", monkeypatch)
    there, here = START[name], 7 if name == "steps" else ["x"] if name == "eos_ids" else "x"
    said = f"{records.DEPENDS[name]}: {there} there, {here} here); restore"
    with pytest.raises(UserError, match=re.escape(said)):
        record(tmp_path, "b", monkeypatch, **{name: here})
    assert read_run(tmp_path) == first


def test_another_version_of_the_code_or_of_jax_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "git_commit", lambda: "a")
    assert record_run(tmp_path, None, START) == []
    assert record_run(tmp_path, read_run(tmp_path), START) == []
    monkeypatch.setattr(records, "git_commit", lambda: "b")
    monkeypatch.setattr(jax, "__version__", "9.9")
    code, library = record_run(tmp_path, read_run(tmp_path), START)
    assert code == "this run began with commit a; this is b"
    assert library.endswith("; this is 9.9")
    assert read_run(tmp_path)["jax"][1:] == ["9.9"]


def test_only_the_first_process_writes_what_all_check(tmp_path, monkeypatch):
    monkeypatch.setattr(records.distributed, "is_first", lambda: False)
    record_run(tmp_path, None, START)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b'{"commit": "a", "st',
        b"\0" * 40,
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"commit": "a", "steps": "6"}',
    ],
)
def test_a_damaged_run_json_is_named(tmp_path, damaged):
    (tmp_path / "run.json").write_bytes(damaged)
    with pytest.raises(UserError, match=f"{tmp_path}/run.json is damaged .*; restore it, or use"):
        read_run(tmp_path)


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


def writer_of(workdir, *, restored_step=None, check_held=lambda: None, **log) -> MetricWriter:
    workdir.mkdir(parents=True, exist_ok=True)
    log = ConfigDict({"tensorboard": False, "wandb_project": ""} | log)
    return MetricWriter(
        workdir, log, restored_step=restored_step, num_steps=4, check_held=check_held
    )


def test_a_metric_that_is_not_finite_is_named_and_no_line_is_written(tmp_path):
    writer = writer_of(tmp_path)
    writer.write(1, "train", {"loss": 1.5})
    with pytest.raises(UserError, match="Step 2, eval: margin is nan, kl is inf"):
        writer.write(2, "eval", {"loss": 1.0, "margin": math.nan, "kl": math.inf})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "split": "train", "loss": 1.5}']


def test_tensorboard_is_as_far_as_metrics_after_every_line(tmp_path):
    writer = writer_of(tmp_path, tensorboard=True)
    for step in range(1, 31):
        writer.write(step, "train", {"loss": 1.5, "lr": 1e-3})
        (events,) = (tmp_path / "tensorboard").iterdir()
        stored = events.read_bytes()
        assert stored.count(b"train/loss") == stored.count(b"train/lr") == step
    writer.close()


def lines_of(*steps: int) -> list[str]:
    return [json.dumps({"step": step, "split": "train", "loss": 0.5}) + "\n" for step in steps]


def resumed(workdir: Path, content: bytes, **more) -> list[int]:
    """Returns the steps of the lines that a run keeps which goes on after step 4."""
    (workdir / "metrics.jsonl").write_bytes(content)
    writer_of(workdir, restored_step=4, **more).close()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_run_that_goes_on_keeps_its_lines_up_to_the_restored_step(tmp_path, capsys):
    whole = "".join(lines_of(1, 2, 3, 4, 5, 6)).encode()
    torn = whole + b'{"step": 7, "spl'
    (tmp_path / "metrics.jsonl").write_bytes(torn)
    assert resumed(tmp_path, torn) == [1, 2, 3, 4]
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines_of(1, 2, 3, 4))
    assert "metrics.jsonl" not in capsys.readouterr().out


def test_an_end_of_line_within_a_string_ends_no_line(tmp_path):
    text = json.dumps({"step": 1, "split": "a\u2028b", "loss": 0.5}, ensure_ascii=False) + "\n"
    assert resumed(tmp_path, (text + lines_of(4)[0]).encode()) == [1, 4]


@pytest.mark.parametrize(
    "bad", [b"\0" * 30, b"{", b"[1]", b"5", b'{"step": 2}', b'{"step": "2", "split": "train"}']
)
def test_bad_lines_are_named_and_moved_aside_and_the_good_ones_kept(tmp_path, capsys, bad):
    first, *_, last = lines_of(1, 3, 4)
    found = first.encode() + bad + b"\n" + last.encode()
    assert resumed(tmp_path, found) == [1, 4]
    assert "metrics.jsonl was damaged (line 2)" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == found
    with pytest.raises(UserError, match="damaged .line 2."):
        whole_lines(tmp_path / "metrics.jsonl.damaged", is_metrics)


@pytest.mark.parametrize("found", [b"", "".join(lines_of(1, 2)).encode()])
def test_a_cut_file_of_metrics_is_said(tmp_path, capsys, found):
    kept = resumed(tmp_path, found)
    assert f"has lost its lines after step {len(kept)} of 4" in capsys.readouterr().out


def test_a_removed_file_of_metrics_is_said(tmp_path, capsys):
    writer_of(tmp_path, restored_step=4).close()
    assert "has lost its lines after step 0 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["write", "sync"])
def test_a_workdir_deleted_under_a_run_stops_it_at_the_next_write(tmp_path, when):
    writer = writer_of(tmp_path / "run")
    writer.write(1, "train", {"loss": 1.5})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="run/metrics.jsonl was removed or replaced"):
        writer.write(2, "train", {"loss": 1.5}) if when == "write" else writer.sync()
    writer.close()
    assert not (tmp_path / "run").exists()


def test_a_run_on_gs_that_lost_its_workdir_leaves_the_records_of_the_other_alone(monkeypatch):
    workdir, is_held = memory_gcs.serve(monkeypatch) / "run", [True]

    def check_held() -> None:
        if not is_held:
            raise UserError("taken over")

    writer = writer_of(workdir, check_held=check_held)
    writer.write(1, "train", {"loss": 1.5})
    writer.sync()
    is_held.clear()
    writer.write(2, "train", {"loss": 1.5})
    for save_or_close in (writer.sync, writer.close):
        with pytest.raises(UserError, match="taken over"):
            save_or_close()
    assert (workdir / "metrics.jsonl").read_text().count("step") == 1


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
