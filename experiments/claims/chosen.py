r"""Claim (b): DPO and InfoNCA push the best response down, NCA holds it.

    python -m experiments.claims.chosen --out=runs/claims/demo

Trains SmolLM2-135M on the demo's rows (its own samples, scored by VADER) with each loss, once over
96 prompts, and follows log pi - log pi_ref by the rank of a response: on held-out rows, and on the
rows of each step before its update, which are new to the policy too.
Paper: arXiv:2402.05369, sections 3 and 4. Writes chosen.md and chosen.png; see README.md.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

from experiments import results
from experiments.claims import study
from experiments.claims.study import pairs_arm, scores_arm
from experiments.tasks import GOES_ON
from nca_jax.checks import run_main

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend)

BETA = 1.0  # where r moves by about 1 while a policy moves by nats: see README.md
ARMS = (
    scores_arm("nca", "nca", beta=BETA),
    scores_arm("infonca", "infonca", beta=BETA),
    pairs_arm("dpo-best-worst", "best_worst", beta=BETA),
)


def main(argv: list[str]) -> int:
    args = study.make_parser("chosen", __doc__, "demo").parse_args(argv[1:])
    status = study.run_arms(args, ARMS)
    runs = study.runs_of(args.out, [arm.name for arm in ARMS])
    if not runs:
        return 1
    text = "\n".join(results.markdown(rows) for rows in tables(runs))
    (args.out / "chosen.md").write_text(text)
    plot(args.out / "chosen.png", runs)
    print(f"{text}\nwritten to {args.out}/chosen.md and chosen.png")
    return status


def tables(runs: Sequence[results.Run]) -> list[list[list[str]]]:
    """Returns the table of likelihoods and that of rewards."""
    drift = {
        "held out: best, nats": study.evaluated("logratio/0"),
        "held out: worst": worst(study.evaluated),
        "new rows, last half: best": study.last_half("logratio/0"),
        "new rows, last half: worst": worst(study.last_half),
        "implicit reward of the best - the worst, held out": held_out_margin,
    }
    rewards = study.table(runs, study.REWARD_COLUMNS)
    return [study.table(runs, drift), [*rewards, study.reference_row(runs)]]


def worst(of_metric: Callable) -> Callable[[results.Run], float | None]:
    """The log-ratio of the worst response, whatever K is."""

    def value_of(run: results.Run) -> float | None:
        ranks = [name for name in run.lines[-1] if name.startswith("logratio/")]
        return of_metric(f"logratio/{len(ranks) - 1}")(run)

    return value_of


def held_out_margin(run: results.Run) -> float | None:
    """Log-ratio of the best above that of the worst, nats: what a loss is there to raise."""
    best, last = study.evaluated("logratio/0")(run), worst(study.evaluated)(run)
    return None if best is None or last is None else best - last


def plot(path: Path, runs: Sequence[results.Run]) -> None:
    """Draws the log-ratio of best and worst over steps; strong lines are means over seeds."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    titles = {"eval": "held-out rows", "train": "rows of each step, before its update"}
    for axes, (split, title) in zip(panels, titles.items(), strict=True):
        for color, (arm, members) in zip(
            ("C1", "C0", "C3"), results.by_setting(runs).items(), strict=False
        ):
            for rank, style in (("best", "-"), ("worst", ":")):
                _draw(axes, members, split, rank, color=color, ls=style, label=f"{arm}, {rank}")
        axes.axhline(0, color="black", lw=0.8)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("log pi - log pi_ref, nats")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(axes, members: Sequence[results.Run], split: str, rank: str, *, label: str, **how):
    series = []
    for run in members:
        lines = [line for line in run.lines if line["split"] == split]
        ranks = sum(name.startswith("logratio/") for name in run.lines[-1])
        name = "logratio/0" if rank == "best" else f"logratio/{ranks - 1}"
        series.append({line["step"]: line[name] for line in lines})
    steps = sorted(set.intersection(*map(set, series)))
    axes.plot(steps, [sum(x[s] for x in series) / len(series) for s in steps], label=label, **how)
    for one in series if len(series) > 1 else ():
        axes.plot(steps, [one[s] for s in steps], alpha=0.2, **how)


if __name__ == "__main__":
    run_main(main, interrupted=GOES_ON)
