r"""Claim (e): alpha and beta: what they buy in reward and pay in KL, and how sure a choice must be.

    python -m experiments.claims.temperatures --out=runs/claims/demo

NCA, InfoNCA and DPO (best with worst) over a hundredfold range of beta, and NCA and InfoNCA over
alpha; one pass over the 96 prompts of a seed. The middle of both is claim (b), whose runs in the
same --out it shares. Writes temperatures.md and temperatures.png.
Paper: arXiv:2402.05369, section 5.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

from experiments import results
from experiments.claims import chosen, study
from experiments.claims.study import ALPHA, Arm, pairs_arm, scores_arm
from experiments.tasks import GOES_ON
from nca_jax.checks import run_main

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend)

COLORS = {"nca": "C1", "infonca": "C0", "dpo": "C3"}  # by loss
MARKERS = {0.0: "o", ALPHA: "o", 0.02: "v", 0.5: "^"}  # by alpha


class Setting(NamedTuple):
    loss: str
    beta: float
    alpha: float  # 0: DPO's hard labels


def make_settings() -> dict[str, Setting]:
    """Returns {name of an arm: its setting}: those of claim (b), then other betas, other alphas."""
    middle = (("nca", ALPHA), ("infonca", ALPHA), ("dpo", 0.0))
    names = [arm.name for arm in chosen.ARMS]
    settings = {
        name: Setting(loss, chosen.BETA, alpha)
        for name, (loss, alpha) in zip(names, middle, strict=True)
    }
    others = [Setting(loss, beta, alpha) for beta in (0.1, 10.0) for loss, alpha in middle]
    others += [Setting(loss, chosen.BETA, x) for x in (0.02, 0.5) for loss in ("nca", "infonca")]
    return settings | {f"{x.loss},beta={x.beta:g},alpha={x.alpha:g}": x for x in others}


SETTINGS = make_settings()


def make_arms() -> list[Arm]:
    return [
        pairs_arm(name, "best_worst", beta=beta)
        if loss == "dpo"
        else scores_arm(name, loss, beta=beta, alpha=alpha)
        for name, (loss, beta, alpha) in SETTINGS.items()
    ]


def main(argv: list[str]) -> int:
    args = study.make_parser("temperatures", __doc__, "demo").parse_args(argv[1:])
    status = study.run_arms(args, make_arms())
    runs = study.runs_of(args.out, SETTINGS)
    if not runs:
        return 1
    columns = {"best, held out, nats": study.evaluated("logratio/0")} | study.REWARD_COLUMNS
    name, seeds, *cells = study.reference_row(runs)
    table = [*study.table(runs, columns), [name, seeds, "0", *cells]]
    (args.out / "temperatures.md").write_text(results.markdown(table))
    plot(args.out / "temperatures.png", runs)
    print(f"{results.markdown(table)}\nwritten to {args.out}/temperatures.md and temperatures.png")
    return status


def plot(path: Path, runs: Sequence[results.Run]) -> None:
    """Draws reward against KL: a colour a loss, a size a beta; low alpha v, high ^."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    betas = sorted({setting.beta for setting in SETTINGS.values()})
    for setting, members in results.by_setting(runs).items():
        done = [run.evaluation for run in members if run.evaluation]
        if not done:
            continue
        kl, reward = (results.mean_and_sd([x[name] for x in done]) for name in ("kl", "reward"))
        loss, beta, alpha = SETTINGS[setting]
        axes.errorbar(
            kl[0],
            reward[0],
            xerr=kl[1],
            yerr=reward[1],
            fmt=MARKERS[alpha],
            ms=5 + 3 * betas.index(beta),
            color=COLORS[loss],
            label=f"{loss}, beta {beta:g}, alpha {alpha:g}",
        )
    axes.set(xlabel="KL(policy || reference), nats a response", ylabel="mean reward")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_main(main, interrupted=GOES_ON)
