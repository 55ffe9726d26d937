"""Runs the project's commands as a user does, and reads what they write."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Programs of tiny models take far longer to compile than to run: not with LLVM's expensive passes.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
TIMES = ("step_seconds", "useful_tokens_per_second")  # the only metrics that may differ


def command(name: str, *flags: str, devices: int = 1) -> subprocess.Popen:
    """Starts `python -m nca_jax.NAME FLAGS` in a process of its own."""
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, "-m", f"nca_jax.{name}", *flags],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> str:
    """Returns stdout of a command that succeeded."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def write_records(path: Path, num_rows: int = 24, k: int = 4) -> Path:
    """Writes rows of short texts with scores, ragged in length; returns the path."""
    words = "sun moon river stone cloud ember wind salt glass iron".split()
    with open(path, "w") as file:
        for i in range(num_rows):
            responses = [
                " ".join(words[(i * 3 + j * j + n) % 10] for n in range(2 + (i + j) % 5))
                for j in range(k)
            ]
            scores = [round(((i * 7 + j * 5) % 11) / 10, 2) for j in range(k)]
            row = {"prompt": f"Say {i}:", "responses": responses, "scores": scores}
            file.write(json.dumps(row) + "\n")
    return path


def metric_lines(workdir: Path, split: str | None = None) -> list[dict]:
    """Returns the lines of metrics.jsonl, of one split or all, without timings."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: x for name, x in line.items() if name not in TIMES}
        for line in lines
        if split in (None, line["split"])
    ]


def launch(name: str, *flags: str, processes: int, devices: int = 1) -> subprocess.Popen:
    """Starts `python -m nca_jax.NAME FLAGS` as several processes on virtual devices."""
    launcher = [sys.executable, "-m", "experiments.launch.local"]
    return subprocess.Popen(
        [*launcher, f"--processes={processes}", f"--devices={devices}"]
        + ["--", sys.executable, "-m", f"nca_jax.{name}", *flags],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
