r"""Claim (c): more responses help, the best one being the same.

    python -m experiments.claims.responses --out=runs/claims/responses

SmolLM2-135M answers each of the demo's prompts 16 times, VADER scores the answers, and NCA trains
on the best one with 1, 3, 7 or all 15 of the others: the same best, the same prompts and steps.
Paper: arXiv:2402.05369, section 5. Writes responses.md and responses.png.
"""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from experiments import results, sweep
from experiments.claims import study
from experiments.claims.rows import DEMO, split_rows, take, without_empty, write_new
from experiments.claims.study import ALPHA, BATCH, NUM_HELDOUT
from experiments.tasks import GOES_ON, Task, run_tasks
from nca_jax.checks import run_main
from nca_jax.files import whole_lines

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend)

SAMPLES = 16
ROW_LENS = {2: 704, 4: 704, 8: 1024, 16: 1024}  # by K; rows of 704 are too short for 16 responses
RESPONSES = tuple(ROW_LENS)  # K
BETA, LR = 0.1, 5e-5  # the demo's
NUM_PROMPTS = 48  # of a seed
STEPS = NUM_PROMPTS // BATCH  # one pass


def with_k(row: dict, k: int, seed: int) -> dict:
    """Returns the row with its best response and k - 1 others, drawn; more hold all of fewer."""
    scores = np.array(row["scores"])
    best = int(np.argmax(scores))
    others = [i for i in range(len(scores)) if i != best]
    random.Random(f"{seed} {row['prompt']}").shuffle(others)
    kept = [best, *others[: k - 1]]
    return take(row, kept)


def main(argv: list[str]) -> int:
    args = study.make_parser("responses", __doc__, "responses").parse_args(argv[1:])
    out = args.out
    study.share_compiled(out)
    heldout, training = split_rows(whole_lines(DEMO), NUM_HELDOUT, NUM_PROMPTS, args.seeds)
    write_new(out / "rows/heldout.jsonl", heldout)
    tasks = []
    for seed, rows in enumerate(training):
        prompts = [{"prompt": row["prompt"]} for row in rows]
        write_new(out / f"rows/prompts-{seed}.jsonl", prompts[: 4 if args.smoke else NUM_PROMPTS])
        tasks.append(sample_task(out, seed, args.smoke))
    if run_tasks(tasks, jobs=args.jobs, env=dict(os.environ)):
        return 1
    for seed in range(args.seeds):
        sampled = whole_lines(out / f"samples/seed={seed}/sampled.jsonl")
        rows = [without_empty(row) for row in sampled]
        for k in RESPONSES:
            write_new(out / f"rows/k{k}-{seed}.jsonl", [with_k(row, k, seed) for row in rows])
    status = train(args)
    runs = study.runs_of(out, [f"K={k}" for k in RESPONSES])
    if not runs:
        return 1
    columns = {"best, held out, nats": study.evaluated("logratio/0")} | study.REWARD_COLUMNS
    name, seeds, *cells = study.reference_row(runs)
    text = results.markdown([*study.table(runs, columns), [name, seeds, "0", *cells]])
    (out / "responses.md").write_text(text)
    plot(out / "responses.png", runs)
    print(f"{text}\nwritten to {out}/responses.md and responses.png")
    return status


def sample_task(out: Path, seed: int, smoke: bool) -> Task:
    """Samples 16 responses to each prompt of a seed, with their scores."""
    folder, prompts = out / f"samples/seed={seed}", out / f"rows/prompts-{seed}.jsonl"
    flags = [f"--config=configs/sentiment.py:files={prompts}{',smoke' if smoke else ''}"]
    flags += [f"--config.seed={seed}", f"--config.generate.num_samples={SAMPLES}"]
    flags += ["--config.generate.batch_size=256", "--config.generate.scorer=vader"]
    command = sweep.nca_jax(
        "generate", *flags, f"--prompts={prompts}", f"--out={folder}/sampled.jsonl"
    )
    return Task(f"samples/seed={seed}", folder, ((command, "sampled.jsonl"),))


def train(args) -> int:
    """Trains and evaluates what is left of every K; returns the sweep's exit status."""
    rows = args.out / "rows"
    argv = ["sweep", f"--config=configs/sentiment.py{':smoke' if args.smoke else ''}"]
    argv += [*study.FLAGS, f"--config.data.eval_files={rows}/heldout.jsonl"]
    argv += ["--config.eval_every=0", "--config.data.choose=best_worst_random"]
    argv += [f"--config.optim.lr={LR}", f"--config.loss.beta={BETA}"]
    argv += [f"--config.loss.alpha={ALPHA}"]
    argv += [f"--config.data.batch_size={BATCH}", f"--config.steps={2 if args.smoke else STEPS}"]
    argv += [f"--out={args.out}", f"--seeds={args.seeds}", f"--jobs={args.jobs}"]
    argv += [f"--evaluate={2 if args.smoke else NUM_HELDOUT}", f"--judge={study.JUDGE}"]
    argv.append(f"--text={study.TEXT}")
    for k, row_len in ROW_LENS.items():
        fields = {"data.files": f"{rows}/k{k}-{{seed}}.jsonl", "data.num_responses": k}
        argv.append(study.point_flag(f"K={k}", fields | study.row_shape(row_len)))
    return sweep.main(argv)


def plot(path: Path, runs: Sequence[results.Run]) -> None:
    """Draws reward against K, a point a seed, and the line of their means."""
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    found = {
        int(setting.removeprefix("K=")): [run.evaluation for run in members if run.evaluation]
        for setting, members in results.by_setting(runs).items()
    }
    found = {k: evaluations for k, evaluations in found.items() if evaluations}
    for metric, color in (("reward", "C1"), ("judge", "C0")):
        points = [(k, x[metric]) for k, evaluations in found.items() for x in evaluations]
        if points:
            axes.scatter(*zip(*points, strict=True), color=color, alpha=0.4)
            means = [np.mean([x[metric] for x in evaluations]) for evaluations in found.values()]
            axes.plot(list(found), means, color=color, label=metric)
    axes.set(xscale="log", xlabel="responses a prompt, K", ylabel="mean score, held-out prompts")
    axes.set_xticks(RESPONSES, map(str, RESPONSES))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_main(main, interrupted=GOES_ON)
