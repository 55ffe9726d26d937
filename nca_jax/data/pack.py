"""Puts groups (a prompt with all its responses) into rows, and rows into micro-batches.

Axes: G groups, M micro-batches, R rows in each, T tokens in a row, P block pairs in a row.
"""

import bisect
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
    align: int  # prompts end and responses start at multiples of this


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
    members = []
    for r, row in enumerate(packed):
        micro, place = divmod(r, layout.rows)
        micro_of_group[row.groups] = micro
        if place in here:
            members.append((micro * len(here) + here.index(place), row))
    _write(Rows(*empty), members, groups, slots, layout)
    return rows, used, micro_of_group


def segment_spans(lengths: Sequence[int], start: int, align: int) -> list[plan.Span]:
    """Returns the spans of a prompt and its responses, laid out from `start` on.

    The prompt ends, and each response starts, at a multiple of `align`: so places in the row are as
    far apart as positions are, but for what lies between the prompt and the response.
    """
    prompt, *responses = lengths
    end = -(-(start + prompt) // align) * align
    spans = [(end - prompt, end)]
    for length in responses:
        start = -(-end // align) * align
        end = start + length
        spans.append((start, end))
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
    if layout.num_pairs >= plan.causal_bound(layout.row_len, layout.block):
        return
    num_pairs = layout.row_len // layout.block + plan.num_off_diagonal(spans, layout.block)
    if num_pairs > layout.num_pairs:
        raise UserError(
            f"{who} needs {num_pairs} block pairs in a row, but data.row_pairs is "
            f"{layout.num_pairs}; set it to {num_pairs} or more (0: always enough)."
        )


def _assign(lengths: list[list[int]], layout: RowLayout) -> list[_Row]:
    """Returns the rows that hold the groups, in the order in which they were opened.

    Each group, the largest first, goes to the fullest row that has room; of equals to the first.
    """
    t, align = layout.row_len, layout.align
    by_size = sorted(range(len(lengths)), key=lambda g: -sum(lengths[g]))  # stable
    rows: list[_Row] = []
    filled: list[tuple[int, int]] = []  # (end, -index) of each row, ascending
    for g in by_size:
        (_, prompt_end), *_, (_, end) = segment_spans(lengths[g], 0, align)
        latest = (t - (end - prompt_end)) // align * align - lengths[g][0]  # where it may begin
        for at in range(bisect.bisect_right(filled, (latest, 0)) - 1, -1, -1):
            r = -filled[at][1]
            if _put(rows[r], g, lengths[g], layout):
                del filled[at]
                break
        else:
            check_fits(lengths[g], layout, f"Prompt {g} of the batch with its responses")
            r = len(rows)
            rows.append(_Row(num_pairs=t // layout.block))
            _put(rows[r], g, lengths[g], layout)
        bisect.insort(filled, (rows[r].end, -r))
    return rows


def _put(row: _Row, g: int, lengths: list[int], layout: RowLayout) -> bool:
    """Adds the group, which is short enough, to the row if its pairs fit; returns whether so."""
    spans = segment_spans(lengths, row.end, layout.align)
    if layout.num_pairs < plan.causal_bound(layout.row_len, layout.block):
        num_pairs = row.num_pairs + plan.num_off_diagonal(spans, layout.block)
        if num_pairs > layout.num_pairs:
            return False
        row.num_pairs = num_pairs
    row.end = spans[-1][1]
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
    rows: Rows[np.ndarray],
    members: list[tuple[int, _Row]],
    groups: Sequence[Group],
    slots: Sequence[Sequence[int] | np.ndarray],
    layout: RowLayout,
) -> None:
    """Writes groups with their slots at their spans into rows of padding [rows, T], in place.

    Args:
      members: which of the rows are written, and what each holds.
    """
    t, parts, keys, counted, segments, scored = layout.row_len, [], [], [], [], []
    for r, row in members:
        num_scored = 0
        for prompt_id, (g, spans) in enumerate(zip(row.groups, row.spans, strict=True), start=1):
            group = groups[g]
            prompt, responses, key_on, is_counted = group
            lengths = group.num_scored()
            prompt_end = r * t + spans[0][1]
            for n, (ids, (start, end)) in enumerate(zip((prompt, *responses), spans, strict=True)):
                parts.append(ids)
                first = len(prompt) if n else 0
                segments.append((r * t + start, end - start, first, prompt_id, PROMPT_SEGMENT + n))
                if n:
                    size = lengths[n - 1]
                    scored.append((r * t + num_scored, prompt_end - 1, slots[g][n - 1], size))
                    num_scored += size
            keys += (key_on[0], *key_on[1]) if key_on else [np.ones(sum(group.lengths()), bool)]
            counted += is_counted or [np.ones(sum(map(len, responses)), bool)]
        live = plan.live_pairs(row.spans, row_len=t, block=layout.block)
        rows.pairs[r, : len(live)] = live
    if not segments:
        return
    start, length, first, prompt_id, segment = np.array(segments, np.int32).T
    within = _counted(length)  # of each token, its place in its segment
    at, ids = (np.repeat(start, length) + within).astype(np.intp), np.concatenate(parts)
    flat = Rows(*(x.reshape(-1, *x.shape[2:]) for x in rows))  # views: tokens of all rows
    flat.tokens[at] = ids
    flat.positions[at] = np.repeat(first, length) + within
    flat.prompt_ids[at] = np.repeat(prompt_id, length)
    flat.segments[at] = np.repeat(segment, length)
    flat.key_on[at] = np.concatenate(keys)
    is_response = segment > PROMPT_SEGMENT
    of_response, length = np.repeat(is_response, length), length[is_response]
    to, before, slot, size = np.array(scored, np.int32).T
    # The query of a token is the one before it: of a response's first the prompt's last.
    query = at[of_response] - 1
    query[np.cumsum(length) - length] = before
    is_scored, to = np.concatenate(counted), (np.repeat(to, size) + _counted(size)).astype(np.intp)
    flat.logp_at[to] = query[is_scored] % t
    flat.logp_token[to] = ids[of_response][is_scored]
    flat.logp_slot[to] = np.repeat(slot, size)


def _counted(lengths: np.ndarray) -> np.ndarray:
    """Returns 0, 1, .. for each of the lengths, one after the other."""
    ends = np.cumsum(lengths, dtype=np.int32)
    return np.arange(ends[-1], dtype=np.int32) - np.repeat(ends - lengths, lengths)
