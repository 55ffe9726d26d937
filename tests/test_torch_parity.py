"""experiments/torch_parity: our own PyTorch is the released one, and nca_jax goes with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from experiments.torch_parity import released  # noqa: E402  (torch may not be there)

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
LIMITS = {
    "loss": 2e-5,  # relative
    "grad_norm": 5e-4,  # relative
    "logps": 1e-3,  # nats
    "rewards": 1e-4,  # nats
    "final_logps": 1e-3,  # nats
    "accuracy": 1e-6,
}

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name", ["nca", "infonca"])
def test_our_own_pytorch_takes_the_released_trajectory(name):
    golden = json.loads((DATA / f"released_trajectory_{name}.json").read_text())[0]
    rows = [released.Row(r["prompt"], r["responses"], r["scores"]) for r in golden["rows"]]
    settings = released.Settings(loss=name, alpha=golden["alpha"], beta=golden["beta"])
    found = released.train(DATA / "tiny_mistral", rows, settings)
    for ours, theirs in zip(found["log"], golden["log"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-6, abs=1e-12)
        for k in range(4):
            assert ours[f"logps/{k}"] == pytest.approx(theirs[f"logps/A{k}"], abs=1e-3)
    final = torch.tensor(found["final_logps"])
    wanted = torch.tensor(golden["final_logps_of_last_batch"])
    torch.testing.assert_close(final, wanted, rtol=0, atol=1e-3)


def test_three_steps_beside_pytorch_are_within_the_limits(tmp_path):
    command = [sys.executable, "experiments/torch_parity/run.py", "--steps=3", "--cases=nca,dpo"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}  # one device, as a user has
    subprocess.run([*command, f"--out={tmp_path}"], cwd=ROOT, env=env, check=True, timeout=300)
    apart = json.loads((tmp_path / "differences.json").read_text())
    for case in ("nca/released", "dpo/released"):
        assert {name: x for name, x in apart[case].items() if x > LIMITS[name]} == {}
