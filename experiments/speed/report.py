"""What was measured, as one JSON a cell, tables and a plot. Needs no JAX and no PyTorch.

    python experiments/speed/report.py

draws what is in cells/ again: table.md, speed.png and the tables of README.md. A step's time is the
median over all timed steps of all rounds.
"""

import json
import re
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
OF_A_MACHINE = ("model", "adapter", "rows", "ref_logps")  # of a job: no part of what is published

COLUMNS = {
    "seconds": ("s a step", "{:.4g}"),
    "prompts_per_second": ("prompts/s", "{:.4f}"),
    "ratio": ("of the first", "{:.2f}x"),
    "prompts_per_second_1_epoch": ("with reference pass, 1 epoch", "{:.4f}"),
    "prompts_per_second_3_epochs": ("3 epochs", "{:.4f}"),
    "scored_tokens_per_second": ("useful tokens/s", "{:.1f}"),
    "needed_tokens_per_cpu_second": ("needed tokens/CPU s", "{:.1f}"),
    "peak_gib": ("peak GiB", "{:.2f}"),
    "peak_ratio": ("of the first", "{:.0%}"),
    "peak_share": ("needed GFLOP/s of peak", "{:.0%}"),
    "compile_seconds": ("compile s", "{:.0f}"),
    "commit": ("commit", "{}"),
}
SHORT = (  # the columns of README.md
    *("seconds", "prompts_per_second", "ratio", "peak_gib", "peak_ratio", "peak_share"),
    *("compile_seconds", "commit"),
)


def write_report(out: Path) -> None:
    """Writes cells/*.json from what the folders of measured cells hold, and draws them."""
    cells = {path.parent.name: read_cell(path.parent) for path in sorted(out.glob("*/job.json"))}
    (out / "cells").mkdir(exist_ok=True)
    for name, cell in cells.items():
        if cell["sides"]:
            (out / "cells" / f"{name}.json").write_text(json.dumps(cell, indent=2) + "\n")
    draw(out)


def draw(out: Path) -> None:
    """Writes table.md and speed.png from cells/*.json."""
    cells = stored_cells(out)
    (out / "table.md").write_text(tables(cells))
    plot(out / "speed.png", cells)


def stored_cells(out: Path) -> dict[str, dict]:
    """Returns what `read_cell` gave, by the name of the cell."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("cells/*.json"))}


def read_cell(folder: Path) -> dict:
    """Returns {"job", "peak_flops_per_second", "agreement", "sides": {name: figures}}.

    The job's device is the accelerator's name where one was used.
    """
    told = json.loads((folder / "job.json").read_text())
    job = {key: value for key, value in told.items() if key not in OF_A_MACHINE}
    peaks = [json.loads(path.read_text()) for path in folder.glob("peak.*.json")]
    peak = median(x["flops_per_second"] for x in peaks) if peaks else 0.0
    if peaks and told.get("device", "cpu") != "cpu":
        job["device"] = peaks[0]["device"]
    agreement = folder / "agreement.json"
    apart = json.loads(agreement.read_text()) if agreement.exists() else {}
    sides = {}
    for name in apart:
        rounds = [json.loads(p.read_text()) for p in sorted(folder.glob(f"{name}.[0-9]*.json"))]
        if rounds:
            check = json.loads((folder / f"{name}.check.json").read_text())
            sides[name] = figures(job, rounds, check, peak)
    first = next(iter(sides.values()), None)
    for side in sides.values():
        side["ratio"] = side["prompts_per_second"] / first["prompts_per_second"]
        side["peak_ratio"] = side["peak_gib"] / first["peak_gib"]
    found = {"job": job, "peak_flops_per_second": peak, "agreement": apart, "sides": sides}
    ladder = folder / "ladder.json"
    return found | ({"ladder": json.loads(ladder.read_text())} if ladder.exists() else {})


def figures(job: dict, rounds: list[dict], check: dict, peak: float) -> dict:
    """Returns the figures of one side in one cell; seconds are medians over steps and rounds."""
    seconds = median(x for r in rounds for x in r["seconds"])
    cpu_seconds = median(x for r in rounds for x in r["cpu_seconds"])
    # A live reference is in the step already.
    is_cached = rounds[0]["reference"] == "cached"
    ref_seconds = check["ref_seconds"] if is_cached else 0.0
    found = {
        "seconds": seconds,
        "seconds_of_all": [x for r in rounds for x in r["seconds"]],
        "prompts_per_second": job["batch_size"] / seconds,
        "prompts_per_second_1_epoch": job["batch_size"] / (seconds + ref_seconds),
        "prompts_per_second_3_epochs": job["batch_size"] / (seconds + ref_seconds / 3),
        "scored_tokens_per_second": job["scored_tokens"] / seconds,
        "needed_tokens_per_cpu_second": job["needed_tokens"] / cpu_seconds,
        "peak_gib": max(r["peak_bytes"] for r in rounds) / 2**30,
        "needed_gflops_per_second": job["needed_flops"] / seconds / 1e9,
        "peak_share": job["needed_flops"] / seconds / peak,
        "commit": rounds[0]["commit"],
    }
    if "compile_seconds" in rounds[0]:
        found["compile_seconds"] = median(r["compile_seconds"] for r in rounds)
    return found


def tables(cells: dict[str, dict]) -> str:
    """Returns all cells as Markdown."""
    return "\n".join(table(name, cell) for name, cell in cells.items())


def table(name: str, cell: dict) -> str:
    """Returns one cell as Markdown."""
    job, peak = cell["job"], cell["peak_flops_per_second"] / 1e9
    device = accelerator(cell)
    times_needed = job["released_flops"] / job["needed_flops"]
    lines = [
        f"## {name}",
        "",
        f"{job['batch_size']} prompts, K = {job['k']}, loss {job['loss']}: {job['needed_tokens']} "
        f"needed tokens ({job['scored_tokens']} scored), {job['padded_tokens']} as the released "
        f"trainer pads them. Head: {job['head_flops'] / job['needed_flops']:.0%} of the needed "
        f"operations; the release computes {times_needed:.2f} times those needed. "
        f"{f'{device}, bfloat16' if device else 'float32'} matmul peak: {peak:.0f} GFLOP/s.",
        "",
        *side_table(cell, tuple(COLUMNS)),
    ]
    lines += ["", "Largest differences from the first side, before any timing:", ""]
    quantities = list(next(iter(cell["agreement"].values())))
    lines += ["| side | " + " | ".join(quantities) + " |", "|---" * (len(quantities) + 1) + "|"]
    for side, apart in cell["agreement"].items():
        lines.append(f"| {side} | " + " | ".join(f"{apart[q]:.1e}" for q in quantities) + " |")
    if "ladder" in cell:
        lines += ["", "Our own step, rung by rung:", "", *ladder_table(cell["ladder"])]
    return "\n".join(lines) + "\n"


def accelerator(cell: dict) -> str:
    """Returns the name of the device that a cell was measured on; "": a CPU."""
    device = cell["job"].get("device", "cpu")
    return "" if device == "cpu" else device


def side_table(cell: dict, keys: tuple[str, ...]) -> list[str]:
    """Returns the lines of a table of the sides of a cell, with these of COLUMNS."""
    titles, forms = zip(*(COLUMNS[key] for key in keys), strict=True)
    lines = ["| side | " + " | ".join(titles) + " |", "|---" * (len(keys) + 1) + "|"]
    for side, found in cell["sides"].items():
        shown = [
            form.format(found[key]) if key in found else "-"
            for key, form in zip(keys, forms, strict=True)
        ]
        lines.append(f"| {side} | " + " | ".join(shown) + " |")
    return lines


def ladder_table(ladder: dict[str, dict]) -> list[str]:
    """Returns the rungs of our own step, each with its ratio to the one before."""
    lines = ["| rung | token slots | s a step | faster by | commit |", "|---|---|---|---|---|"]
    before = None
    for name, rung in ladder.items():
        ratio = f"{before / rung['seconds']:.2f}x" if before else "-"
        shown = (name, str(rung["slots"]), f"{rung['seconds']:.2f}", ratio, rung["commit"])
        lines.append(f"| {' | '.join(shown)} |")
        before = rung["seconds"]
    return lines


def sweep_table(cells: dict[str, dict]) -> list[str]:
    """Returns one line a cell of the sweep: ours beside the release and its better side."""
    lines = [
        "| cell | s a step: released | ours | of the first | of the better | operations of the "
        "release / needed | needed GFLOP/s of peak | commit |",
        "|---" * 8 + "|",
    ]
    for name, cell in cells.items():
        if not name.startswith("sweep_"):
            continue
        *released, ours = cell["sides"].values()
        better = max(side["prompts_per_second"] for side in released)
        shown = (
            f"`{name}`",
            f"{released[0]['seconds']:.2f}",
            f"{ours['seconds']:.2f}",
            f"{ours['ratio']:.2f}x",
            f"{ours['prompts_per_second'] / better:.2f}x",
            f"{cell['job']['released_flops'] / cell['job']['needed_flops']:.2f}",
            f"{ours['peak_share']:.0%}",
            ours["commit"],
        )
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def with_tables(readme: str, cells: dict[str, dict]) -> str:
    """Returns a README with the tables of the cells in their places: <!-- NAME --> ... <!-- -->."""
    lines = {name: side_table(cell, SHORT) for name, cell in cells.items()}
    lines |= {"ladder": ladder_table(cells["real_k4"]["ladder"]), "sweep": sweep_table(cells)}

    def place(found: re.Match) -> str:
        return "\n".join([f"<!-- {found[1]} -->", *lines[found[1]], "<!-- -->"])

    return re.sub(r"<!-- (\w+) -->.*?<!-- -->", place, readme, flags=re.DOTALL)


def plot(path: Path, cells: dict) -> None:
    """Draws prompts/s against the first side and peak memory, a group of bars a cell."""
    import matplotlib  # the extra `demo` has it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["sides"]))
    figure, axes = plt.subplots(2, 1, figsize=(4 + 1.3 * len(cells), 8), squeeze=False)
    for axis, key, title in zip(
        axes[:, 0],
        ("ratio", "peak_gib"),
        ("prompts/s, of the first side", "peak memory of a fresh process, GiB"),
        strict=True,
    ):
        for i, name in enumerate(names):
            places = [
                c + 0.8 * i / len(names) for c, x in enumerate(cells.values()) if name in x["sides"]
            ]
            heights = [x["sides"][name][key] for x in cells.values() if name in x["sides"]]
            axis.bar(places, heights, width=0.8 / len(names), label=name, align="edge")
        labels = [f"{name}\n{accelerator(cell)}".strip() for name, cell in cells.items()]
        axis.set_xticks([c + 0.4 for c in range(len(cells))], labels, rotation=20)
        axis.set_ylabel(title)
    axes[0, 0].legend(fontsize="small", ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    draw(HERE)
    readme = HERE / "README.md"
    readme.write_text(with_tables(readme.read_text(), stored_cells(HERE)))


if __name__ == "__main__":
    main()
