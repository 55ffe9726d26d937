"""The demo, with its tiny model: what it leaves, and that its numbers are of what it sampled."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("vaderSentiment")
from experiments.demo import run as demo  # noqa: E402  (it plots)


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
def test_the_demo_trains_both_arms_and_leaves_a_page_and_a_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert demo.main(["demo", "--smoke", f"--out={tmp_path / 'demo'}"]) == 0
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert {
        "reward_difference",
        "reward_difference_interval",
        "nca_above_dpo",
        "seconds",
    } <= summary.keys()
    assert "NCA is above DPO by" in capsys.readouterr().out
    page = (tmp_path / "demo/report.html").read_text()
    assert "prompts to train on" in page and "<td" in page
    for algo, loss in (("nca", 2 * np.log(2)), ("dpo", np.log(2))):
        first = json.loads((tmp_path / "demo" / algo / "metrics.jsonl").read_text().split("\n")[0])
        assert first["loss"] == pytest.approx(loss, abs=1e-4)  # from the reference on
