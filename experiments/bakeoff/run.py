r"""The bake-off: nine losses on the same prompts, each tuned alike, with intervals.

    python -m experiments.bakeoff.run --rows=alpaca_rewards.jsonl.gz --out=runs/bakeoff

Two sets of prompts with four scored answers each: SmolLM2-135M's own samples, scored by VADER
(those of the demo), and real ones of ten models, scored by GPT-4 (experiments/data makes the rows).
Adapters learn once from 48 prompts, 4 a step, in three rounds:

    1. NCA, in the middle of its grid, at three learning rates. All take the best of them.
    2. Every loss at three values of its beta, seed 0.
    3. Every loss at the best of them, all seeds.

What is best is told by a third of the held-out prompts, what is reported is of the other two:
reward on the model's own samples (on real answers, where nothing scores a sample, the accuracy of
implicit rewards) and KL, each with its difference from NCA's on the same prompts and random keys.
Intervals are of 95%, by a bootstrap over prompts and seeds.

--sets    own, real or both; real wants --rows
--seeds   of the third round; more add to what is there. The same command goes on after any stop
--smoke   tries it on a tiny model

Writes bakeoff.md and bakeoff.png.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from experiments import sweep
from experiments.bakeoff import settings, table
from experiments.bakeoff.settings import ARMS, Prompts, Setting
from experiments.claims import study
from experiments.tasks import GOES_ON, Task, run_tasks
from nca_jax.checks import UserError, run_main

SETS = {"own": settings.OWN, "real": settings.REAL}


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    study.share_compiled(args.out)
    status, said, found = 0, [], []
    for name in args.sets:
        prompts = SETS[name]
        rows = settings.own_rows() if name == "own" else settings.real_rows(args.rows)
        settings.write_rows(args.out / name / "rows", rows, args.seeds)
        chosen, broken = compare(args, prompts)
        status |= broken
        of_arms = table.read(args.out / name, chosen)
        found.append((prompts, of_arms))
        said.append(table.markdown_of(prompts, of_arms))
    text = "\n".join(said)
    (args.out / "bakeoff.md").write_text(text)
    table.plot(args.out / "bakeoff.png", found)
    print(f"{text}\nwritten to {args.out}/bakeoff.md and bakeoff.png")
    return status


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="experiments.bakeoff.run", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bakeoff"))
    parser.add_argument("--rows", type=Path, help="made by experiments/data")
    parser.add_argument("--sets", default="own,real")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, two steps")
    args = parser.parse_args(argv[1:])
    args.sets = args.sets.split(",")
    if unknown := [name for name in args.sets if name not in SETS]:
        raise UserError(f"--sets: there is no {unknown[0]!r}; there are {', '.join(SETS)}.")
    if "real" in args.sets and args.rows is None:
        raise UserError("The real answers want --rows; without them set --sets=own.")
    return args


def compare(args: argparse.Namespace, prompts: Prompts) -> tuple[dict[str, list[Setting]], int]:
    """Runs what is left of the three rounds.

    Returns:
      {arm: its settings, the best first}, and 1 where something is broken.
    """
    out = args.out / prompts.name
    middle = ARMS[settings.BASELINE].values[1]
    rates = [Setting(settings.BASELINE, middle, lr) for lr in settings.RATES]
    status = run(args, prompts, rates, seeds=1)
    lr = table.best_first(out, prompts, rates)[0].lr
    grid = {arm: [Setting(arm, value, lr) for value in ARMS[arm].values] for arm in ARMS}
    status |= run(args, prompts, sum(grid.values(), []), seeds=1)
    chosen = {arm: table.best_first(out, prompts, of_arm) for arm, of_arm in grid.items()}
    status |= run(args, prompts, [of_arm[0] for of_arm in chosen.values()], seeds=args.seeds)
    return chosen, status


def run(
    args: argparse.Namespace, prompts: Prompts, wanted: Sequence[Setting], *, seeds: int
) -> int:
    """Trains and evaluates what is left of some settings; returns 1 where something is broken."""
    out = args.out / prompts.name
    config = prompts.smoke_config if args.smoke else prompts.config
    argv = ["sweep", f"--config={config}files={out}/rows/train-{{seed}}.jsonl", *prompts.flags]
    argv += [f"--config.generate.num_samples={prompts.samples}"]
    argv += [f"--config.data.eval_files={out}/rows/heldout.jsonl", f"--out={out}"]
    argv += [f"--seeds={seeds}", f"--jobs={args.jobs}"]
    for setting in wanted:
        fields = settings.point_of(prompts, setting) | ({"steps": 2} if args.smoke else {})
        argv.append(study.point_flag(setting.name, fields))
    status = sweep.main(argv)
    tasks = [
        evaluate_task(args, prompts, out / setting.name / f"seed={seed}")
        for setting in wanted
        for seed in range(seeds)
    ]
    return int(bool(status or run_tasks(tasks, jobs=args.jobs, env=dict(os.environ))))


def evaluate_task(args: argparse.Namespace, prompts: Prompts, workdir: Path) -> Task:
    """Evaluates a run on all four held-out answers and its own samples, beside where it began."""
    at_once = prompts.samples * settings.NUM_HELDOUT
    fields = {"data.num_responses": settings.K, "generate.batch_size": at_once}
    fields |= study.row_shape(prompts.row_lens[settings.K])
    if args.smoke:
        fields |= {"generate.max_new_tokens": 4, "generate.scorer": "length"}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    flags += [f"--workdir={workdir}", "--reference=start", f"--text={study.TEXT}"]
    flags += [f"--num_prompts={settings.NUM_HELDOUT}", f"--judge={prompts.judge}"]
    command = sweep.nca_jax("evaluate", *flags)
    name = f"evaluate {workdir.parent.name}/{workdir.name}"
    return Task(name, workdir, ((command, "evaluation.json"),))


if __name__ == "__main__":
    run_main(main, interrupted=GOES_ON)
