"""nca_jax on the same rows: the train command, then its last checkpoint scored once more."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax

from nca_jax import build, programs
from nca_jax.data.pipeline import Dataset
from nca_jax.files import whole_lines
from nca_jax.flags import parse_flags
from nca_jax.infra.records import METRICS, is_metrics
from nca_jax.losses import LOSSES
from nca_jax.params import policy_params

ROOT = Path(__file__).parents[2]


def train(model_dir: Path, rows_file: Path, settings, k: int, workdir: Path) -> dict:
    """Runs `python -m nca_jax.train`; returns what `released.train` returns.

    Args:
      settings: as `released.Settings`; the config has the others as released.
    """
    shutil.rmtree(workdir, ignore_errors=True)  # a whole run, not a resumed one
    values = {
        "model": model_dir,
        "rows": rows_file,
        "algo": settings.loss,
        "alpha": settings.alpha,
        "beta": settings.beta,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "lr": settings.lr,
        "k": k,
    }
    if "alpha" not in LOSSES[settings.loss].fields:
        del values["alpha"]
    if settings.adapter:
        values["lora"] = settings.adapter
    arg = ",".join(f"{name}={value}" for name, value in values.items())
    config_flag = f"--config={ROOT}/configs/torch_parity.py:{arg}"
    command = [sys.executable, "-m", "nca_jax.train", config_flag, f"--workdir={workdir}"]
    subprocess.run(command, cwd=ROOT, check=True)
    lines = whole_lines(workdir / METRICS, is_metrics)
    log = [line for line in lines if line["split"] == "train"]
    return {"log": log, "final_logps": final_logps(config_flag, workdir)}


def final_logps(config_flag: str, workdir: Path) -> list[list[float]]:
    """Returns the log-probabilities of the last batch under the last checkpoint, [B, K]."""
    config, _ = parse_flags(["ours", config_flag])
    run = build.build(config)
    dataset = Dataset(build.read_data(run).sources, config.data, seed=config.seed)
    batch = dataset.batch_at(config.steps - 1).batch
    with jax.set_mesh(run.mesh):
        params = policy_params(run, str(workdir))
        return programs.jit_step_logps(run)(params, batch).tolist()
