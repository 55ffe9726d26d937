"""The unit of scores where `data.score_unit` is spread: how far they lie apart within a prompt."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from nca_jax.checks import UserError
from nca_jax.data.encode import Example


def spread(examples: Sequence[Example]) -> float:
    """Returns the mean over records of the standard deviation of a record's scores.

    It is that of the population (divided by n), over all the responses of the record, whatever K of
    them a step takes; a record of ties counts as 0.

    Raises:
      UserError: it is 0, or float32 does not hold the scores divided by it.
    """
    unit = float(np.mean([np.std(example.scores, dtype=np.float64) for example in examples]))
    largest = max(float(np.max(np.abs(example.scores))) for example in examples)
    if largest >= unit * float(np.finfo(np.float32).max):
        raise UserError(
            "data.score_unit=spread divides by the mean standard deviation of a record's scores, "
            f"which is {unit:g} over {len(examples)} training records; give scores that differ, "
            "or set data.score_unit=raw."
        )
    return unit


def divided(examples: Sequence[Example], unit: float) -> list[Example]:
    """Returns the examples with their scores in another unit."""
    return [
        dataclasses.replace(e, scores=(e.scores / np.float64(unit)).astype(np.float32))
        for e in examples
    ]
