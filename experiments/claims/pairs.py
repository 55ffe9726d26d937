r"""Claim (d): scores beat pairs on the same data.

    python -m experiments.claims.pairs --out=runs/claims/demo

The same prompts and responses, seen with their scores by NCA and InfoNCA, K = 4 at once, or as the
pairs that those scores make by DPO: the best with the worst, with each other one, and any two. Once
at equal prompts and steps, once at equal operations, where more pairs mean fewer steps.
Shares its runs with experiments.claims.chosen in the same --out. Writes pairs.md and pairs.png.
Paper: arXiv:2402.05369, section 5.
"""

from collections.abc import Sequence

import numpy as np

from experiments import plots, results
from experiments.claims import chosen, study
from experiments.claims.study import STEPS, pairs_arm
from experiments.tasks import GOES_ON
from nca_jax.checks import run_main

# Operations of a step beside those of K = 4: prompts of 54 tokens, responses of 25.
COST = {"best_worst": 0.66, "best_each": 1.92, "all": 3.85}
EQUAL_PROMPTS = (
    pairs_arm("dpo-best-each", "best_each", beta=chosen.BETA),
    pairs_arm("dpo-all-pairs", "all", beta=chosen.BETA),
)
EQUAL_FLOPS = tuple(
    pairs_arm(f"dpo-{name}-flops", how, steps=round(STEPS / COST[how]), beta=chosen.BETA)
    for name, how in (
        ("best-worst", "best_worst"),
        ("best-each", "best_each"),
        ("all-pairs", "all"),
    )
)
ARMS = (*chosen.ARMS, *EQUAL_FLOPS, *EQUAL_PROMPTS)


def main(argv: list[str]) -> int:
    args = study.make_parser("pairs", __doc__, "demo").parse_args(argv[1:])
    status = study.run_arms(args, ARMS)
    runs = study.runs_of(args.out, [arm.name for arm in ARMS])
    if not runs:
        return 1
    text = results.markdown(table(runs))
    (args.out / "pairs.md").write_text(text)
    if figure := plots.front(runs):
        figure.savefig(args.out / "pairs.png", dpi=150)
    print(f"{text}\nwritten to {args.out}/pairs.md and pairs.png")
    return status


def table(runs: Sequence[results.Run]) -> list[list[str]]:
    """Rewards with what they cost: prompts, steps, operations in units of those of NCA."""
    of_nca = [study.train_flops(run) for run in runs if run.setting == "nca"]
    unit = float(np.mean(of_nca)) if of_nca else 1.0
    cost = {
        "steps": lambda run: run.lines[-1]["step"],
        "operations / NCA's": lambda run: study.train_flops(run) / unit,
    }
    rows = study.table(runs, cost | study.REWARD_COLUMNS)
    name, seeds, *cells = study.reference_row(runs)
    return [*rows, [name, seeds, "0", "0", *cells]]


if __name__ == "__main__":
    run_main(main, interrupted=GOES_ON)
