"""The unit of scores where `data.score_unit` is spread: how far they lie apart within a prompt."""

import dataclasses

import numpy as np

from nca_jax.checks import UserError
from nca_jax.data.table import Table


def spread(examples: Table) -> float:
    """Returns the mean over records of the standard deviation of a record's scores.

    It is that of the population (divided by n), over all the responses of the record, whatever K of
    them a step takes; a record of ties counts as 0.

    Raises:
      UserError: it is 0, or float32 does not hold the scores divided by it.
    """
    deviations, largest = np.zeros(len(examples)), 0.0
    for at, _, scores in examples.by_count():
        deviations[at] = np.std(scores, axis=1, dtype=np.float64)
        largest = max(largest, float(np.max(np.abs(scores))))
    unit = float(np.mean(deviations))
    if largest >= unit * float(np.finfo(np.float32).max):
        raise UserError(
            "data.score_unit=spread divides by the mean standard deviation of a record's scores, "
            f"which is {unit:g} over {len(examples)} training records; give scores that differ, "
            "or set data.score_unit=raw."
        )
    return unit


def divided(examples: Table, unit: float) -> Table:
    """Returns the examples with their scores in another unit."""
    scores = (examples.scores / np.float64(unit)).astype(np.float32)
    return dataclasses.replace(examples, scores=scores)
