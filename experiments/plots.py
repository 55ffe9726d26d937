"""Figures of runs: reward against KL and curves over steps, with mean and spread over seeds.

A line is the mean over the seeds of a setting and its band one standard deviation to either side,
where there are three seeds or more: two say too little of a spread to draw it. Losses of different
kinds are in different units, so each kind has a panel of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend)
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from experiments.results import (  # noqa: E402
    BAND,
    Run,
    best_of_n,
    by_setting,
    kind_of_loss,
    mean_and_sd,
)

# Panels of the curves: title, split and metrics. One of several metrics is for a single setting.
CURVES = (
    ("held-out accuracy, chance 0.5", "eval", ("accuracy_half_ties",)),
    ("held-out log-ratio of the best response, nats", "eval", ("chosen_logp_drift",)),
    ("held-out loss above its floor, nats", "eval", ("excess",)),
    ("accuracy, chance 0.5", "train", ("accuracy_half_ties",)),
    ("log-ratio of the best response, nats", "train", ("chosen_logp_drift",)),
    ("loss above its floor, nats", "train", ("excess",)),
    ("loss and its floor, nats", "train", ("loss", "floor")),
    ("implicit reward by rank, nats", "train", tuple(f"rewards/{k}" for k in range(16))),
)
ROUNDS = (  # panels of the samples of rounds
    ("reward, and the best of a prompt's", ("reward", "reward_best")),
    ("KL(policy || reference), nats a response", ("kl",)),
    ("prompts without a signal, samples that end", ("tied", "finished")),
)
OF_LOSS = {"excess", "loss"}  # metrics in the unit of the loss
MAX_KINDS = 4  # of losses whose curves are drawn
COLUMNS = 3
plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


class _Panel(NamedTuple):
    title: str
    split: str
    names: Sequence[str]  # of metrics
    settings: dict[str, Sequence[Run]]


def curves(runs: Sequence[Run]) -> Figure | None:
    """Draws the metrics of held-out rows and of training over steps; None where there are none."""
    settings = by_setting(runs)
    panels = _panels(settings)
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    figure, grid = plt.subplots(
        rows, COLUMNS, figsize=(12, 3 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    colors = dict(zip(settings, colors_of(len(settings)), strict=True))
    for axes, panel in zip(grid.flat, panels, strict=False):
        is_several = len(panel.names) > 1
        for setting, members in panel.settings.items():
            for name in panel.names:
                series = [_series(run, panel.split, name) for run in members]
                label, color = (name, None) if is_several else (setting, colors[setting])
                _draw_mean(axes, series, label, color)
        axes.set_title(panel.title)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if is_several:
            axes.legend(fontsize=8, ncols=-(-len(panel.names) // 6))
    if len(settings) > 1:
        _legend_below(figure, grid.flat[0])
    return figure


def rounds(runs: Sequence[Run]) -> Figure | None:
    """Draws what runs in rounds sampled, round by round; None where there are none."""
    settings = {
        setting: having
        for setting, members in by_setting(runs).items()
        if (having := [run for run in members if _has(run, "rounds", "round")])
    }
    if not settings:
        return None
    figure, grid = plt.subplots(1, len(ROUNDS), figsize=(12, 3), layout="constrained")
    colors = colors_of(len(settings))
    for axes, (title, names) in zip(grid.flat, ROUNDS, strict=True):
        for (setting, members), color in zip(settings.items(), colors, strict=True):
            for name, style in zip(names, ("-", "--"), strict=False):
                series = [_series(run, "rounds", name, by="round") for run in members]
                if all(steps for steps, _ in series):
                    label = name if len(settings) == 1 else f"{setting}, {name}"
                    _draw_mean(axes, series, label, color, style)
        axes.set_title(title)
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(axes.lines) > 1:
            axes.legend(fontsize=8)
    return figure


def _panels(settings: dict[str, list[Run]]) -> list[_Panel]:
    """Returns what is drawn: each metric of `CURVES` that some run has, by kind of loss."""
    kinds: dict[str, dict[str, Sequence[Run]]] = {}
    for setting, members in settings.items():
        kinds.setdefault(kind_of_loss(members[0]), {})[setting] = members
    panels = []
    for title, split, wanted in CURVES:
        of_loss = len(kinds) > 1 and bool(OF_LOSS & set(wanted))
        for kind, drawn in kinds.items() if of_loss else [("", settings)]:
            drawn = {
                setting: having
                for setting, members in drawn.items()
                if (having := [run for run in members if _has(run, split, wanted[0])])
            }
            members = [run for having in drawn.values() for run in having]
            names = [name for name in wanted if any(_has(run, split, name) for run in members)]
            is_crowded = len(names) > 1 and len(settings) > 1
            if names and not is_crowded and not (of_loss and len(kinds) > MAX_KINDS):
                panels.append(_Panel(f"{title}\n{kind}" if of_loss else title, split, names, drawn))
    return panels


def _has(run: Run, split: str, name: str) -> bool:
    return any(line["split"] == split and name in line for line in run.lines)


def _series(run: Run, split: str, name: str, by: str = "step") -> tuple[list[int], list[float]]:
    """Returns the steps, or rounds, and values of a metric."""
    lines = [line for line in run.lines if line["split"] == split and name in line]
    return [line[by] for line in lines], [line[name] for line in lines]


def _draw_mean(
    axes: Axes, series: list[tuple[list, list]], label: str, color, style: str = "-"
) -> None:
    """Draws the mean and band of several seeds, at the steps that all of them have."""
    by_step = [dict(zip(*one, strict=True)) for one in series]
    steps = sorted(set.intersection(*map(set, by_step)))
    values = np.array([[one[step] for step in steps] for one in by_step])  # [seeds, steps]
    mean = values.mean(axis=0)
    marker = "." if len(steps) < 8 else ""
    (line,) = axes.plot(steps, mean, label=label, color=color, marker=marker, ls=style)
    if len(values) >= BAND:
        sd = values.std(axis=0, ddof=1)
        axes.fill_between(steps, mean - sd, mean + sd, color=line.get_color(), alpha=0.18, lw=0)


def front(runs: Sequence[Run]) -> Figure | None:
    """Draws reward against KL to the reference; None where no evaluation has both.

    Faint points are seeds, strong ones their means, with one standard deviation where there are
    enough. The dashed line is the front: the settings that no other one beats in reward at a
    smaller KL. The dotted line is what needs no training: the best of n of the reference's samples.
    """
    found = {
        setting: np.array([[run.evaluation["kl"], run.evaluation["reward"]] for run in members])
        for setting, members in by_setting(
            run for run in runs if {"kl", "reward", "reward_reference"} <= run.evaluation.keys()
        ).items()
    }  # {setting: [seeds, 2]}
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for (setting, points), color in zip(found.items(), colors_of(len(found)), strict=True):
        (kl, kl_sd), (reward, reward_sd) = (mean_and_sd(column.tolist()) for column in points.T)
        if len(points) < BAND:
            kl_sd = reward_sd = None
        axes.scatter(*points.T, color=color, alpha=0.35, s=18, lw=0)
        axes.errorbar(
            kl, reward, xerr=kl_sd, yerr=reward_sd, fmt="o", color=color, label=setting, capsize=2
        )
    start = [
        run.evaluation["reward_reference"] for run in runs if "reward_reference" in run.evaluation
    ]
    axes.scatter(
        [0], [np.mean(start)], marker="*", s=110, color="black", label="reference", zorder=3
    )
    best = front_of(
        [(0.0, float(np.mean(start))), *(points.mean(axis=0) for points in found.values())]
    )
    axes.plot(*zip(*best, strict=True), color="black", lw=0.9, ls="--", label="front", zorder=0)
    picked = max(map(best_of_n, runs), key=len)
    if len(picked) > 1:
        label = f"best of 1 to {len(picked)} of the reference"
        how = dict(color="gray", marker=".", ls=":", label=label, zorder=0)
        axes.plot(*zip(*picked, strict=True), **how)
    axes.set_xlabel("KL(policy || reference), nats a response")
    axes.set_ylabel("mean reward")
    _legend_below(figure, axes)
    return figure


def front_of(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points (KL, reward) that no point of smaller or equal KL beats, by KL."""
    best: list[tuple[float, float]] = []
    for kl, reward in sorted(
        ((float(x), float(y)) for x, y in points), key=lambda p: (p[0], -p[1])
    ):
        if not best or reward > best[-1][1]:
            best.append((kl, reward))
    return best


def colors_of(count: int) -> list:
    """Returns colours that can be told apart as long as there are few of them."""
    if count <= 10:
        return [plt.get_cmap("tab10")(i) for i in range(count)]
    return [plt.get_cmap("turbo")(x) for x in np.linspace(0.05, 0.95, count)]


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    width = figure.get_figwidth() / (0.5 + 0.075 * max(map(len, labels)))
    columns = max(1, min(len(labels), int(width)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
