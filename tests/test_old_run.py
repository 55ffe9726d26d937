"""A workdir that an older version wrote goes on, in other rows and on other devices."""

import json
import shutil

import numpy as np
import pytest
from commands import TIMES
from helpers import stopping
from old_run import FLAGS, OLD

from nca_jax import build, train
from nca_jax.axes import flatten_paths
from nca_jax.checks import UserError
from nca_jax.flags import parse_flags
from nca_jax.params import policy_params


@pytest.fixture
def workdir(tmp_path):
    return shutil.copytree(OLD / "workdir", tmp_path / "run")


def test_an_older_run_goes_on_in_other_rows_and_ends_as_it_would_have(workdir):
    layout = ("--config.data.rows=16", "--config.data.block=32", "--config.loss.logits_chunk=32")
    train.main(["train", *FLAGS, f"--workdir={workdir}", *layout])
    got, want = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (workdir / "metrics.jsonl", OLD / "whole_metrics.jsonl")
    )
    assert [(line["step"], line["split"]) for line in got] == [
        (line["step"], line["split"]) for line in want
    ]
    layout_metrics = ("padding_frac", *TIMES)
    for a, b in zip(got, want, strict=True):
        for name in b.keys() - {"split", *layout_metrics}:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5), (a["step"], name)
    run = json.loads((workdir / "run.json").read_text())
    assert run["commit"] == "5f08b2107fc0" and len(run["commits"]) == 2


@pytest.mark.slow
def test_what_is_frozen_stays_bit_for_bit_while_the_rest_is_trained_and_resumed(tmp_path):
    flags = [*FLAGS, f"--workdir={tmp_path}", "--config.optim.freeze=embed|mlp"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "stop_asked", stopping(iter([False, False, True]).__next__))
        train.main(["train", *flags])
    train.main(["train", *flags])
    config, _ = parse_flags(["x", *FLAGS])
    run = build.build(config)
    before, after = (flatten_paths(policy_params(run, where)) for where in ("", str(tmp_path)))
    for path, x in before.items():
        is_frozen = "embed" in path or "mlp" in path
        assert np.array_equal(x, after[path]) == is_frozen, path


@pytest.mark.slow
def test_a_run_that_ended_early_says_so_and_goes_on_only_with_more_patience(
    tmp_path, monkeypatch, capsys
):
    losses = iter([1.0, 0.5, 0.6, 0.7, 0.8, 0.9])  # of steps 0 to 5
    monkeypatch.setattr("nca_jax.start.heldout_metrics", lambda *_, **__: {"loss": next(losses)})
    flags = [*FLAGS, f"--workdir={tmp_path}", "--config.checkpoint.best_metric=loss"]
    flags += ["--config.steps=9", "--config.eval_every=1"]
    for patience, last in ((2, 3), (2, 3), (4, 5)):
        train.main(["train", *flags, f"--config.eval_patience={patience}"])
        assert f"early stop after step {last} of 9: loss was best at" in capsys.readouterr().out
        assert json.loads((tmp_path / "run.json").read_text())["early_stop"] == last
    assert sorted(x.name for x in (tmp_path / "checkpoints").iterdir()) == ["1", "5"]


def test_an_older_run_does_not_go_on_under_another_config(workdir):
    with pytest.raises(UserError, match="optim.lr: 0.01 there, 0.02 here"):
        train.main(["train", *FLAGS, f"--workdir={workdir}", "--config.optim.lr=2e-2"])
