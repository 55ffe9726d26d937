"""A prompt with its responses as token ids: what is cut, packed, scored and sampled for."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np


class Group(NamedTuple):
    """A prompt with its responses. None may be empty: the first response token needs a query."""

    prompt: np.ndarray  # [its length] int32 token ids
    responses: Sequence[np.ndarray]  # of each, [its length] int32 token ids
    # Which tokens may be attended to, as (prompt's, each response's) bools; None: all.
    key_on: tuple[np.ndarray, Sequence[np.ndarray]] | None = None
    # Which tokens of each response are scored, as bools; None: all. One at least is, of each.
    scored: Sequence[np.ndarray] | None = None

    def take(self, chosen: Collection[int]) -> "Group":
        """Returns the prompt with the chosen ones of its responses, in that order."""
        key_on = self.key_on and (self.key_on[0], tuple(self.key_on[1][i] for i in chosen))
        scored = self.scored and tuple(self.scored[i] for i in chosen)
        return Group(self.prompt, tuple(self.responses[i] for i in chosen), key_on, scored)

    def lengths(self) -> list[int]:
        """Returns the tokens of the prompt and of each response."""
        return [len(self.prompt), *map(len, self.responses)]

    def num_scored(self) -> list[int]:
        """Returns how many tokens of each response are scored."""
        if self.scored is None:
            return list(map(len, self.responses))
        return [int(np.count_nonzero(scored)) for scored in self.scored]
