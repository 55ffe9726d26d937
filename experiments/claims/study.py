"""What the claims on the demo's rows share: arms, the sweep that runs them, their table.

An arm is a setting with a name: a loss, the rows that it sees, its temperatures. All arms start
from SmolLM2-135M-Instruct, and share a cached reference where they share rows.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import results, sweep
from experiments.claims.rows import DEMO, pairs, split_rows, write_new
from nca_jax.files import whole_lines
from nca_jax.flops import head_params, trunk_params
from nca_jax.model_config import MODELS

NUM_TRAIN, NUM_HELDOUT = 96, 16  # prompts of a seed; held out, the same for all seeds
SAMPLES = 8  # responses to a held-out prompt, of the policy and of the reference
BATCH = 4  # prompts a step
STEPS = NUM_TRAIN // BATCH  # one pass: every row of a step is new to the policy
ALPHA = 0.1  # scores spread by 0.33 within a prompt
PAIRS_OF_FOUR = {"best_worst": 1, "best_each": 3, "all": 6}
FLAGS = (
    "--config.reference.kind=cached",
    "--config.data.eval_fraction=0",
    "--config.optim.lr=1e-5",
    f"--config.eval_every={STEPS // 2}",
    "--config.data.row_len=704",
    "--config.loss.logits_chunk=352",
    f"--config.generate.num_samples={SAMPLES}",
    f"--config.generate.batch_size={NUM_HELDOUT * SAMPLES}",
    "--config.log.tensorboard=False",
)
JUDGE = f"command:{sys.executable} -m experiments.claims.judge"
TEXT = Path(__file__).with_name("plain.txt")


class Arm(NamedTuple):
    name: str
    changes: dict[str, object]  # {field of the config or config.ARGUMENT: value}


def scores_arm(
    name: str, loss: str, *, beta: float, alpha: float = ALPHA, steps: int = STEPS
) -> Arm:
    """An arm that sees all K = 4 responses of a prompt and their scores."""
    changes = {"config.algo": loss, "data.batch_size": BATCH, "steps": steps}
    return Arm(name, changes | {"loss.beta": beta, "loss.alpha": alpha})


def pairs_arm(name: str, how: str, *, beta: float, steps: int = STEPS) -> Arm:
    """An arm of DPO on the pairs that `how` makes; a step has the pairs of BATCH prompts."""
    changes = {"config.algo": "dpo", "steps": steps, "loss.beta": beta}
    changes["data.batch_size"] = BATCH * PAIRS_OF_FOUR[how]
    if how != "best_worst":  # that one the config makes of the rows of four
        changes["data.files"] = f"{{rows}}/{how}-{{seed}}.jsonl"
    return Arm(name, changes)


def make_parser(name: str, doc: str, folder: str) -> argparse.ArgumentParser:
    """Returns a parser of --out (by default runs/claims/FOLDER), --seeds, --jobs and --smoke."""
    parser = argparse.ArgumentParser(
        prog=f"experiments.claims.{name}", description=doc.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/claims") / folder)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, two steps")
    return parser


def share_compiled(out: Path) -> None:
    """Lets all commands of a claim share their compiled programs, unless the user says where."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out.absolute() / "compiled"))


def point_flag(name: str, fields: Mapping[str, object]) -> str:
    """Returns the flag by which the sweep runs a setting with a name."""
    return f"--point={name}: " + ";".join(f"{field}={value}" for field, value in fields.items())


def row_shape(row_len: int) -> dict[str, int]:
    """Returns the fields of rows of `row_len` tokens, with logits for half of one at a time."""
    return {"data.row_len": row_len, "loss.logits_chunk": row_len // 2}


def write_all_rows(out: Path, num_seeds: int) -> None:
    """Writes the held-out rows, and each seed's rows of four and of pairs."""
    heldout, training = split_rows(whole_lines(DEMO), NUM_HELDOUT, NUM_TRAIN, num_seeds)
    write_new(out / "rows/heldout.jsonl", heldout)
    for seed, rows in enumerate(training):
        write_new(out / f"rows/train-{seed}.jsonl", rows)
        for how in ("best_each", "all"):
            write_new(
                out / f"rows/{how}-{seed}.jsonl", [pair for row in rows for pair in pairs(row, how)]
            )


def run_arms(args: argparse.Namespace, arms: Sequence[Arm], *flags: str) -> int:
    """Trains and evaluates what is left of the arms; returns the exit status of the sweep."""
    write_all_rows(args.out, args.seeds)
    rows = args.out / "rows"
    own = [
        f"--config=configs/sentiment.py:files={rows}/train-{{seed}}.jsonl",
        f"--config.data.eval_files={rows}/heldout.jsonl",
    ]
    argv = ["sweep", *own, *FLAGS, *flags, f"--out={args.out}", f"--seeds={args.seeds}"]
    argv += [f"--jobs={args.jobs}", f"--judge={JUDGE}", f"--text={TEXT}"]
    argv.append(f"--evaluate={2 if args.smoke else NUM_HELDOUT}")
    for name, changes in arms:
        if args.smoke:
            changes = changes | {"config.smoke": True, "steps": 2, "generate.max_new_tokens": 4}
        argv.append(point_flag(name, changes).replace("{rows}", str(rows)))
    share_compiled(args.out)
    return sweep.main(argv)


def runs_of(out: Path, names: Iterable[str]) -> list[results.Run]:
    """Returns the runs that have begun, arm by arm as they are named."""
    begun = [out / name for name in names if any((out / name).rglob("metrics.jsonl"))]
    return [run for folder in begun for run in results.find_runs([folder])]


def table(
    runs: Sequence[results.Run], columns: Mapping[str, Callable[[results.Run], float | None]]
) -> list[list[str]]:
    """Returns a header and a row an arm: mean ± sd over the seeds that have a value, "-" for none.

    Args:
      columns: {title: value of a run, None where it has none}.
    """
    rows = [["arm", "seeds", *columns]]
    for name, members in results.by_setting(runs).items():
        cells = []
        for value_of in columns.values():
            values = [x for run in members if (x := value_of(run)) is not None]
            cells.append(results.with_spread(values) if values else "-")
        rows.append([name, str(sum(bool(run.evaluation) for run in members)), *cells])
    return rows


def evaluated(metric: str) -> Callable[[results.Run], float | None]:
    return lambda run: run.evaluation.get(metric)


def gain(run: results.Run) -> float | None:
    """Mean reward above that of the reference, whose samples came from the same random keys."""
    if "reward" not in run.evaluation:
        return None
    return run.evaluation["reward"] - run.evaluation["reward_reference"]


# What every reward is shown with.
REWARD_COLUMNS = {
    "reward": evaluated("reward"),
    "gain": gain,
    "KL, nats": evaluated("kl"),
    "judge": evaluated("judge"),
    "plain text, perplexity": evaluated("text_perplexity"),
    "length, tokens": evaluated("length"),
    "repetition": evaluated("repetition"),
}


def reference_row(runs: Sequence[results.Run]) -> list[str]:
    """Returns the row of the reference, by the columns of `REWARD_COLUMNS`; seeds count once."""
    by_seed = {}
    for run in runs:
        if run.evaluation:
            by_seed.setdefault(run.evaluation["reward_reference"], run.evaluation)
    found = list(by_seed.values())

    def cell(metric: str) -> str:
        values = [evaluation[metric] for evaluation in found if metric in evaluation]
        return results.with_spread(values) if values else "-"

    cells = [cell("reward_reference"), "0", "0", cell("judge_reference")]
    cells += [cell(f"{x}_reference") for x in ("text_perplexity", "length", "repetition")]
    return ["reference", str(len(found)), *cells]


def train_flops(run: results.Run, model: str = "smollm2_135m") -> float:
    """Operations that the steps of a run need, attention's own products left out.

    6 a trunk parameter and needed token, 8 a head parameter and scored token: see nca_jax.flops.
    The reference is cached, so it costs a run nothing.
    """
    lines = [line for line in run.lines if line["split"] == "train"]
    needed, scored = (sum(x[f"{name}_tokens"] for x in lines) for name in ("needed", "scored"))
    config = MODELS[model]
    return 6 * trunk_params(config) * needed + 8 * head_params(config) * scored


def last_half(metric: str) -> Callable[[results.Run], float | None]:
    """The mean of a training metric over the last half of the steps, each before its update."""

    def value_of(run: results.Run) -> float | None:
        lines = [line[metric] for line in run.lines if line["split"] == "train"]
        return float(np.mean(lines[len(lines) // 2 :])) if lines else None

    return value_of
