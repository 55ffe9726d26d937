"""Whether a prompt with its responses fits a row, and what becomes of one that does not.

`data.too_long` says it: "truncate" and "stop" refuse it by name, "skip" leaves it out, "drop"
leaves out its worst responses until the others fit. Axes: K responses a prompt.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from nca_jax.checks import UserError
from nca_jax.data import plan
from nca_jax.data.encode import Encoder, Example
from nca_jax.data.pack import RowLayout, check_fits
from nca_jax.data.table import Table, joined, table_of
from nca_jax.protocols import DataSection


def row_layout(config: DataSection) -> RowLayout:
    """Returns the shape of rows that the config asks for."""
    return RowLayout(
        row_len=config.row_len,
        rows=config.rows,
        block=config.block,
        num_pairs=config.row_pairs or plan.causal_bound(config.row_len, config.block),
        align=config.align,
    )


def fit_examples(examples: Table, encoder: Encoder, counts: Counter[str]) -> Table:
    """Returns the examples that fit, by the rule of `too_long`; counts what is left out."""
    config, least = encoder.config, encoder.least_responses
    if config.too_long not in ("skip", "drop") or not config.row_len:
        return examples  # `check_examples` refuses what does not fit; an open row_len fits
    fits = _fitting(examples, config)
    smaller, places = [], []
    for i in np.flatnonzero(~fits).tolist():
        kept = examples[i]
        while not _fits(kept, config) and config.too_long == "drop" and len(kept.scores) > least:
            kept = _without_worst(kept)
            counts["responses left out: do not fit data.row_len"] += 1
        if _fits(kept, config):
            smaller.append(kept)
            places.append(i)
        else:
            counts["records skipped: row_len"] += 1
    if not smaller:
        return examples.take(fits)
    both = joined([examples.take(fits), table_of(smaller)])
    return both.take(np.argsort([*np.flatnonzero(fits), *places]))


def row_sizes(examples: Table, config: DataSection) -> list[int]:
    """Returns how many tokens of a row each example needs, with the longest of its responses."""
    return _sizes(examples, config).tolist()


def check_examples(examples: Table, config: DataSection) -> None:
    """Raises UserError, naming the largest one, if an example cannot be in a row."""
    if not len(examples):
        return
    layout, k = row_layout(config), config.num_responses
    largest_first = np.argsort(-_sizes(examples, config), kind="stable")
    # The largest speaks for all, but the number of pairs does not go by length alone.
    for i in largest_first.tolist() if config.row_pairs else largest_first[:1].tolist():
        lengths = _longest(examples.lengths_of(i), k)
        if not _is_room(lengths, config):
            check_fits(lengths, layout, f"{examples[i].where}: with {len(lengths) - 1} responses")
    too_many = np.flatnonzero(examples.entries["count"] > k)
    if config.choose == "all" and len(too_many):
        example = examples[int(too_many[0])]
        raise UserError(
            f"{example.where}: has {len(example.scores)} responses, but "
            f"data.num_responses is {k}; raise it, or set data.choose to another than all."
        )


def _sizes(examples: Table, config: DataSection) -> np.ndarray:
    """Returns `row_sizes`, [N] int64."""
    sizes, align = np.zeros(len(examples), np.int64), config.align
    for at, lengths, _ in examples.by_count():
        of_responses = lengths[:, 1:]
        chosen = np.argsort(-of_responses, axis=1, kind="stable")[:, : config.num_responses]
        chosen.sort(axis=1)
        longest = np.take_along_axis(of_responses, chosen, axis=1)
        before = np.concatenate([lengths[:, :1], longest[:, :-1]], axis=1)
        sizes[at] = (-(-before // align) * align).sum(axis=1) + longest[:, -1]
    return sizes


def _fitting(examples: Table, config: DataSection) -> np.ndarray:
    """Returns which examples fit a row, [N] bool."""
    fits = _sizes(examples, config) <= config.row_len
    if config.row_pairs:  # their number has to be counted
        for i in np.flatnonzero(fits).tolist():
            fits[i] = _is_room(_longest(examples.lengths_of(i), config.num_responses), config)
    return fits


def _fits(example: Example, config: DataSection) -> bool:
    return _is_room(_longest(example.group.lengths(), config.num_responses), config)


def _is_room(lengths: Sequence[int], config: DataSection) -> bool:
    try:
        check_fits(lengths, row_layout(config), "It")
    except UserError:
        return False
    return True


def _longest(lengths: Sequence[int], k: int) -> list[int]:
    """Returns the lengths of the prompt and of its k longest responses, in data order."""
    prompt, *sizes = lengths
    chosen = sorted(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:k])
    return [prompt, *(sizes[i] for i in chosen)]


def _without_worst(example: Example) -> Example:
    """Returns the example without its response of the lowest score, the last of equal ones."""
    worst = len(example.scores) - 1 - int(np.argmin(example.scores[::-1]))
    stay = [i for i in range(len(example.scores)) if i != worst]
    return dataclasses.replace(
        example,
        group=example.group.take(stay),
        scores=example.scores[stay],
        num_cut=example.num_cut + len(example.group.responses[worst]),
    )
