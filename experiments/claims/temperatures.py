r"""Claim (e): alpha and beta: what they buy in reward and pay in KL, and how sure a choice must be.

    python -m experiments.claims.temperatures --out=runs/claims/demo --seeds=1

NCA, InfoNCA and DPO (best with worst) over a hundredfold range of beta, and NCA and InfoNCA over
alpha; one pass over the 48 prompts of a seed. Writes temperatures.md and temperatures.png.
Paper: arXiv:2402.05369, section 5.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from experiments import results
from experiments.claims import study
from experiments.claims.study import ALPHA, PASSES, STEPS, Arm, pairs_arm, scores_arm
from nca_jax.checks import run_main

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend)

BETAS = (0.3, 3.0, 0.03)  # at ALPHA
ALPHAS = (0.02, 0.5)  # at the first beta
ONE_PASS = STEPS // PASSES
LOSSES = ("nca", "infonca", "dpo")


def make_arms() -> list[Arm]:
    """Returns the arms: NCA and InfoNCA over beta, DPO over beta, then those of alpha."""
    temperatures = [(beta, ALPHA) for beta in BETAS]
    arms = [scores_arm_of(loss, *x) for x in temperatures for loss in LOSSES[:2]]
    arms += [
        pairs_arm(name_of("dpo", beta, 0), "best_worst", beta=beta, steps=ONE_PASS)
        for beta in BETAS
    ]
    return arms + [scores_arm_of(loss, BETAS[0], x) for x in ALPHAS for loss in LOSSES[:2]]


def scores_arm_of(loss: str, beta: float, alpha: float) -> Arm:
    name = name_of(loss, beta, alpha)
    return scores_arm(name, loss, beta=beta, alpha=alpha, steps=ONE_PASS)


def name_of(loss: str, beta: float, alpha: float) -> str:
    return f"loss={loss},beta={beta:g},alpha={alpha:g}"


def main(argv: list[str]) -> int:
    args = study.parse_args(argv, "temperatures", __doc__.splitlines()[0], "demo")
    arms = make_arms()
    status = study.run_arms(args, arms, "--config.eval_every=0")
    runs = study.runs_of(args.out, arms)
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
    """Draws reward against KL: a colour a loss, a size a beta, hollow where alpha is not ALPHA."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for setting, members in results.by_setting(runs).items():
        of_arm = dict(pair.split("=") for pair in setting.split(","))
        done = [run.evaluation for run in members if run.evaluation]
        if not done:
            continue
        kl, reward = (results.mean_and_sd([x[name] for x in done]) for name in ("kl", "reward"))
        beta, alpha = float(of_arm["beta"]), float(of_arm["alpha"])
        color = f"C{(1, 0, 3)[LOSSES.index(of_arm['loss'])]}"
        axes.errorbar(
            kl[0],
            reward[0],
            xerr=kl[1],
            yerr=reward[1],
            fmt="o",
            ms=5 + 3 * sorted(BETAS).index(beta),
            color=color,
            mfc=color if alpha in (0, ALPHA) else "white",
            label=setting.replace(",", ", "),
        )
    axes.set(xlabel="KL(policy || reference), nats a response", ylabel="mean reward")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run_main(main)
