"""The benchmark that whoever has chips runs once: here by the smoke model on a CPU."""

import json
import sys

import pytest

from experiments import tpu_bench
from nca_jax.chips import CHIPS


def test_each_kind_of_chip_is_tried_with_the_options_and_without():
    for kind in CHIPS:
        tried = tpu_bench.trials(kind)
        assert {"as chosen", "fused", "remat=attention", "blocks of 1024"} <= tried.keys()
        assert ("no options" in tried) == (kind in tpu_bench.OPTIONS)
    assert all("splash" not in str(trial) for trial in tpu_bench.trials("cpu").values())


@pytest.mark.long
@pytest.mark.slow
def test_a_trial_that_fails_says_so_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    tried = {
        "as chosen": tpu_bench.Trial(),
        "refused": tpu_bench.Trial(("--config.model.remat=full",)),
        "2 rows": tpu_bench.Trial(rows=2),
    }
    monkeypatch.setattr(tpu_bench, "trials", lambda device_kind: tried)
    out = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["tpu_bench", f"--out={out}", "--smoke"])
    tpu_bench.main()
    report = json.loads(out.read_text())
    assert report["device_kind"] == "cpu" and report["product_flops_per_second"]["bfloat16"] > 0
    chosen, bad, two = report["trials"].values()
    assert "set config.model.scan_layers=True" in bad["error"]
    assert chosen["median_seconds"] > 0 and len(chosen["step_seconds"]) == 2
    assert (chosen["mfu"], chosen["peak_gib"], chosen["micro_batches"]) == (None, None, 1)
    assert chosen["config"]["model"]["name"] == "tiny"
    tokens = [x["tokens_per_second"] * x["median_seconds"] for x in (chosen, two)]
    a_prompt = 32 + tpu_bench.K * 24
    assert tokens == pytest.approx([a_prompt * report["devices"] * n for n in (1, 2)])
    assert "refused" in capsys.readouterr().out
