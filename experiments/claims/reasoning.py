r"""Claim (f): reasoning with a reward that is checked, in two on-policy rounds; NCA against DPO.

    python -m experiments.claims.reasoning --out=runs/claims/reasoning

A round is three commands: nca_jax.generate samples K = 8 answers to each problem of its own,
nca_jax.score marks them right or wrong, nca_jax.train learns from them: NCA from all eight, DPO
from a right and a wrong one. The second round starts from the policy of the first, which is then
the reference too. Accuracy is that of samples at temperature 1 on held-out problems.
Paper: arXiv:2402.05369, section 5. Writes reasoning.md and reasoning.png.
"""

import argparse
import itertools
import json
import os
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from experiments import results, sweep
from experiments.claims import study
from experiments.claims.rows import without_empty, write_new
from experiments.tasks import GOES_ON, Task, run_tasks
from nca_jax.checks import run_main
from nca_jax.files import whole_lines
from nca_jax.rewards.scorers import SCORERS

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend)

# Of seven kinds of task that were tried, the one that the model gets right most often: 20% of its
# samples; additions of two digits never, of one digit 11%, with examples in the prompt 4%.
PROBLEM = "Which number is larger, {a} or {b}? Answer with the number only."
NUM_PROBLEMS, NUM_HELDOUT = 64, 32  # of a round; held out, the same for all seeds
K, BATCH, STEPS = 8, 4, 12
LOSSES = ("nca", "dpo")
BETA, ALPHA = 0.3, 0.25  # of scores that are 0 or 1
CHECK = f"command:{sys.executable} -m experiments.claims.reasoning --check"
FLAGS = (
    "--config.data.eval_fraction=0",
    "--config.data.max_response_len=16",
    "--config.data.row_len=704",
    "--config.loss.logits_chunk=352",
    f"--config.data.batch_size={BATCH}",
    f"--config.loss.beta={BETA}",
    "--config.generate.max_new_tokens=16",
    "--config.generate.batch_size=512",
    "--config.log.tensorboard=False",
)


def make_problems(num: int, seed: int) -> list[dict]:
    """Returns different problems, each with its "answer"; held-out ones are those of seed -1."""
    every = list(itertools.permutations(range(10, 100), 2))
    heldout = random.Random(0).sample(every, NUM_HELDOUT)
    if seed >= 0:
        rest = sorted(set(every) - set(heldout))
        heldout = random.Random(seed + 1).sample(rest, num)
    return [{"prompt": PROBLEM.format(a=a, b=b), "answer": max(a, b)} for a, b in heldout[:num]]


def check() -> None:
    """Scores JSON lines of "prompt" and "response" from stdin: the command of CHECK.

    It is the scorer "answer", which knows the answer from the prompt alone.
    """
    for line in sys.stdin:
        row = json.loads(line)
        _, larger = the_two(row["prompt"])
        (score,) = SCORERS["answer"]([row | {"answer": larger}], [row["response"]]).tolist()
        print(json.dumps({"score": score}))


def the_two(prompt: str) -> list[int]:
    """Returns the smaller and the larger number of a problem."""
    return sorted(map(int, re.findall(r"\d+", prompt)))


def teaching(rows: Sequence[dict]) -> list[dict]:
    """Returns the rows with a right and a wrong response: the others teach nothing."""
    rows = [without_empty(row) for row in rows]
    return [row for row in rows if len(set(row["scores"])) > 1]


def main(argv: list[str]) -> int:
    parser = study.make_parser("reasoning", __doc__, "reasoning")
    parser.add_argument("--check", action="store_true", help="be the scorer: see nca_jax.score")
    args = parser.parse_args(argv[1:])
    if args.check:
        check()
        return 0
    study.share_compiled(args.out)
    status = make_rounds(args)
    runs = {
        (round_, loss): results.find_runs([folder])
        for round_ in (1, 2)
        for loss in LOSSES
        if any((folder := args.out / f"round{round_}" / loss).rglob("metrics.jsonl"))
    }
    if not runs:
        return 1
    text = results.markdown(table(runs))
    (args.out / "reasoning.md").write_text(text)
    plot(args.out / "reasoning.png", runs)
    print(f"{text}\nwritten to {args.out}/reasoning.md and reasoning.png")
    return status


def make_rounds(args: argparse.Namespace) -> int:
    """Runs what is left of both rounds; returns 1 where something is broken."""
    out, smoke, seeds = args.out, args.smoke, range(args.seeds)
    write_new(out / "problems/heldout.jsonl", make_problems(NUM_HELDOUT, -1))
    for round_ in (1, 2):
        for seed in seeds:
            problems = make_problems(NUM_PROBLEMS, 10 * seed + round_)
            write_new(out / f"problems/round{round_}-{seed}.jsonl", problems)

    tasks = [sample_task(out, f"round1-{seed}", f"round1-{seed}", seed, smoke) for seed in seeds]
    heldout = sample_task(out, "heldout", "heldout", 0, smoke)
    if run_tasks([heldout, *tasks], jobs=args.jobs, env=dict(os.environ)):
        return 1
    answered = [without_empty(row) for row in scored(out, "heldout")]
    answered = [row for row in answered if len(row["responses"]) > 1]
    write_new(out / "rows/heldout.jsonl", answered)
    for seed in seeds:
        write_new(out / f"rows/round1-{seed}.jsonl", teaching(scored(out, f"round1-{seed}")))
    if train_round(args, 1):
        return 1

    tasks = []
    for loss in LOSSES:
        for seed in seeds:
            workdir = out / f"round1/{loss}/seed={seed}"
            task = sample_task(out, f"round2-{loss}-{seed}", f"round2-{seed}", seed, smoke, workdir)
            export = sweep.nca_jax("export", f"--workdir={workdir}", f"--out={task.folder}/policy")
            tasks.append(task._replace(steps=((export, "policy/config.json"), *task.steps)))
    if run_tasks(tasks, jobs=args.jobs, env=dict(os.environ)):
        return 1
    for loss in LOSSES:
        for seed in seeds:
            name = f"round2-{loss}-{seed}"
            write_new(out / f"rows/{name}.jsonl", teaching(scored(out, name)))
    return train_round(args, 2)


def sample_task(
    out: Path, name: str, problems: str, seed: int, smoke: bool, workdir: Path | None = None
) -> Task:
    """Samples K responses to each problem, of the policy in a workdir or of the model, scored."""
    folder = out / "samples" / name
    file = f"{out}/problems/{problems}.jsonl"
    flags = [f"--config=configs/sentiment.py:files={file}{',smoke' if smoke else ''}", *FLAGS]
    flags += [f"--config.seed={seed}", f"--config.generate.num_samples={K}"]
    flags += ["--config.generate.scorer=", f"--workdir={workdir or ''}"]
    generated = f"{folder}/generated.jsonl"
    generate = sweep.nca_jax("generate", *flags, f"--prompts={file}", f"--out={generated}")
    scorer = "length" if smoke else CHECK  # a random model is never right
    out_flag = f"--out={folder}/scored.jsonl"
    score = sweep.nca_jax("score", f"--rows={generated}", out_flag, f"--scorer={scorer}")
    return Task(name, folder, ((generate, "generated.jsonl"), (score, "scored.jsonl")))


def scored(out: Path, name: str) -> list[dict]:
    return whole_lines(out / "samples" / name / "scored.jsonl")


def train_round(args: argparse.Namespace, round_: int) -> int:
    """Trains and evaluates both losses on the rows of a round; returns the sweep's exit status."""
    out, smoke = args.out, args.smoke
    argv = ["sweep", "--config=configs/sentiment.py" + (":smoke" if smoke else ""), *FLAGS]
    argv += [f"--out={out}/round{round_}", f"--text={study.TEXT}"]
    argv += [f"--seeds={args.seeds}", f"--jobs={args.jobs}"]
    argv += [f"--config.data.eval_files={out}/rows/heldout.jsonl"]
    argv += [f"--config.generate.scorer={'length' if smoke else CHECK}"]
    argv += [
        f"--config.generate.num_samples={study.SAMPLES}",
        f"--evaluate={2 if smoke else NUM_HELDOUT}",
    ]
    for loss in LOSSES:
        fields = {"config.algo": loss, "steps": 2 if smoke else STEPS}
        if loss == "nca":
            fields |= {"data.num_responses": K, "loss.alpha": ALPHA}
        if round_ == 1:
            fields["data.files"] = f"{out}/rows/round1-{{seed}}.jsonl"
        else:
            fields["data.files"] = f"{out}/rows/round2-{loss}-{{seed}}.jsonl"
            fields["model.init_from"] = f"{out}/samples/round2-{loss}-{{seed}}/policy"
        argv.append(study.point_flag(loss, fields))
    return sweep.main(argv)


def table(runs: dict[tuple[int, str], list[results.Run]]) -> list[list[str]]:
    """Returns accuracy by round and loss, before and after, with KL and what may have broken."""
    columns = {
        "accuracy before": study.evaluated("reward_reference"),
        "accuracy after": study.evaluated("reward"),
        "names one of the two": lambda run: named(run)[0],
        "right, of those (chance 0.5)": lambda run: named(run)[1],
        "KL to the round's start, nats": study.evaluated("kl"),
        "plain text, perplexity": study.evaluated("text_perplexity"),
        "length, tokens": study.evaluated("length"),
        "repetition": study.evaluated("repetition"),
    }
    rows = [["round", *study.table([], columns)[0]]]
    for (round_, _), members in runs.items():
        rows += [[str(round_), *row] for row in study.table(members, columns)[1:]]
    return rows


def named(run: results.Run) -> tuple[float | None, float | None]:
    """Tells what an accuracy is made of, from the policy's samples.

    Returns the share of samples that give one of the two numbers as the answer, and the share of
    the right one among those: a model that can answer, but not compare, is at 1 and 0.5.
    """
    samples = [
        (prompt, text)
        for prompt, answers in run.samples.get("policy", {}).items()
        for text, _ in answers
    ]
    if not samples:
        return None, None
    prompts, texts = zip(*samples, strict=True)
    numbers = zip(*map(the_two, prompts), strict=True)  # all the smaller ones, all the larger ones
    wrong, right = (
        int(SCORERS["answer"]([{"answer": number} for number in of_prompts], texts).sum())
        for of_prompts in numbers
    )
    return (wrong + right) / len(samples), right / (wrong + right) if wrong + right else None


def plot(path: Path, runs: dict[tuple[int, str], list[results.Run]]) -> None:
    """Draws accuracy on held-out problems after each round, a line a seed."""
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for loss, color in zip(LOSSES, ("C1", "C3"), strict=True):
        rounds = [[x.evaluation for x in runs.get((n, loss), ()) if x.evaluation] for n in (1, 2)]
        for seed, first in enumerate(rounds[0]):
            heights = [first["reward_reference"], first["reward"]]
            heights += [x["reward"] for x in rounds[1][seed : seed + 1]]
            label = loss if seed == 0 else None
            axes.plot(range(len(heights)), heights, "o-", color=color, label=label)
    axes.set(xlabel="round", ylabel="accuracy, held-out problems", xticks=(0, 1, 2))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_main(main, interrupted=GOES_ON)
