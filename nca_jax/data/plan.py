"""Which blocks of attention a packed row needs: one exact list of (query block, key block) pairs.

A segment's span is (start, end) in tokens of the row; a group's spans are its prompt's, then its
responses'. Token q may attend to token k when k <= q and k is in q's own segment or its prompt. A
pair of blocks is live when at least one of its token pairs may; the diagonal pairs always are, also
where a block holds padding alone, so that no query block is without a key.
"""

from collections.abc import Iterable, Sequence

import numpy as np

Span = tuple[int, int]


def live_pairs(groups: Iterable[Sequence[Span]], *, row_len: int, block: int) -> np.ndarray:
    """Returns the live pairs of one row, sorted by query block, then key block: [P, 2] int32.

    Args:
      groups: the spans of each group in the row, prompt first.
      row_len: T, a multiple of `block`. Both in tokens.
    """
    live = np.eye(row_len // block, dtype=bool)  # [query blocks, key blocks]
    for spans in groups:
        _mark(live, spans, block)
    return np.argwhere(np.tril(live)).astype(np.int32)


def num_off_diagonal(spans: Sequence[Span], block: int) -> int:
    """Returns how many live pairs a group has off the diagonal.

    Groups share no such pair: one begins in the block where the other ends, or after it. So a row
    has as many pairs as it has blocks, and these of each group.
    """
    origin = spans[0][0] // block * block
    local = [(start - origin, end - origin) for start, end in spans]
    size = -(-local[-1][1] // block)
    live = np.zeros((size, size), bool)
    _mark(live, local, block)
    return int(np.tril(live, -1).sum())


def causal_bound(row_len: int, block: int) -> int:
    """Returns how many pairs a causal row can have at most."""
    num_blocks = row_len // block
    return num_blocks * (num_blocks + 1) // 2


def _mark(live: np.ndarray, spans: Sequence[Span], block: int) -> None:
    """Marks each segment's queries against its own and its prompt's keys, causal or not.

    Below the diagonal every key is before every query, and on it every token sees itself: the lower
    triangle of these rectangles is exact, and the caller takes it.
    """
    prompt, *_ = blocks = [slice(start // block, -(-end // block)) for start, end in spans]
    for segment in blocks:
        live[segment, segment] = True
        live[segment, prompt] = True
