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
from nca_jax.data.pack import RowLayout, check_fits, segment_spans
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


def fit_examples(
    examples: Sequence[Example], encoder: Encoder, counts: Counter[str]
) -> list[Example]:
    """Returns the examples that fit, by the rule of `too_long`; counts what is left out."""
    config, least = encoder.config, encoder.least_responses
    if config.too_long not in ("skip", "drop") or not config.row_len:
        return list(examples)  # `check_examples` refuses what does not fit; an open row_len fits
    fitting = []
    for example in examples:
        kept = example
        while not _fits(kept, config) and config.too_long == "drop" and len(kept.scores) > least:
            kept = _without_worst(kept)
            counts["responses left out: do not fit data.row_len"] += 1
        if _fits(kept, config):
            fitting.append(kept)
        else:
            counts["records skipped: row_len"] += 1
    return fitting


def row_sizes(examples: Sequence[Example], config: DataSection) -> list[int]:
    """Returns how many tokens of a row each example needs, with the longest of its responses."""
    longest = [_longest(example, config.num_responses) for example in examples]
    return [segment_spans(lengths, 0, config.align)[-1][1] for lengths in longest]


def check_examples(examples: Sequence[Example], config: DataSection) -> None:
    """Raises UserError, naming the largest one, if an example cannot be in a row."""
    layout, k = row_layout(config), config.num_responses
    sized = [(_longest(example, k), example.where) for example in examples]
    sized.sort(key=lambda item: -segment_spans(item[0], 0, layout.align)[-1][1])
    # The largest speaks for all, but the number of pairs does not go by length alone.
    for lengths, where in sized if config.row_pairs else sized[:1]:
        check_fits(lengths, layout, f"{where}: with {len(lengths) - 1} responses")
    for example in examples if config.choose == "all" else ():
        if len(example.scores) > k:
            raise UserError(
                f"{example.where}: has {len(example.scores)} responses, but "
                f"data.num_responses is {k}; raise it, or set data.choose to another than all."
            )


def _fits(example: Example, config: DataSection) -> bool:
    try:
        check_fits(_longest(example, config.num_responses), row_layout(config), example.where)
    except UserError:
        return False
    return True


def _longest(example: Example, k: int) -> list[int]:
    """Returns the lengths of the prompt and of its k longest responses, in data order."""
    prompt, *sizes = example.group.lengths()
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
