"""Rewards for generated text, by name in `SCORERS`.

A scorer takes N prompts and N responses and returns N float32 scores; it must be deterministic.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from nca_jax.checks import UserError


def vader(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """How positive a text is, in [-1, 1]: VADER's compound score, averaged over its sentences.

    One compound score of a whole text saturates after a few positive words; the mean over
    sentences does not. (Hutto and Gilbert 2014; the package vaderSentiment.)
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("The scorer 'vader' needs: pip install nca_jax[demo].") from None
    analyzer = SentimentIntensityAnalyzer()

    def score(text: str) -> float:
        sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", text) if s.strip()]
        compounds = [analyzer.polarity_scores(sentence)["compound"] for sentence in sentences]
        return float(np.mean(compounds)) if compounds else 0.0

    return np.array([score(text) for text in responses], np.float32)


SCORERS: dict[str, Callable[[Sequence[str], Sequence[str]], np.ndarray]] = {"vader": vader}


def get_scorer(name: str) -> Callable[[Sequence[str], Sequence[str]], np.ndarray] | None:
    """Returns the scorer of `config.generate.scorer`; None for "".

    Raises:
      UserError: no scorer has that name.
    """
    if name and name not in SCORERS:
        raise UserError(f"config.generate.scorer={name!r} is not one of {', '.join(SCORERS)}.")
    return SCORERS.get(name)
