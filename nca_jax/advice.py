"""What a run is going to do, and what would make it learn little or nothing.

`inspect` and `train` say the same before the first step; a warning says what is so and what to set.
Axes: N training prompts, K responses a prompt.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nca_jax.data.pipeline import choose
from nca_jax.data.table import Table
from nca_jax.losses import targets_from_scores
from nca_jax.protocols import DataSection
from nca_jax.train_step import loss_of

NEARLY_ALL = 0.9  # of the prompts
NEAR = 0.01  # of a target to that of hard labels, or to that of no preference
BEST = 0.6  # mean target of the best response under an alpha that is proposed
MOST = 2**16  # prompts whose scores are looked at
HALVINGS = 40  # of the range of log(alpha)


def before_training(
    examples: Table,
    config: ConfigDict,
    steps: int,
    *,
    num_heldout: int,
    num_devices: int,
) -> list[str]:
    """Returns a line of what a run is going to do, and one for each warning.

    Args:
      examples: the N training prompts with their scores in the unit of the run.
    """
    plan = _plan_of(config.data, len(examples), steps)
    plan = (
        f"{len(examples)} training prompts, {num_heldout} held out, {plan} on {num_devices} devices"
    )
    found = [
        *_of_batch(config.data, len(examples)),
        *_of_warmup(config, steps),
        *_of_scores(some_scores(examples), config),
    ]
    return [plan, *(f"warning: {one}" for one in found)]


def some_scores(examples: Table) -> list[np.ndarray]:
    """Returns the scores of each example, [n]; of many examples those of MOST, evenly spread."""
    some = examples[:: max(1, -(-len(examples) // MOST))]
    firsts, counts = some.entries["first"].tolist(), some.entries["count"].tolist()
    return [some.scores[first + 1 : first + 1 + n] for first, n in zip(firsts, counts, strict=True)]


def alpha_for(scores: Sequence[np.ndarray]) -> float | None:
    """Returns the alpha under which the best response of a prompt has the target BEST on average.

    Args:
      scores: N times [n], of prompts whose responses differ in score.
    Returns:
      None where no alpha does: too many of the best ones are tied.
    """
    padded = _padded(scores)
    spans = [float(np.ptp(one)) for one in scores]
    low, high = math.log(1e-3 * min(spans)), math.log(1e3 * max(spans))
    if _mean_best(*padded, math.exp(low)) <= BEST:
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _mean_best(*padded, math.exp(middle)) > BEST:
            low = middle
        else:
            high = middle
    return math.exp(low)


def _plan_of(data: DataSection, num_prompts: int, steps: int) -> str:
    """Returns the steps, and what of the training prompts they see."""
    seen = steps * data.batch_size
    if data.weights:
        share = "drawn by config.data.weights"
    else:
        left = -seen % num_prompts
        share = f"{seen / num_prompts:.3g} epochs" + (f", {left} left over" if left else "")
    return f"{steps} steps of {data.batch_size} prompts ({share})"


def _of_batch(data: DataSection, num_prompts: int) -> list[str]:
    if data.batch_size <= num_prompts:
        return []
    return [
        f"a step of {data.batch_size} prompts sees some of the {num_prompts} training prompts more "
        f"than once; set config.data.batch_size={num_prompts} or less"
    ]


def _of_warmup(config: ConfigDict, steps: int) -> list[str]:
    warmup = math.ceil(config.optim.warmup_frac * steps)
    warmup -= config.optim.warmup_from == "share" and warmup > 0  # its last step has the whole rate
    if 2 * warmup < steps:
        return []
    return [
        f"the learning rate still rises in {warmup} of {steps} steps, below config.optim.lr; set "
        "more config.epochs or config.steps, a smaller config.data.batch_size, or "
        "config.optim.warmup_frac=0"
    ]


def _of_scores(scores: Sequence[np.ndarray], config: ConfigDict) -> list[str]:
    """Returns what is wrong with the scores, and with alpha as their temperature."""
    loss, fields = loss_of(config)
    if "scores" not in loss.reads:
        return []
    k, how, rng = config.data.num_responses, config.data.choose, np.random.default_rng(config.seed)
    chosen = [one[choose(one, k, how, rng)] for one in scores]
    several = [one for one in chosen if len(one) > 1]
    differing = [one for one in several if np.ptp(one) > 0]
    said, num_tied = [], len(several) - len(differing)
    if several and num_tied >= NEARLY_ALL * len(several):
        said.append(
            f"the scores of {num_tied} of {len(several)} training prompts are tied, which prefers "
            "none of their responses; give scores that tell responses apart"
        )
    if differing and fields.get("alpha"):  # 0 means hard labels
        said += _of_alpha(differing, float(fields["alpha"]))
    return said


def _of_alpha(scores: Sequence[np.ndarray], alpha: float) -> list[str]:
    """Returns what is wrong with alpha for prompts whose responses differ in score."""
    best = _mean_best(*_padded(scores), alpha)
    even = float(np.mean([1 / len(one) for one in scores]))
    if even + NEAR <= best <= 1 - NEAR:
        return []
    is_hard = best > 1 - NEAR
    better = alpha_for(scores)
    low, high = min(map(np.min, scores)), max(map(np.max, scores))
    return [
        f"targets are {'one-hot' if is_hard else 'uniform'}: scores span {low:g} to {high:g}, "
        f"alpha {alpha:g}: the best has {best:.3f}"
        + (f"; alpha {better:.2g} gives {BEST:g}" if better else "")
        + (", and 0 says that hard labels are meant" if is_hard else "")
        + " (config.loss.alpha)"
    ]


def _padded(scores: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and mask, [N, K] float32 and bool."""
    lengths = np.array([len(one) for one in scores])
    mask = np.arange(max(lengths)) < lengths[:, None]
    padded = np.zeros(mask.shape, np.float32)
    padded[mask] = np.concatenate(scores)
    return padded, mask


def _mean_best(scores: np.ndarray, mask: np.ndarray, alpha: float) -> float:
    """Returns the target of a prompt's best response, mean over prompts."""
    targets = targets_from_scores(jnp.asarray(scores), alpha=alpha, mask=jnp.asarray(mask))
    return float(np.mean(np.max(np.asarray(targets), axis=-1)))
