"""What a run is going to do, what would make it learn little or nothing, and how it went.

`inspect` and `train` say the same before the first step; a warning says what is so and what to set.
Axes: N training prompts, K responses a prompt.
"""

import math
import shlex
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nca_jax.data.pipeline import EVAL, choose
from nca_jax.data.table import Table
from nca_jax.files import AnyPath
from nca_jax.losses import targets_from_scores
from nca_jax.protocols import DataSection
from nca_jax.train_step import loss_of

NEARLY_ALL = 0.9  # of the prompts
NEAR = 0.01  # of a target to that of hard labels, or to that of no preference
BEST = 0.6  # mean target of the best response under an alpha that is proposed
HELDOUT = 0.2  # of the prompts, where so few are there that none is held out
SHOWN = ("loss", "accuracy_half_ties", "chosen_logp_drift")  # of a held-out set, at the end
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
    prompts, devices = plural(len(examples), "training prompt"), plural(num_devices, "device")
    plan = f"{prompts}, {num_heldout} held out, {plan} on {devices}"
    found = [
        *_of_batch(config.data, len(examples)),
        *_of_heldout(config.data, num_heldout),
        *_of_warmup(config, steps),
        *_of_scores(some_scores(examples), config),
    ]
    return [plan, *(f"warning: {one}" for one in found)]


def after_training(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Returns how each held-out set went from the first evaluation to the last, and warnings.

    Args:
      lines: of metrics.jsonl.
    """
    said = []
    for split in dict.fromkeys(line["split"] for line in lines if line["split"] != "train"):
        found = [line for line in lines if line["split"] == split]
        first, last, best = found[0], found[-1], min(found, key=lambda line: line["loss"])
        if first is last:
            continue
        name = split.removeprefix(EVAL).removeprefix("/")
        who = "held-out prompts" + (f" of {name}" if name else "")
        went = (f"{x} {first[x]:.4g} to {last[x]:.4g}" for x in SHOWN if x in first and x in last)
        said.append(
            f"{who}, from step {first['step']} to {last['step']}: {', '.join(went)}; the least "
            f"loss was {best['loss']:.4g} at step {best['step']}"
        )
        if last["loss"] > first["loss"]:
            said.append(
                f"warning: the loss of {who} ended above its start: those of training may have "
                "been learned by heart. Lower config.optim.lr or config.epochs, or add prompts"
            )
    return said


def plural(number: float, what: str) -> str:
    """Returns "1 step", "2 steps"; what is not whole with three digits."""
    digits = ".0f" if number == round(number) else ".3g"
    return f"{number:{digits}} {what}" + "s" * (number != 1)


def chosen_scores(scores: Sequence[np.ndarray], config: ConfigDict) -> list[np.ndarray]:
    """Returns the scores of the responses that a step may take of each prompt.

    Args:
      scores: N times [n], of all responses.
    """
    k, how, rng = config.data.num_responses, config.data.choose, np.random.default_rng(config.seed)
    return [one[choose(one, k, how, rng)] for one in scores]


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
        passes = plural(seen / num_prompts, "epoch")
        share = passes + (f", {left} left over" if left else "")
    return f"{plural(steps, 'step')} of {plural(data.batch_size, 'prompt')} ({share})"


def _of_batch(data: DataSection, num_prompts: int) -> list[str]:
    if data.batch_size <= num_prompts:
        return []
    return [
        f"a step of {data.batch_size} prompts sees some of the {num_prompts} training prompts more "
        f"than once; set config.data.batch_size={num_prompts} or less"
    ]


def _of_heldout(data: DataSection, num_heldout: int) -> list[str]:
    if num_heldout or not data.eval_fraction:
        return []
    return [
        "no prompt is held out, so nothing will say how the policy does on others; set "
        f"config.data.eval_fraction={HELDOUT:g} (now {data.eval_fraction:g})"
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
    several = [one for one in chosen_scores(scores, config) if len(one) > 1]
    differing = [one for one in several if np.ptp(one) > 0]
    said, num_tied = [], len(several) - len(differing)
    if several and num_tied >= NEARLY_ALL * len(several):
        said.append(
            f"the scores of {num_tied} of {len(several)} training prompts are tied, which prefers "
            "none of their responses; give scores that tell responses apart"
        )
    if differing and loss.soft_labels and fields["alpha"]:  # 0 means hard labels
        said += _of_alpha(differing, float(fields["alpha"]))
    return said


def _of_alpha(scores: Sequence[np.ndarray], alpha: float) -> list[str]:
    """Returns what is wrong with alpha for prompts whose responses differ in score."""
    best = _mean_best(*_padded(scores), alpha)
    even = float(np.mean([1 / len(one) for one in scores]))
    hard = float(np.mean([1 / np.sum(one == one.max()) for one in scores]))  # ties share
    if even + NEAR <= best <= hard - NEAR:
        return []
    is_hard = best > hard - NEAR
    kind = "uniform" if not is_hard else "one-hot" + " but for ties" * (hard < 1 - NEAR)
    better = alpha_for(scores)
    low, high = min(map(np.min, scores)), max(map(np.max, scores))
    return [
        f"targets are {kind}: scores span {low:g} to {high:g}, "
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


def what_next(
    workdir: AnyPath, *, can_evaluate: bool, can_sample: bool, export: str = ""
) -> list[str]:
    """Returns the commands that a run which is done can go to, a line each."""
    here = f"--workdir={shlex.quote(str(workdir))}"
    flags = {
        "evaluate": can_evaluate and here,
        "generate": can_sample and f"{here} --prompts=FILE --out=FILE",
        "export": f"{here} --out=FOLDER{export}",
    }
    return [f"next: python -m nca_jax.{name} {x}" for name, x in flags.items() if x]
