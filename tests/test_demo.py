"""The demo, with its tiny model: what it leaves, and that its numbers are of what it sampled."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from commands import QUICK, ROOT

pytest.importorskip("matplotlib")
from experiments.demo import run as demo  # noqa: E402  (it plots)


def test_the_reward_is_the_share_of_the_films_words():
    asked = {"prompt": "Finish this review of a heist comedy set in a zoo in one sentence: So"}
    responses = ["A Heist of comedies.", "It was a comedian's.", "Nothing."]
    np.testing.assert_allclose(demo.of_the_film([asked] * 3, responses), [1, 0.5, 0])
    rows = demo.scored_rows()
    spread = np.array([np.ptp(row["scores"]) for row in rows])
    assert len(rows) == 320 and (spread >= 0.5).sum() > demo.STEPS * demo.BATCH


def test_intervals_are_of_paired_differences_over_prompts():
    samples = [
        {"policy_scores": [0.5, 0.7], "reference_scores": [0.1, 0.3, 0.2]},
        {"policy_scores": [0.2, 0.2], "reference_scores": [0.2, 0.2, 0.2]},
    ]
    drifts = {"nca": np.array([1.0, 1.0]), "dpo": np.array([-1.0, -3.0])}
    found = demo.measure(samples, drifts)
    assert found["reward"] == pytest.approx(0.4) and found["reward_reference"] == pytest.approx(0.2)
    assert found["reward_difference"] == pytest.approx(0.2)
    assert found["reward_difference_interval"] == pytest.approx(
        1.96 * 0.2
    )  # differences of 0.4 and 0
    assert found["nca_best_logp_interval"] == 0
    assert found["nca_above_dpo"] == pytest.approx(3)
    assert found["nca_above_dpo_interval"] == pytest.approx(1.96)


@pytest.mark.slow
def test_the_demo_trains_both_arms_and_leaves_a_page_and_a_summary(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.demo.run",
        "--smoke",
        f"--out={tmp_path / 'demo'}",
    ]
    env = os.environ | {"XLA_FLAGS": QUICK}  # one device, as a user has
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert {
        "reward_difference",
        "reward_difference_interval",
        "nca_above_dpo",
        "seconds",
    } <= summary.keys()
    assert "NCA is above DPO by" in done.stdout
    page = (tmp_path / "demo/report.html").read_text()
    assert "prompts to train on" in page and "<td" in page
    for algo, loss in (("nca", 2 * np.log(2)), ("dpo", np.log(2))):
        first = json.loads((tmp_path / "demo" / algo / "metrics.jsonl").read_text().split("\n")[0])
        assert first["loss"] == pytest.approx(loss, abs=1e-4)  # from the reference on
