"""One self-contained HTML page about runs: what they were, what changed, numbers, curves, samples.

    python -m experiments.report DIR... [--out=report.html] [--title=TEXT]

DIR is a workdir, a folder of workdirs such as a sweep makes, or a .jsonl file of sampled rows.
Only config.json, run.json, metrics.jsonl, evaluation.json and rows of nca_jax.generate are read; a
run where one of them is damaged is named and left out, and the exit status is then 1. The figures
are written beside the page too: report.front.png, report.rounds.png and report.curves.png.
"""

import argparse
import html
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments import plots, results, summary
from nca_jax.checks import UserError, run_main
from nca_jax.files import local_path, out_file, write_whole

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       color: #1c2330; background: #fff; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
.changed {{ font-size: 1.1rem; max-width: 52rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin-bottom: 1rem; }}
th, td {{ text-align: left; vertical-align: top; padding: .4rem .6rem;
          border-bottom: 1px solid #dde2ea; }}
.numbers {{ font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
.numbers td {{ white-space: nowrap; }} .numbers th {{ vertical-align: bottom; }}
.numbers .number {{ text-align: right; }}
.samples {{ table-layout: fixed; width: 100%; font-size: .9rem; }}
.samples td {{ white-space: pre-wrap; }}
.samples p {{ margin: 0 0 .5rem; }}
.score {{ font-weight: 600; color: #44506a; font-variant-numeric: tabular-nums; }}
.note, dl {{ color: #44506a; font-size: .88rem; max-width: 52rem; }}
dt {{ float: left; clear: left; width: 11rem; font-weight: 600; }}
dd {{ margin-left: 11.5rem; }} dd::after {{ content: ""; display: block; clear: left; }}
svg {{ max-width: 100%; height: auto; }}
@media (max-width: 40rem) {{
  dt {{ float: none; width: auto; margin-top: .4rem; }} dd {{ margin-left: 0; }}
  svg {{ max-width: none; width: 46rem; }}
  .samples tr, .samples td {{ display: block; border: 0; padding: .2rem 0; }}
  .samples tr {{ border-bottom: 1px solid #dde2ea; }} .samples tr:first-child {{ display: none; }}
  .samples td::before {{ content: attr(title); display: block; font-size: .8rem; color: #6a7590; }}
}}
</style></head><body>
<h1>{title}</h1>
{sections}
</body></html>
"""
NUMBER = re.compile(r"[-+]?\d[-+.\de]*( ± [.\d]+)?$|-$")
MAX_METRICS = 6  # side by side
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
    changed = html.escape(summary.what_changed(runs))
    sections = [f'<p class="changed">{changed}</p>'] if changed else []
    sections.append(html_list(summary.facts(runs)))
    if runs:
        rows = results.table(runs)
        sections += ["<h2>Numbers</h2>", *map(html_table, in_parts(rows)), meaning(rows)]
    figures = {
        "front": plots.front(runs),
        "rounds": plots.rounds(runs),
        "curves": plots.curves(runs),
    }
    titles = {"front": "Reward against KL", "rounds": "Rounds", "curves": "Training"}
    spread = f"one standard deviation, of {results.BAND} seeds or more"
    notes = {
        "front": f"Faint points are seeds; bars are {spread}; the dashed line joins the settings "
        "that none beats in reward at a smaller KL. The dotted one, where a prompt has several "
        "samples, is the best of n of the reference's: its KL is log n - (n - 1)/n.",
        "rounds": "What the policy of each round samples. Lines are means over seeds; bands are "
        f"{spread}.",
        "curves": f"Lines are means over seeds; bands are {spread}. Losses of another function, K "
        "or alpha are in other units: each kind has a panel of its own, up to "
        f"{plots.MAX_KINDS} kinds.",
    }
    for name, figure in figures.items():
        if figure:
            image = io.BytesIO()
            figure.savefig(image, dpi=150)
            write_whole(out.with_suffix(f".{name}.png"), image.getvalue())
            sections += [f"<h2>{titles[name]}</h2>", f'<div class="wide">{svg(figure)}</div>']
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


def in_parts(rows: Sequence[Sequence[str]]) -> Iterator[list[list[str]]]:
    """Yields a table of runs with some of its metrics at a time, so that none is too wide."""
    left = rows[0].index("from") + 1
    for first in range(left, max(len(rows[0]), left + 1), MAX_METRICS):
        yield [[*row[:left], *row[first : first + MAX_METRICS]] for row in rows]


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns of numbers are aligned at the right; names may wrap."""
    columns = zip(*rows[1:], strict=True)
    kinds = [' class="number"' if all(map(NUMBER.match, column)) else "" for column in columns]
    lines = []
    for tag, row in zip(["th", *["td"] * len(rows[1:])], rows, strict=True):
        cells = [cell.replace("_", " ") if tag == "th" else cell for cell in row]
        lines.append(
            "".join(
                f"<{tag}{kind}>{html.escape(cell)}</{tag}>"
                for kind, cell in zip(kinds, cells, strict=True)
            )
        )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table class="numbers">{body}</table></div>'


def meaning(rows: Sequence[Sequence[str]]) -> str:
    """Says what the columns of a table are."""
    known = [(x.replace("_", " "), text) for x, text in results.METRICS.items() if x in rows[0]]
    if any("±" in cell for row in rows for cell in row):
        known.append(("±", "one standard deviation over seeds"))
    return html_list(known)


def html_list(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and what is said of each."""
    lines = (f"<dt>{html.escape(x)}</dt><dd>{html.escape(text)}</dd>" for x, text in pairs)
    return f"<dl>{''.join(lines)}</dl>"


def html_samples(samples: dict[str, results.Answers]) -> str:
    """The responses of several policies to the same prompts, side by side."""
    shown = dict(list(samples.items())[:MAX_COLUMNS])
    prompts = list(dict.fromkeys(prompt for answers in shown.values() for prompt in answers))
    # Prompts that most of the columns answer come first.
    prompts.sort(key=lambda prompt: -sum(prompt in answers for answers in shown.values()))
    names = [html.escape(name.replace(",", ", ")) for name in ("prompt", *shown)]
    rows = ["".join(f"<th>{name}</th>" for name in names)]
    for prompt in prompts[:MAX_PROMPTS]:
        cells = [html.escape(prompt)]
        cells += ["".join(map(_response, answers.get(prompt, []))) for answers in shown.values()]
        pairs = zip(names, cells, strict=True)
        rows.append("".join(f'<td title="{name}">{cell}</td>' for name, cell in pairs))
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
