"""One self-contained HTML page about runs: tables, curves, reward against KL, samples.

    python -m experiments.report DIR... [--out=report.html] [--title=TEXT]

DIR is a workdir, a folder of workdirs such as a sweep makes, or a .jsonl file of sampled rows.
Only metrics.jsonl, evaluation.json and rows of nca_jax.generate are read; a run where one of them
is damaged is named and left out, and the exit status is then 1. The figures are written beside the
page too: report.curves.png and report.front.png.
"""

import argparse
import html
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments import plots, results
from nca_jax.checks import UserError, run_main
from nca_jax.files import local_path, out_file, write_whole

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       color: #1c2330; background: #fff; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .4rem .5rem;
          border-bottom: 1px solid #dde2ea; }}
.numbers {{ font-size: .85rem; white-space: nowrap; font-variant-numeric: tabular-nums; }}
.samples {{ table-layout: fixed; font-size: .9rem; }}
.samples th, .samples td {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.samples p {{ margin: 0 0 .5rem; }}
.score {{ font-weight: 600; color: #44506a; }}
.note, dl {{ color: #44506a; font-size: .88rem; max-width: 52rem; }}
dt {{ float: left; clear: left; width: 11rem; font-weight: 600; }} dd {{ margin-left: 11.5rem; }}
svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
{sections}
</body></html>
"""
MAX_PROMPTS, MAX_COLUMNS = 16, 5  # of the samples that are shown


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="experiments.report", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("dirs", nargs="+", metavar="DIR")
    parser.add_argument("--out", default="report.html")
    parser.add_argument("--title", default="")
    args = parser.parse_args(argv[1:])
    args.dirs, args.out = list(map(local_path, args.dirs)), local_path(args.out)
    out_file(args.out)
    for path in args.dirs:
        if not path.exists():
            raise UserError(f"{path} is not there; give workdirs of runs or files of samples.")
    files = [path for path in args.dirs if path.is_file()]
    runs, damaged = results.find_whole_runs([path for path in args.dirs if path.is_dir()])
    for said in damaged:
        print(f"left out: {said}", file=sys.stderr)
    samples = samples_by_column(runs) | {path.stem: results.read_samples(path) for path in files}
    title = args.title or "Runs in " + ", ".join(map(str, args.dirs))
    write_page(args.out, title, runs, samples)
    print(f"written to {args.out}")
    return bool(damaged)


def write_page(
    out: Path, title: str, runs: Sequence[results.Run], samples: dict[str, results.Answers]
) -> None:
    """Writes the page, and each figure as a PNG beside it."""
    sections = []
    if runs:
        rows = results.table(runs)
        sections += ["<h2>Numbers</h2>", html_table(rows), meaning(rows[0])]
    figures = {"curves": plots.curves(runs) if runs else None, "front": plots.front(runs)}
    titles = {"curves": "Training", "front": "Reward against KL"}
    notes = {
        "curves": "Lines are means over seeds, bands one standard deviation to either side.",
        "front": "Faint points are seeds; the dashed line joins the settings that none beats in "
        "reward at a smaller KL.",
    }
    for name, figure in figures.items():
        if figure:
            image = io.BytesIO()
            figure.savefig(image, dpi=150)
            write_whole(out.with_suffix(f".{name}.png"), image.getvalue())
            sections += [f"<h2>{titles[name]}</h2>", svg(figure)]
            sections.append(f'<p class="note">{notes[name]}</p>')
    if samples:
        sections += ["<h2>Samples</h2>", html_samples(samples)]
    page = PAGE.format(title=html.escape(title), sections="\n".join(sections))
    write_whole(out, page.encode())


def samples_by_column(runs: Sequence[results.Run]) -> dict[str, results.Answers]:
    """Returns {who: answers}: the reference once, and the first seed of each setting."""
    columns: dict[str, results.Answers] = {}
    settings = results.by_setting(runs)
    for setting, members in settings.items():
        first = next((run for run in members if run.samples), members[0])
        for who, answers in first.samples.items():
            name = who if who == "reference" or len(settings) == 1 else f"{who},{setting}"
            columns.setdefault(name, answers)
    return columns


def html_table(rows: Sequence[Sequence[str]]) -> str:
    header, *rest = rows
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rest]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table class="numbers">{body}</table></div>'


def meaning(header: Sequence[str]) -> str:
    """Says what the columns of a table are."""
    known = {name: text for name, text in results.METRICS.items() if name in header}
    known["±"] = "one standard deviation over seeds"
    return (
        "<dl>"
        + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in known.items())
        + "</dl>"
    )


def html_samples(samples: dict[str, results.Answers]) -> str:
    """The responses of several policies to the same prompts, side by side."""
    shown = dict(list(samples.items())[:MAX_COLUMNS])
    prompts = list(dict.fromkeys(prompt for answers in shown.values() for prompt in answers))
    # Prompts that most of the columns answer come first.
    prompts.sort(key=lambda prompt: -sum(prompt in answers for answers in shown.values()))
    rows = [
        "".join(f"<th>{html.escape(name.replace(',', ', '))}</th>" for name in ("prompt", *shown))
    ]
    for prompt in prompts[:MAX_PROMPTS]:
        cells = [html.escape(prompt)]
        cells += ["".join(map(_response, answers.get(prompt, []))) for answers in shown.values()]
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    left_out = [f"{len(prompts) - MAX_PROMPTS} more prompts"] if prompts[MAX_PROMPTS:] else []
    left_out += list(samples)[MAX_COLUMNS:]
    note = html.escape("Not shown: " + "; ".join(left_out)) if left_out else ""
    note = f'<p class="note">{note}.</p>' if note else ""
    return f'<div class="wide"><table class="samples">{body}</table></div>{note}'


def _response(pair: tuple[str, float | None]) -> str:
    text, score = pair
    number = "" if score is None else f'<span class="score">{score:+.2f}</span> '
    return f"<p>{number}{html.escape(text)}</p>"


def svg(figure: Figure) -> str:
    """Returns a figure as inline SVG."""
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


if __name__ == "__main__":
    run_main(main)
