"""Strings that end a sample, found as they appear, across tokens."""

from collections.abc import Callable, Collection, Sequence

import numpy as np

# Of the ids of a sample, and how many of them were looked at before: how many of them it has where
# a stop string ends it; 0: it goes on.
Stop = Callable[[np.ndarray, int], int]
TOKENS = 4  # of a character, at most: its bytes


def stop_at(
    stops: Sequence[str], decode: Callable[[list[int]], str], silent: Collection[int] = ()
) -> Stop | None:
    """Returns what ends a sample with the first token that completes any of `stops`.

    Args:
      decode: ids to text.
      silent: ids that are no text.
    Returns:
      None where no string, or only empty ones, are there.
    """
    stops = [stop for stop in stops if stop]
    if not stops:
        return None
    margin = TOKENS * max(map(len, stops))

    def is_in(ids: np.ndarray) -> bool:
        text = decode([i for i in ids.tolist() if i not in silent])
        return any(stop in text for stop in stops)

    def stop(ids: np.ndarray, looked: int) -> int:
        if len(ids) == looked or not is_in(ids[max(0, looked - margin) :]):
            return 0
        sizes = range(looked + 1, len(ids) + 1)
        return next((size for size in sizes if is_in(ids[:size])), 0)

    return stop
