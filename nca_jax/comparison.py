"""Policy beside reference: means over prompts, how sure they are, and the table of them.

NAME is the mean of the policy's values, NAME_reference of the reference's, NAME_difference of the
differences at each prompt, and *_se the standard error of each, which one prompt alone has not.
"""

from collections.abc import Mapping

import numpy as np
from scipy.special import stdtrit

REFERENCE, DIFFERENCE, ERROR = "_reference", "_difference", "_se"


def mean_and_error(name: str, values: np.ndarray) -> dict[str, float]:
    """Returns {name: mean of [n] values of independent prompts, name_se: its standard error}."""
    found = {name: float(np.mean(values))}
    if len(values) > 1:
        found[name + ERROR] = float(np.std(values, ddof=1) / np.sqrt(len(values)))
    return found


def comparison(
    name: str, policy: np.ndarray, reference: np.ndarray | None = None
) -> dict[str, float]:
    """Returns `mean_and_error` of policy, reference and their paired difference, [n] each."""
    found = mean_and_error(name, policy)
    if reference is not None:
        found |= mean_and_error(name + REFERENCE, reference)
        found |= mean_and_error(name + DIFFERENCE, policy - reference)
    return found


def table(
    metrics: dict[str, float], num_prompts: int, sizes: Mapping[str, int] | None = None
) -> list[str]:
    """Returns the lines that say `metrics`: policy, reference, difference, each name once.

    The interval is that of the difference, or of the policy where there is no other: the mean and
    Student's t of 95% times its standard error.

    Args:
      num_prompts: that each standard error is over,
      sizes: but of these metrics, which are over so many.
    """
    others = [x for x in (REFERENCE, DIFFERENCE) if any(name.endswith(x) for name in metrics)]
    head = "".join(f"{x:>12s}" for x in ("policy", *(x[1:] for x in others)))
    said = "  95% interval" + ", of the difference if any" * (DIFFERENCE in others)
    lines = [f"{'':27s}{head}{said}"]
    for name, value in metrics.items():
        if name.endswith((REFERENCE, DIFFERENCE, ERROR)):
            continue
        line = f"{name:27s}{value:12.4f}"
        for other in others:
            line += f"{metrics[name + other]:12.4f}" if name + other in metrics else " " * 12
        of_what = name + DIFFERENCE if name + DIFFERENCE in metrics else name
        if of_what + ERROR in metrics:
            count = (sizes or {}).get(name, num_prompts)
            half = stdtrit(count - 1, 0.975) * metrics[of_what + ERROR]
            line += f"  {metrics[of_what] - half:.4f} to {metrics[of_what] + half:.4f}"
        lines.append(line.rstrip())
    return lines
