r"""Gathers the evaluations of runs into one file, a line a run: the numbers behind a table.

    python -m experiments.claims.collect runs/claims/demo runs/claims/responses --out=results.jsonl

A line is {"run": "FOLDER/ARM/seed=N", "metrics": those of its evaluation.json}, six digits each.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from nca_jax.checks import UserError, run_main
from nca_jax.data.sources import write_records
from nca_jax.files import read_json


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="experiments.claims.collect")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--out", required=True)
    args = parser.parse_args(argv[1:])
    rows = list(evaluations(args.folders))
    write_records(args.out, rows)
    print(f"{len(rows)} runs in {args.out}")
    return 0


def evaluations(folders: Sequence[Path]) -> Iterator[dict]:
    """Yields a line for every evaluation.json in and below the folders, in the order of names.

    Raises:
      UserError: a folder has none.
    """
    for folder in folders:
        found = sorted(folder.rglob("evaluation.json"))
        if not found:
            raise UserError(f"{folder} holds no evaluation.json; give the --out of a claim.")
        for path in found:
            metrics = read_json(path)["metrics"]
            rounded = {name: float(f"{value:.6g}") for name, value in metrics.items()}
            run = path.parent.relative_to(folder.parent).as_posix()
            yield {"run": run, "metrics": rounded}


if __name__ == "__main__":
    run_main(main)
