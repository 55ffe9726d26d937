"""The notebook is run as it stands, but for what installs packages."""

import json
import os
import subprocess
import sys

import pytest
from commands import QUICK, ROOT


@pytest.mark.slow
def test_the_notebook_goes_from_prompts_to_a_reward_and_an_export(tmp_path):
    notebook = json.loads((ROOT / "docs/one_host.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    install, *cells = code
    assert install.startswith("%pip install") and not any("\n%" in f"\n{cell}" for cell in cells)
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(cells)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"},
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    metrics = json.loads((tmp_path / "runs/notebook/evaluation.json").read_text())["metrics"]
    before_and_after = f"reward {metrics['reward_reference']:.3f} -> {metrics['reward']:.3f}"
    assert before_and_after in run.stdout
    assert (tmp_path / "runs/notebook-hf/model.safetensors").exists()
