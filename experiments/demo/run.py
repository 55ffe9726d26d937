"""The demo: train SmolLM2-135M-Instruct by NCA on scored film reviews, and show what changed.

    make demo      or      python experiments/demo/run.py [--seed=0] [--out=runs/demo]

Trains and evaluates with the project's own commands, prints a table, and writes
    OUT/summary.json   reward_before, reward_after, accuracy, kl, chosen_logp_drift, seconds
    OUT/report.html    curves, and held-out samples before and after, in one self-contained page
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from report import write_report

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 48  # held-out prompts that are answered before and after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/demo")
    args = parser.parse_args()
    start = time.perf_counter()
    workdir = args.out / "train"
    shutil.rmtree(workdir, ignore_errors=True)  # the demo shows a whole run, not a resumed one
    config = f"--config=configs/sentiment.py:seed={args.seed}"
    command("train", config, f"--workdir={workdir}")
    command("evaluate", config, f"--workdir={workdir}", f"--num_prompts={NUM_PROMPTS}")

    evaluation = json.loads((workdir / "evaluation.json").read_text())
    metrics = evaluation["metrics"]
    summary = {
        "reward_before": metrics["reward_reference"],
        "reward_after": metrics["reward"],
        "accuracy": metrics["accuracy"],
        "kl": metrics["kl"],
        "chosen_logp_drift": metrics["chosen_logp_drift"],
        "seconds": round(time.perf_counter() - start, 1),
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    write_report(args.out / "report.html", summary, lines, evaluation["samples"])

    print(f"\nHeld-out prompts: {len(evaluation['samples'])}")
    for name, value in summary.items():
        print(f"  {name:18s} {value:8.3f}")
    print(f"\n{args.out / 'summary.json'}\n{args.out / 'report.html'}")


def command(name: str, *flags: str) -> None:
    """Runs `python -m nca_jax.NAME FLAGS`; stops the demo where it fails."""
    # Compiled programs are kept, so that a second demo starts sooner.
    env = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / "runs/compiled")} | os.environ
    done = subprocess.run([sys.executable, "-m", f"nca_jax.{name}", *flags], cwd=ROOT, env=env)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
