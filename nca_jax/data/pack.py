"""Puts groups (a prompt with all its responses) into rows, and rows into micro-batches.

Axes: G groups, M micro-batches, R rows in each, T tokens in a row, P block pairs in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nca_jax.batch import PROMPT_SEGMENT, Rows
from nca_jax.checks import UserError
from nca_jax.data import plan
from nca_jax.data.group import Group


@dataclass(frozen=True)
class RowLayout:
    """The shape of rows, in tokens where not said otherwise."""

    row_len: int  # T, a multiple of block
    rows: int  # R, rows in a micro-batch
    block: int  # attention block
    num_pairs: int  # P, live block pairs that a row may hold
    align: int  # segments start at multiples of this


@dataclass
class _Row:
    """A row being filled: group indices, the spans of each, where it ends and its pairs so far."""

    num_pairs: int
    end: int = 0
    groups: list[int] = field(default_factory=list)
    spans: list[list[plan.Span]] = field(default_factory=list)


def pack(
    groups: Sequence[Group],
    layout: RowLayout,
    *,
    slots: Sequence[Sequence[int] | np.ndarray],
    num_slots: int,
    num_micro: int | None = None,
    rows_here: Sequence[int] | None = None,
) -> tuple[Rows[np.ndarray], int, np.ndarray]:
    """Packs groups by best-fit decreasing; the same input gives the same rows everywhere.

    Args:
      slots: of each group, which log-probability each of its responses is: b * K + k.
      num_slots: B * K, the slot that stands for none.
      num_micro: M; empty rows fill up. None: as many as are needed.
      rows_here: which of the R rows of a micro-batch are written, ascending: this process's share
        of a plan that all processes make. None: all of them.
    Returns:
      (rows with leading axes [M, R], or [M, len(rows_here)]; micro-batches that hold something;
      [G] int32 micro-batch of each group).
    Raises:
      UserError: a group alone is more than a row.
    """
    packed = _assign([group.lengths() for group in groups], layout)
    used = -(-len(packed) // layout.rows)
    num_micro = used if num_micro is None else num_micro
    if used > num_micro:
        raise ValueError(f"{len(packed)} rows need {used} micro-batches, num_micro is {num_micro}.")
    here = list(range(layout.rows) if rows_here is None else rows_here)
    empty = _empty_rows(num_micro * len(here), layout, num_slots)
    rows = Rows(*(x.reshape(num_micro, len(here), *x.shape[1:]) for x in empty))
    micro_of_group = np.zeros(len(groups), np.int32)
    for r, row in enumerate(packed):
        micro, place = divmod(r, layout.rows)
        micro_of_group[row.groups] = micro
        if place in here:
            into = Rows(*(x[micro, here.index(place)] for x in rows))
            members = [(groups[g], slots[g]) for g in row.groups]
            _write(into, members, row.spans, layout)
    return rows, used, micro_of_group


def segment_spans(lengths: Sequence[int], start: int, align: int) -> list[plan.Span]:
    """Returns the spans of segments laid out from `start` on, each at a multiple of `align`."""
    spans = []
    for length in lengths:
        start = -(-start // align) * align
        spans.append((start, start + length))
        start += length
    return spans


def check_fits(lengths: Sequence[int], layout: RowLayout, who: str) -> None:
    """Raises UserError, beginning with `who`, if a group alone is more than a row holds."""
    spans = segment_spans(lengths, 0, layout.align)
    needed = spans[-1][1]
    if needed > layout.row_len:
        raise UserError(
            f"{who} needs {needed} tokens of a row, but data.row_len is {layout.row_len}; set it "
            f"to {needed} or more, lower data.max_prompt_len or data.max_response_len, or set "
            "data.too_long to drop or skip."
        )
    num_pairs = layout.row_len // layout.block + plan.num_off_diagonal(spans, layout.block)
    if num_pairs > layout.num_pairs:
        raise UserError(
            f"{who} needs {num_pairs} block pairs in a row, but data.row_pairs is "
            f"{layout.num_pairs}; set it to {num_pairs} or more (0: always enough)."
        )


def _assign(lengths: list[list[int]], layout: RowLayout) -> list[_Row]:
    """Returns the rows that hold the groups, in the order in which they were opened."""
    by_size = sorted(range(len(lengths)), key=lambda g: -sum(lengths[g]))  # stable
    rows: list[_Row] = []
    for g in by_size:
        fullest_first = sorted(rows, key=lambda row: -row.end)
        if not any(_put(row, g, lengths[g], layout) for row in fullest_first):
            check_fits(lengths[g], layout, f"Prompt {g} of the batch with its responses")
            rows.append(_Row(num_pairs=layout.row_len // layout.block))
            _put(rows[-1], g, lengths[g], layout)
    return rows


def _put(row: _Row, g: int, lengths: list[int], layout: RowLayout) -> bool:
    """Adds the group to the row if it fits; returns whether it did."""
    spans = segment_spans(lengths, row.end, layout.align)
    if spans[-1][1] > layout.row_len:
        return False
    num_pairs = row.num_pairs + plan.num_off_diagonal(spans, layout.block)
    if num_pairs > layout.num_pairs:
        return False
    row.num_pairs, row.end = num_pairs, spans[-1][1]
    row.groups.append(g)
    row.spans.append(spans)
    return True


def _empty_rows(num_rows: int, layout: RowLayout, num_slots: int) -> Rows[np.ndarray]:
    """Returns rows of padding, leading axis [num_rows]."""
    shape = (num_rows, layout.row_len)
    pairs = np.full((num_rows, layout.num_pairs, 2), -1, np.int32)
    num_blocks = layout.row_len // layout.block
    pairs[:, :num_blocks] = np.arange(num_blocks, dtype=np.int32)[:, None]
    return Rows(
        tokens=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        prompt_ids=np.zeros(shape, np.int32),
        segments=np.zeros(shape, np.int32),
        key_on=np.zeros(shape, bool),
        pairs=pairs,
        logp_at=np.zeros(shape, np.int32),
        logp_token=np.zeros(shape, np.int32),
        logp_slot=np.full(shape, num_slots, np.int32),
    )


def _write(
    row: Rows[np.ndarray],
    members: list[tuple[Group, Sequence[int] | np.ndarray]],
    spans: list[list[plan.Span]],
    layout: RowLayout,
) -> None:
    """Writes groups with their slots at their spans into one row of padding, in place.

    Arrays are [T] and, of pairs, [P, 2].
    """
    num_scored = 0
    for prompt_id, ((group, slots), (prompt_span, *response_spans)) in enumerate(
        zip(members, spans, strict=True), start=1
    ):
        prompt_on, responses_on = group.key_on or (True, [True] * len(group.responses))
        prompt_len = len(group.prompt)
        _write_segment(row, prompt_span, group.prompt, 0, prompt_id, PROMPT_SEGMENT, prompt_on)
        for k, (start, end) in enumerate(response_spans):
            ids, segment = group.responses[k], PROMPT_SEGMENT + 1 + k
            _write_segment(row, (start, end), ids, prompt_len, prompt_id, segment, responses_on[k])
            scored = slice(num_scored, num_scored + end - start)
            row.logp_at[scored] = [prompt_span[1] - 1, *range(start, end - 1)]
            row.logp_token[scored] = ids
            row.logp_slot[scored] = slots[k]
            num_scored = scored.stop
    live = plan.live_pairs(spans, row_len=layout.row_len, block=layout.block)
    row.pairs[: len(live)] = live


def _write_segment(
    row: Rows[np.ndarray],
    span: plan.Span,
    ids: np.ndarray,
    first_position: int,
    prompt_id: int,
    segment: int,
    key_on: np.ndarray | bool,
) -> None:
    at = slice(*span)
    row.tokens[at] = ids
    row.positions[at] = first_position + np.arange(len(ids))
    row.prompt_ids[at] = prompt_id
    row.segments[at] = segment
    row.key_on[at] = key_on
