"""What runs left behind, gathered by setting: their config, metrics, evaluation and samples.

A run is a folder with a metrics.jsonl. Folders SETTING/seed=N, as a sweep makes them, are the seeds
of one setting; any other folder is a setting of one run.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from nca_jax.checks import UserError
from nca_jax.files import read_json, whole_lines
from nca_jax.infra.records import METRICS as METRICS_FILE
from nca_jax.infra.records import RUN, is_metrics
from nca_jax.saved_config import CONFIG

# The columns of a table, where a run has them.
METRICS = {
    "reward": "mean score of the policy's own responses",
    "reward_reference": "mean score of the reference's responses to the same prompts",
    "reward_difference": "reward above the reference's, mean over prompts",
    "kl": "KL(policy || reference), nats a response, on the policy's own samples",
    "judge": "mean score of a second scorer, which was not trained on",
    "judge_reference": "the same of the reference's responses",
    "text_perplexity": "of plain text: is the language still whole?",
    "length": "tokens of the policy's own responses",
    "repetition": "share of three tokens in a row that a response has had before",
    "accuracy_half_ties": "the best response has the higher implicit reward; chance is 0.5",
    "loss": "nats a prompt",
    "excess": "loss above its floor, nats",
    "chosen_logp_drift": "change of the best response's log-probability, nats",
}
BAND = 3  # seeds from which on their spread is drawn, or said in words
Answers = dict[str, list[tuple[str, float | None]]]  # {prompt: [(response, its score)]}


class Run(NamedTuple):
    setting: str  # "loss.alpha=0.1,algo=nca", or the name of the folder
    lines: list[dict]  # of metrics.jsonl
    evaluation: dict[str, float]  # metrics of evaluation.json; {}: there is none
    samples: dict[str, Answers]  # by who answered
    config: Mapping[str, Any] = MappingProxyType({})  # {field: value} of config.json
    began: Mapping[str, Any] = MappingProxyType({})  # of run.json: commit, records, steps


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Returns the runs in and below the folders, by setting and seed.

    Raises:
      UserError: there is none in one of them, or one is damaged.
    """
    return [read_run(*place) for place in find_places(folders)]


def find_whole_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Returns the runs as `find_runs`, but for those that are damaged, and what is said of these.

    Raises:
      UserError: there is none in one of the folders.
    """
    runs, damaged = [], []
    for place in find_places(folders):
        try:
            runs.append(read_run(*place))
        except UserError as error:
            damaged.append(str(error))
    return runs, damaged


def find_places(folders: Iterable[Path]) -> list[tuple[Path, str]]:
    """Returns (workdir, setting) of every run in and below the folders.

    Raises:
      UserError: there is none in one of them.
    """
    folders, places = list(folders), []
    for folder in folders:
        found = sorted(path.parent for path in folder.rglob(METRICS_FILE))
        if not found:
            raise UserError(f"{folder} holds no {METRICS_FILE}; give the workdir of runs.")
        for workdir in found:
            place = workdir.parent if workdir.name.startswith("seed=") else workdir
            is_below = place != folder and folder in place.parents
            name = str(place.relative_to(folder)) if is_below else place.absolute().name
            is_one_of_several = len(folders) > 1 and is_below
            setting = f"{folder.name}/{name}" if is_one_of_several else name
            places.append((workdir, setting))
    return places


def read_run(workdir: Path, setting: str) -> Run:
    """Reads one workdir: config, metrics, evaluation, and rows that nca_jax.generate sampled.

    Raises:
      UserError: one of these files is damaged.
    """
    evaluation, samples = {}, {}
    if (workdir / "evaluation.json").exists():
        content = read_json(workdir / "evaluation.json")
        if not {"metrics", "samples"} <= content.keys():
            raise UserError(f"{workdir}/evaluation.json is damaged; evaluate that run again.")
        evaluation = content["metrics"]
        for who in ("reference", "policy") if content["samples"] else ():
            samples[who] = _answers(content["samples"], who, f"{who}_scores")
    for path in sorted(workdir.glob("*.jsonl")):
        if path.name != METRICS_FILE:
            samples[path.stem] = read_samples(path)
    sampled = {int(path.parent.name): path for path in workdir.glob("rounds/*/rollouts.jsonl")}
    for number, path in sorted(sampled.items()):
        samples[f"round {number}"] = read_samples(path)
    config, began = (
        read_json(workdir / name) if (workdir / name).exists() else {} for name in (CONFIG, RUN)
    )
    lines = whole_lines(workdir / METRICS_FILE, is_metrics)
    return Run(setting, lines, evaluation, samples, config, began)


def read_samples(path: Path) -> Answers:
    """Reads rows of nca_jax.generate or nca_jax.score."""
    rows = whole_lines(path)
    if not all("prompt" in row and "responses" in row for row in rows):
        raise UserError(f"{path}: wanted rows with 'prompt' and 'responses', as generate writes.")
    return _answers(rows, "responses", "scores")


def _answers(rows: Sequence[dict], responses: str, scores: str) -> Answers:
    return {
        _prompt_text(row["prompt"]): list(
            zip(row[responses], row.get(scores, [None] * len(row[responses])), strict=True)
        )
        for row in rows
    }


def _prompt_text(prompt: str | list[dict]) -> str:
    """A prompt of messages as text."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def by_setting(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Returns {setting: its runs}, in the order in which they come."""
    settings: dict[str, list[Run]] = {}
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    return settings


def best_of_n(run: Run) -> list[tuple[float, float]]:
    """Returns (KL, reward) of the best of n of the reference's samples, n = 1, 2, .. S a prompt.

    The KL to the reference is log n - (n - 1)/n nats; the reward is the mean of the largest of n
    over all choices of n of the S samples. [] where these have no scores, or differ in number.
    """
    answers = run.samples.get("reference", {}).values()
    scores = [sorted(score for _, score in of_prompt if score is not None) for of_prompt in answers]
    sizes = set(map(len, scores))
    if len(sizes) != 1 or not (size := sizes.pop()):
        return []
    points = []
    for n in range(1, size + 1):
        # The i-th smallest is the largest of those choices whose others are among the i before it.
        weights = [math.comb(i, n - 1) / math.comb(size, n) for i in range(size)]
        rewards = (sum(w * x for w, x in zip(weights, row, strict=True)) for row in scores)
        points.append((math.log(n) - (n - 1) / n, statistics.fmean(rewards)))
    return points


def kind_of_loss(run: Run) -> str:
    """Names what losses must share to be compared: the function, and what its targets come from."""
    if not run.config:
        return "a loss"
    name, k = run.config["loss.name"], run.config["data.num_responses"]
    alpha = run.config.get("loss.alpha")
    return f"{name}, K = {k}" + ("" if alpha is None else f", alpha {alpha:g}")


def final_metrics(run: Run) -> tuple[str, dict[str, float]]:
    """Returns where they are from and the last metrics of a run: the most telling that there are.

    evaluation.json before the last held-out line, and that before the last line of training.
    """
    if run.evaluation:
        return "evaluation", run.evaluation
    for split, source in (("eval", "held-out step"), ("train", "training step")):
        lines = [line for line in run.lines if line["split"] == split]
        if lines:
            return f"{source} {lines[-1]['step']}", lines[-1]
    return "no step yet", {}


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and the sample standard deviation; None for a single value."""
    mean = statistics.fmean(values)
    return mean, math.sqrt(statistics.variance(values, mean)) if len(values) > 1 else None


def with_spread(values: Sequence[float]) -> str:
    """Writes "mean ± sd", two digits of the sd; a single value with four digits."""
    return column([values])[0]


def column(cells: Sequence[Sequence[float]]) -> list[str]:
    """Writes each cell as `with_spread` does, all with the decimals of the one that has most."""
    known = [mean_and_sd(values) for values in cells]
    decimals = max((_decimals(*pair) for pair in known), default=0)
    return [
        f"{mean:.{decimals}f}"
        + ("" if sd is None else " ± 0" if _is_zero(mean, sd) else f" ± {sd:.{decimals}f}")
        for mean, sd in known
    ]


def _decimals(mean: float, sd: float | None) -> int:
    if sd is not None and math.isfinite(sd) and not _is_zero(mean, sd):
        return min(max(1 - math.floor(math.log10(sd)), 0), 7)
    return max(-Decimal(f"{mean:.4g}").as_tuple().exponent, 0) if math.isfinite(mean) else 0


def _is_zero(mean: float, sd: float) -> bool:
    """Whether values are equal but for rounding."""
    return sd <= 1e-6 * abs(mean)


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Returns a header and one row a setting: its values, seeds, source, and metrics with spread.

    Only runs whose last metrics are from the same place are averaged, those of the most runs;
    "2 of 3" seeds says that one is not so far.
    """
    settings = by_setting(runs)
    split = {name: _split_setting(name) for name in settings}
    axes = list(dict.fromkeys(axis for values in split.values() for axis in values))
    rows = []
    for name, members in settings.items():
        finals = [final_metrics(run) for run in members]
        source = statistics.mode(source for source, _ in finals)
        metrics = [metrics for where, metrics in finals if where == source]
        seeds = str(len(members))
        seeds = seeds if len(metrics) == len(members) else f"{len(metrics)} of {seeds}"
        common = [m for m in METRICS if all(m in of_run for of_run in metrics)]
        cells = {metric: [x[metric] for x in metrics] for metric in common}
        rows.append(([split[name].get(axis, "") for axis in axes] + [seeds, source], cells))
    shown = [metric for metric in METRICS if any(metric in cells for _, cells in rows)]
    written = [iter(column([c[metric] for _, c in rows if metric in c])) for metric in shown]
    header = [*axes, "seeds", "from", *shown]
    body = [
        [next(w) if metric in cells else "-" for metric, w in zip(shown, written, strict=True)]
        for _, cells in rows
    ]
    return [header, *(left + right for (left, _), right in zip(rows, body, strict=True))]


def _split_setting(name: str) -> dict[str, str]:
    """Returns {axis: value} of "FOLDER/axis=value,axis=value"; what has no "=" is under "run"."""
    folder, _, last = name.rpartition("/")
    pairs = [piece.partition("=") for piece in last.split(",")]
    if not all(equals for _, equals, _ in pairs):
        return {"run": name}
    return ({"run": folder} if folder else {}) | {axis: value for axis, _, value in pairs}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Writes a table as Markdown."""
    header, *rest = rows
    lines = [header, ["---"] * len(header), *rest]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
