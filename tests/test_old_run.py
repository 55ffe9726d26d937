"""A workdir that an older version wrote goes on, in other rows and on other devices."""

import json
import shutil

import pytest
from commands import TIMES
from old_run import FLAGS, OLD

from nca_jax import train
from nca_jax.checks import UserError


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


def test_an_older_run_does_not_go_on_under_another_config(workdir):
    with pytest.raises(UserError, match="optim.lr: 0.01 there, 0.02 here"):
        train.main(["train", *FLAGS, f"--workdir={workdir}", "--config.optim.lr=2e-2"])
