"""Draws the figures of README.md again, of what results.jsonl and optima.json have.

    python -m experiments.claims.figures

`chosen.png` is not among them: it shows lines of metrics.jsonl.
"""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from experiments import plots, results
from experiments.claims import pairs, real, reasoning, responses, tabular, temperatures
from nca_jax.files import read_json, whole_lines

HERE = Path(__file__).parent


def stored_runs(folder: str, settings: Iterable[str]) -> list[results.Run]:
    """Returns what results.jsonl has of these settings of a folder: their evaluations."""
    lines = whole_lines(HERE / "results.jsonl")
    return [
        results.Run(setting, [], line["metrics"], {})
        for setting in settings
        for line in lines
        if line["run"].rpartition("/")[0] == f"{folder}/{setting}"
    ]


def shrink(path: Path) -> None:
    """Makes a figure as small as those that are kept: 100 dots an inch, few colours."""
    image = Image.open(path).convert("RGB")
    image = image.resize((image.width * 2 // 3, image.height * 2 // 3), Image.Resampling.LANCZOS)
    image.quantize(64).save(path, optimize=True)


def main() -> None:
    tabular.plot_optima(HERE / "optima.png", read_json(HERE / "optima.json"))
    if figure := plots.front(stored_runs("demo", [arm.name for arm in pairs.ARMS])):
        figure.savefig(HERE / "pairs.png", dpi=150)
    temperatures.plot(HERE / "temperatures.png", stored_runs("demo", temperatures.SETTINGS))
    by_k = [f"K={k}" for k in responses.RESPONSES]
    responses.plot(HERE / "responses.png", stored_runs("responses", by_k))
    real.plot(HERE / "real.png", stored_runs("real", real.ARMS))
    rounds = {
        (n, loss): stored_runs(f"reasoning/round{n}", [loss])
        for n in (1, 2)
        for loss in reasoning.LOSSES
    }
    reasoning.plot(HERE / "reasoning.png", rounds)
    for name in ("optima", "pairs", "temperatures", "responses", "real", "reasoning"):
        shrink(HERE / f"{name}.png")


if __name__ == "__main__":
    main()
