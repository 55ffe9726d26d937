"""A run that has begun goes on only as what it was: its records of itself, and what it depends on.

The run is that of data/old_run: records of ids, a model of a few thousand parameters.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import metric_lines
from helpers import stopping
from old_run import FLAGS, OLD
from safetensors.numpy import load_file, save_file

from nca_jax import evaluate, export, inspect, precompute, train
from nca_jax.checks import UserError
from nca_jax.files import read_json
from nca_jax.fit import fit
from nca_jax.infra.records import DEPENDS, extended


def flags_of(folder: Path) -> list[str]:
    return [*FLAGS, f"--config.data.files={folder}/rows.jsonl", "--config.eval_every=0"]


def go_on(folder: Path, *flags: str) -> None:
    train.main(["train", *flags_of(folder), f"--workdir={folder}/run", *flags])


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with the records of the old run and its workdir, which a resume has completed."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copy(OLD / "rows.jsonl", folder)
    shutil.copytree(OLD / "workdir", folder / "run")
    config = read_json(folder / "run" / "config.json")
    config |= {"data.files": f"{folder}/rows.jsonl"}
    (folder / "run" / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", no_step)
        go_on(folder)
    return folder


def no_step(run, state, *args, **kwargs):
    """Stands for `fit` where a run that goes on would train."""
    return state


@pytest.fixture
def run(begun, monkeypatch):
    """The same, put back as it was when the test ends."""
    monkeypatch.setattr(train, "fit", no_step)
    kept = shutil.copytree(begun, begun.with_name("kept"))
    yield begun
    shutil.rmtree(begun)
    kept.rename(begun)


def edit_rows(folder: Path, change) -> None:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    lines = [json.dumps(row) + "\n" for row in change(rows)]
    (folder / "rows.jsonl").write_text("".join(lines))


def with_other_scores(rows):
    return [row | {"scores": [x + 1.0 for x in row["scores"]]} for row in rows]


def test_run_json_holds_all_that_a_run_depends_on(begun):
    written = read_json(begun / "run" / "run.json")
    others = {"base", "prompts", "scorer"}  # of adapters, and of rounds, alone
    assert written.keys() == {*DEPENDS, "commit", "commits", "jax"} - others
    assert written["tokenizer"] == "none" and written["steps"] == 6


@pytest.mark.parametrize(
    "change",
    [with_other_scores, lambda rows: rows[::-1], lambda rows: rows[1:]],
    ids=["other scores", "reordered", "one less"],
)
def test_changed_records_are_refused_by_name(run, change):
    edit_rows(run, change)
    with pytest.raises(UserError, match="training records .config.data.files.: .* there, .* here"):
        go_on(run)


@pytest.mark.slow
def test_another_cache_is_refused_by_name(run, tmp_path, monkeypatch):
    cached = ["--config.reference.kind=cached", f"--config.reference.cache={run}/cache"]
    precompute.main(["precompute", *flags_of(run), *cached])
    flags = [*cached, f"--workdir={tmp_path}", "--config.steps=1"]
    monkeypatch.setattr(train, "fit", fit)
    go_on(run, *flags)
    part = next((run / "cache").glob("part-*"))
    arrays = load_file(part)
    del arrays["digest"]  # as older parts are, which are read as they stand
    save_file(arrays | {"logps": arrays["logps"] + np.float32(1e-6)}, part)
    with pytest.raises(UserError, match="something else .reference .config.reference"):
        go_on(run, *flags)


# More steps


def test_only_a_finished_run_is_extended_and_the_same_command_goes_on_with_it():
    first, second = {"from": 6, "steps": 2}, {"from": 8, "steps": 3}
    assert extended(None, 0, 0) == []
    assert extended({"steps": 6}, 6, 2) == [first]
    with pytest.raises(UserError, match="this one is at step 3 of 6. Let it finish first"):
        extended({"steps": 6}, 3, 2)
    begun = {"steps": 6, "more_steps": [first]}
    assert extended(begun, 7, 0) == extended(begun, 7, 2) == [first]
    with pytest.raises(UserError, match="this one is at step 7 of 8"):
        extended(begun, 7, 3)
    assert extended(begun, 8, 3) == [first, second]
    with pytest.raises(UserError, match="wanted a whole number of at least 1"):
        extended(begun, 8, -1)
    with pytest.raises(UserError, match="there is none in --workdir"):
        extended(None, 0, 2)


@pytest.mark.slow
def test_an_extension_that_was_stopped_goes_on_as_if_it_never_was(begun, tmp_path, monkeypatch):
    flags = [*flags_of(begun), "--config.save_every=1"]
    train.main(["train", *flags, f"--workdir={tmp_path}/whole"])
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    train.main(["train", f"--workdir={tmp_path}/whole", "--more_steps=3"])
    with monkeypatch.context() as patch:
        patch.setattr(train, "stop_asked", stopping(lambda: True))
        train.main(["train", f"--workdir={tmp_path}/cut", "--more_steps=3"])
    train.main(["train", f"--workdir={tmp_path}/cut"])
    whole, cut = (metric_lines(tmp_path / name) for name in ("whole", "cut"))
    assert whole == cut and [line["step"] for line in whole if line["split"] == "train"] == [
        *range(1, 10)
    ]
    lrs = [line["lr"] for line in whole if line["split"] == "train"]
    assert lrs[6] == max(lrs) and lrs[6] > lrs[7] > lrs[8] > 0
    for name in ("whole", "cut"):
        assert read_json(tmp_path / name / "run.json")["more_steps"] == [{"from": 6, "steps": 3}]


@pytest.mark.parametrize("name", ["config.json", "run.json"])
@pytest.mark.parametrize(
    "damage", [None, b"", b"{", b"\0" * 99], ids=["removed", "empty", "cut", "zeros"]
)
def test_a_run_whose_records_are_removed_or_damaged_does_not_go_on(run, name, damage):
    file = run / "run" / name
    whole = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(whole[: len(whole) // 2] if damage == b"{" else damage)
    said = "is not there" if damage is None else "is damaged"
    with pytest.raises(UserError, match=f"{file} {said}"):
        go_on(run)
    if name == "config.json" and damage is None:
        said, file = "has no config.json", file.parent
    with pytest.raises(UserError, match=f"{file} {said}"):
        export.main(["export", f"--workdir={run}/run", f"--out={run}/out"])
    assert not (run / "out").exists()
    if name == "run.json" and damage is not None:
        with pytest.raises(UserError, match=f"{file} {said}"):
            evaluate.main(["evaluate", *flags_of(run), f"--workdir={run}/run"])


def test_what_was_killed_before_its_first_save_starts_anew_whatever_it_left(run, capsys):
    shutil.rmtree(run / "run" / "checkpoints")
    (run / "run" / "config.json").write_text('{"steps": 3, "se')
    (run / "run" / "run.json").unlink()
    go_on(run)
    said = f"{run}/run has no checkpoint of the run that was started there: it starts anew\n"
    assert said in capsys.readouterr().out
    assert read_json(run / "run" / "run.json")["steps"] == 6
    assert read_json(run / "run" / "config.json")["steps"] == 6


def test_the_unit_of_scores_is_kept_and_evaluated_in(run, monkeypatch):
    written, seen = read_json(run / "run" / "run.json"), []
    assert written["score_unit"] == 1.0
    (run / "run" / "run.json").write_text(json.dumps(written | {"score_unit": 4.0}))
    with pytest.raises(UserError, match="unit of the scores .*: 4.0 there, 1.0 here"):
        go_on(run)
    monkeypatch.setattr(evaluate, "fill_reference", lambda logps, params, batches: batches)
    monkeypatch.setattr(
        evaluate, "heldout_responses", lambda logps, params, batches: seen.extend(batches)
    )
    monkeypatch.setattr(evaluate, "metrics_of", lambda responses, config: {"loss": 0.0})
    monkeypatch.setattr(evaluate, "values_of", lambda responses, config: {})
    for unit in (1.0, 4.0):
        (run / "run" / "run.json").write_text(json.dumps(written | {"score_unit": unit}))
        evaluate.main(["evaluate", *flags_of(run), f"--workdir={run}/run", "--num_prompts=0"])
    raw, quarter = (host.batch.scores for host in seen)
    np.testing.assert_array_equal(raw, 4 * quarter)


def test_inspect_says_before_a_run_what_train_says(run, capsys):
    shutil.rmtree(run / "run" / "checkpoints")
    flags = ("--config.loss.alpha=1e-4", "--config.optim.warmup_frac=0.9")
    inspect.main(["inspect", *flags_of(run), *flags, "--rows=1"])
    plan, *warnings = capsys.readouterr().out.splitlines()[-3:]
    go_on(run, *flags)
    assert "\n".join([plan, *warnings]) in capsys.readouterr().out
    assert "6 steps of 4 prompts" in plan
    assert "warning: the learning rate" in warnings[0] and "are one-hot" in warnings[1]


def test_an_export_of_damaged_metrics_says_so_before_it_writes(run):
    with open(run / "run" / "metrics.jsonl", "a") as file:
        file.write("\0\0\n")
    with pytest.raises(UserError, match="metrics.jsonl is damaged .line 6."):
        export.main(["export", f"--workdir={run}/run", f"--out={run}/out"])
    assert not (run / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])
def test_a_workdir_deleted_under_a_run_stops_it(begun, tmp_path, monkeypatch, step):
    workdir, calls = tmp_path / "run", []

    def asked() -> bool:
        calls.append(workdir)
        if len(calls) == step:
            shutil.rmtree(workdir)
        return False

    monkeypatch.setattr(train, "stop_asked", stopping(asked))
    with pytest.raises(UserError, match=f"{workdir}/metrics.jsonl was removed"):
        train.main(["train", *flags_of(begun), f"--workdir={workdir}"])
