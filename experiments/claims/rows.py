"""The rows of the claims: the demo's, cut into parts, and the pairs that rows of K scores make."""

import itertools
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nca_jax.checks import UserError
from nca_jax.data.sources import write_records
from nca_jax.files import whole_lines

DEMO = Path(__file__).parents[1] / "demo/rows.jsonl"
PER_RESPONSE = ("responses", "scores", "response_ids", "finished")


def split_rows(rows: Sequence[dict], num_heldout: int, num_train: int, num_seeds: int):
    """Returns held-out rows, the same for all seeds, and for each seed training rows of its own.

    Raises:
      UserError: there are too few rows for so many seeds.
    """
    wanted = num_heldout + num_train * num_seeds
    if len(rows) < wanted:
        raise UserError(f"{num_seeds} seeds want {wanted} rows, and there are {len(rows)}.")
    shuffled = random.Random(0).sample(list(rows), len(rows))
    training = [shuffled[num_heldout + i * num_train :][:num_train] for i in range(num_seeds)]
    return shuffled[:num_heldout], training


def pairs(row: dict, how: str) -> list[dict]:
    """Returns rows of two responses, the better one first; equal scores make no pair.

    how: "best_worst" the best with the worst; "best_each" the best with each other; "all" any two.
    """
    scores = np.array(row["scores"])
    order = np.argsort(-scores, kind="stable").tolist()  # ties in data order
    if how == "best_worst":
        chosen = [(order[0], order[-1])]
    elif how == "best_each":
        chosen = [(order[0], other) for other in order[1:]]
    elif how == "all":
        chosen = list(itertools.combinations(order, 2))
    else:
        raise ValueError(f"{how!r} is not one of best_worst, best_each, all.")
    return [
        {"prompt": row["prompt"]}
        | {name: [row[name][i] for i in pair] for name in ("responses", "scores")}
        for pair in chosen
        if scores[pair[0]] > scores[pair[1]]
    ]


def without_empty(row: dict) -> dict:
    """Returns a scored row without its empty responses, of which the claims hold none."""
    kept = [i for i, text in enumerate(row["responses"]) if text.strip()]
    return take(row, kept)


def take(row: dict, chosen: Sequence[int]) -> dict:
    """Returns a scored row with the chosen ones of its responses."""
    return row | {name: [row[name][i] for i in chosen] for name in PER_RESPONSE if name in row}


def write_new(path: Path, rows: Iterable[dict]) -> None:
    """Writes rows, or leaves the file as it is where it holds these rows already.

    Raises:
      UserError: it holds others: it belongs to runs of other settings.
    """
    rows = list(rows)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(str(path), rows)
    elif whole_lines(path) != json.loads(json.dumps(rows)):
        raise UserError(f"{path} holds other rows than these settings make; give another --out.")
