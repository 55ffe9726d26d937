"""Tables and figure of the bake-off, from the evaluations that its runs left behind."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from experiments.bakeoff.settings import ARMS, BASELINE, NUM_TUNE, Prompts, Setting
from experiments.results import markdown
from nca_jax.checks import UserError
from nca_jax.files import read_json

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend)

DRAWS = 4000  # of the bootstrap
METRICS = {  # in evaluation.json at each prompt, and how a column of it is called
    "kl": "KL, nats",
    "judge": "second judge",
    "chosen_logp_drift": "best answer, nats",
    "accuracy_half_ties": "accuracy",
    "length": "length, tokens",
    "repetition": "repetition",
}


class Measured(NamedTuple):
    """What the runs of a setting were measured at, by metric."""

    setting: Setting
    seeds: int
    by_prompt: Mapping[str, np.ndarray]  # [seeds, prompts that are reported]
    text_perplexity: float  # of plain text, mean over seeds


class Interval(NamedTuple):
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def best_first(out: Path, prompts: Prompts, settings: Sequence[Setting]) -> list[Setting]:
    """Returns the settings whose seed 0 is evaluated, the best on the prompts to tune by first.

    Raises:
      UserError: none is.
    """
    found = {
        setting: float(np.mean(read_json(path)["by_prompt"][prompts.best_by][:NUM_TUNE]))
        for setting in settings
        if (path := out / setting.name / "seed=0/evaluation.json").exists()
    }
    if not found:
        raise UserError(
            f"No run of {', '.join(setting.name for setting in settings)} in {out} came to its "
            "end; train.log and stderr.log in their folders say why."
        )
    return sorted(found, key=found.__getitem__, reverse=True)


def read(out: Path, chosen: Mapping[str, Sequence[Setting]]) -> dict[str, list[Measured]]:
    """Returns {arm: what its settings were measured at, the best first}, as `measured`."""
    return {arm: [measured(out, setting) for setting in of_arm] for arm, of_arm in chosen.items()}


def measured(out: Path, setting: Setting) -> Measured:
    """Reads all seeds of a setting; of the held-out prompts those that are not tuned by."""
    contents = [
        read_json(path) for path in sorted((out / setting.name).glob("seed=*/evaluation.json"))
    ]
    names = contents[0]["by_prompt"]
    values = {
        name: np.array([content["by_prompt"][name][NUM_TUNE:] for content in contents])
        for name in names
    }
    plain = np.mean([content["metrics"]["text_perplexity"] for content in contents])
    return Measured(setting, len(contents), values, float(plain))


def interval(values: np.ndarray) -> Interval:
    """Returns the mean of [seeds, prompts] and what 95% of its bootstrap is between.

    Prompts and seeds are drawn again, each with replacement; one seed alone says nothing of seeds.
    """
    rng = np.random.default_rng(0)
    num_seeds, num_prompts = values.shape
    seeds = rng.integers(0, num_seeds, (DRAWS, num_seeds))
    of_prompts = rng.integers(0, num_prompts, (DRAWS, num_prompts))
    drawn = values[seeds[:, :, None], of_prompts[:, None, :]].mean(axis=(1, 2))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def difference(one: Measured, other: Measured, metric: str) -> Interval:
    """Returns `interval` of one less the other, over the seeds that both have."""
    seeds = min(one.seeds, other.seeds)
    return interval(one.by_prompt[metric][:seeds] - other.by_prompt[metric][:seeds])


def markdown_of(prompts: Prompts, found: Mapping[str, Sequence[Measured]]) -> str:
    """Returns the table of a set: each arm at its best value, and the reference."""
    best = {arm: of_arm[0] for arm, of_arm in found.items()}
    baseline = best[BASELINE]
    first = (prompts.best_by, "kl")
    others = [x for x in METRICS if x in baseline.by_prompt and x not in first]
    less = f"- {BASELINE}'s"
    header = ["loss", "tuned", "seeds", prompts.title, less, METRICS["kl"], less]
    rows = [[*header, *(METRICS[x] for x in others), "plain text, perplexity"]]
    for arm, one in best.items():
        row = [arm, f"{ARMS[arm].field} {one.setting.value:g}", str(one.seeds)]
        for metric in first:
            row.append(str(interval(one.by_prompt[metric])))
            row.append("" if arm == BASELINE else str(difference(one, baseline, metric)))
        row += [f"{one.by_prompt[x].mean():.3f}" for x in others]
        rows.append([*row, f"{one.text_perplexity:.2f}"])
    seen = baseline.by_prompt.get(f"{prompts.best_by}_reference")
    reference = ["reference", "", "", "0.5" if seen is None else str(interval(seen)), "", "0", ""]
    for metric in others:
        values = baseline.by_prompt.get(f"{metric}_reference")
        reference.append("" if values is None else f"{values.mean():.3f}")
    rows.append([*reference, ""])
    return f"{prompts.name}, learning rate {baseline.setting.lr:g}\n\n{markdown(rows)}"


def plot(path: Path, found: Sequence[tuple[Prompts, Mapping[str, Sequence[Measured]]]]) -> None:
    """Draws each set: what it is chosen by against KL; faint are the values that were not."""
    figure, panels = plt.subplots(
        1, len(found), figsize=(6.5 * len(found), 4.6), layout="constrained", squeeze=False
    )
    for axes, (prompts, arms) in zip(panels[0], found, strict=True):
        for i, (arm, of_arm) in enumerate(arms.items()):
            color = f"C{i}"
            for one in of_arm[1:]:
                place = [one.by_prompt[x].mean() for x in ("kl", prompts.best_by)]
                axes.plot(*place, "o", color=color, alpha=0.3, ms=4)
            kl, y = (interval(of_arm[0].by_prompt[x]) for x in ("kl", prompts.best_by))
            errors = [[[x.mean - x.low], [x.high - x.mean]] for x in (kl, y)]
            axes.errorbar(
                kl.mean, y.mean, xerr=errors[0], yerr=errors[1], fmt="o", color=color, label=arm,
                elinewidth=0.8,
            )  # fmt: skip
        axes.set(xlabel="KL(policy || reference), nats a response", ylabel=prompts.title)
        axes.set_title(prompts.name)
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)
