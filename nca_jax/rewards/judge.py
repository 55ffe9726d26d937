"""A judge of pairs: a command of one's own that says which of two responses is the better one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nca_jax.rewards.command import ask

WINS = {"a": 1.0, "b": 0.0, "tie": 0.5}  # of a


def win_shares(command: str, prompts: Sequence[Any], a: list[str], b: list[str]) -> np.ndarray:
    """Returns how much each response of `a` wins against that of `b`, [N] of 0, 1/4, .., 1.

    Each pair is asked twice, once in either order: judges prefer a place. The command reads
    {"prompt", "a", "b"} a line and writes {"winner": "a" or "b" or "tie"}.

    Args:
      prompts: [N] texts or messages.
    Raises:
      UserError: as `command.ask`.
    """
    pairs = [
        {"prompt": prompt, "a": first, "b": second}
        for firsts, seconds in ((a, b), (b, a))
        for prompt, first, second in zip(prompts, firsts, seconds, strict=True)
    ]
    found = ask(
        f"The judge {command}",
        command,
        pairs,
        _read_win,
        what="pairs",
        wanted='{"winner": "a", "b" or "tie"}',
    )
    as_a, as_b = np.array(list(found)).reshape(2, -1)
    return (as_a + 1 - as_b) / 2


def _read_win(said: Any) -> float | None:
    winner = said.get("winner") if isinstance(said, dict) else None
    return WINS.get(winner) if isinstance(winner, str) else None
