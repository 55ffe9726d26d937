"""How often one response wins against another: by implicit rewards or by a judge, and by subset.

A win is 1, a tie 1/2, a loss 0. What wins is often only longer: `length_controlled` is the share of
wins that would be left if the two were of equal length, as AlpacaEval 2 has it.
Axes: N prompts, M pairs a prompt.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy.special import expit

from nca_jax.checks import UserError
from nca_jax.comparison import mean_and_error
from nca_jax.data.encode import Example
from nca_jax.evaluators import Heldout
from nca_jax.metrics import response_rewards
from nca_jax.rewards.judge import win_shares
from nca_jax.train_step import loss_of

LENGTH_CONTROLLED = "_length_controlled"


def with_length_controlled(name: str, wins: np.ndarray, longer: np.ndarray) -> dict[str, float]:
    """Returns {name: mean, name_length_controlled: the same at equal lengths} and their errors.

    Args:
      wins: [N, M] in [0, 1]; NaN where there is no such pair.
      longer: [N, M] by how much the response is longer than the other, in any unit.
    """
    return {
        **mean_and_error(name, np.nanmean(wins, axis=1)),
        **length_controlled(name + LENGTH_CONTROLLED, wins, longer),
    }


def length_controlled(name: str, wins: np.ndarray, longer: np.ndarray) -> dict[str, float]:
    """Returns {name: the share of wins at equal lengths, name_se: its standard error}.

    It is the value at 0 of a logistic regression of the wins on tanh(longer / its deviation) with
    an intercept, and no penalty. Pairs of one prompt are no independent ones: the error is that of
    the sums over them. The arguments are those of `with_length_controlled`.
    """
    prompt, pair = np.nonzero(~np.isnan(wins))
    won, more = wins[prompt, pair], longer[prompt, pair].astype(np.float64)
    deviation = more.std()
    if not deviation or won.min() == won.max():  # there is nothing to control
        return mean_and_error(name, np.nanmean(wins, axis=1))
    # An extra: only where there is something to fit.
    from sklearn.linear_model import (  # pyright: ignore[reportMissingImports]
        LogisticRegression,
    )

    x = np.stack([np.ones_like(won), np.tanh(more / deviation)], axis=1)  # [pairs, 2]
    fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8, max_iter=1000)
    labels = np.repeat([1, 0], len(won))  # of a win that is a share each is there, by its share
    fit.fit(np.concatenate([x, x]), labels, sample_weight=np.concatenate([won, 1 - won]))
    share, found = expit(x @ fit.coef_[0]), float(expit(fit.coef_[0, 0]))
    slopes = np.zeros((len(wins), 2))
    np.add.at(slopes, prompt, (won - share)[:, None] * x)
    count = len(np.unique(prompt))
    if count == 1:
        return {name: found}
    inverse = np.linalg.pinv((x * (share * (1 - share))[:, None]).T @ x)
    variance = inverse @ slopes.T @ slopes @ inverse * count / (count - 1)
    error = found * (1 - found) * np.sqrt(variance[0, 0])
    return {name: found, f"{name}_se": float(error)}


def wins_of_best(heldout: Heldout, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Returns the wins of the best response against each other one, and by how many tokens it is
    longer, [B, K - 1] both; NaN where there is no such response.

    The higher implicit reward wins; without a reference the higher log-probability a token.
    """
    responses, (loss, fields) = heldout.responses, loss_of(config)
    r = response_rewards(loss, responses, fields, has_reference=heldout.has_reference)
    mask, scores = np.asarray(responses.mask), np.asarray(responses.scores)
    order = np.argsort(np.where(mask, -scores, np.inf), axis=-1, kind="stable")
    r, lengths, there = (
        np.take_along_axis(np.asarray(x), order, axis=-1) for x in (r, responses.lengths, mask)
    )
    wins = (r[:, :1] > r[:, 1:]) + (r[:, :1] == r[:, 1:]) / 2
    longer = (lengths[:, :1] - lengths[:, 1:]).astype(np.float64)
    return np.where(there[:, 1:], wins, np.nan), np.where(there[:, 1:], longer, np.nan)


def check_subset(key: str, examples: Sequence[Example]) -> None:
    """Raises UserError if a record has no such key, or one response alone."""
    for example in examples:
        if key not in example.record:
            raise UserError(
                f"{example.where}: has no {key!r} to be counted by, but the keys "
                f"{sorted(example.record)}; give it one, or another --subset."
            )
        if len(example.scores) < 2:
            raise UserError(f"{example.where}: has one response, and --subset compares two.")


def accuracy_by_subset(
    key: str, examples: Sequence[Example], heldout: Heldout, config: ConfigDict
) -> tuple[dict[str, float], dict[str, int]]:
    """Returns the accuracy in each subset, their mean, and that of all at equal lengths.

    Args:
      key: of the records, which says what subset each belongs to.
      examples: those of `heldout`, in order.
    Returns:
      {"accuracy/NAME": .., "accuracy/mean": .., "accuracy_length_controlled": .., errors}, ties
      being half a win, and {"accuracy/NAME": prompts}.
    """
    names = np.array([str(example.record[key]) for example in examples])
    wins, longer = (x[: len(examples)] for x in wins_of_best(heldout, config))
    by_prompt, found, sizes = np.nanmean(wins, axis=1), {}, {}
    for name in np.unique(names).tolist():
        found |= mean_and_error(f"accuracy/{name}", by_prompt[names == name])
        sizes[f"accuracy/{name}"] = int(np.sum(names == name))
    found["accuracy/mean"] = float(np.mean([found[name] for name in sizes]))
    return found | length_controlled("accuracy" + LENGTH_CONTROLLED, wins, longer), sizes


def judged(command: str, told: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns `with_length_controlled` of "win_rate", of the policy against the reference.

    Args:
      command: see `rewards.judge`.
      told: N prompts, each with the "policy"'s and the "reference"'s M responses.
    """
    prompts = [one["prompt"] for one in told for _ in one["policy"]]
    mine, theirs = ([text for one in told for text in one[who]] for who in ("policy", "reference"))
    shape = (len(told), -1)
    longer = np.array([len(a) - len(b) for a, b in zip(mine, theirs, strict=True)])
    wins = win_shares(command, prompts, mine, theirs)
    return with_length_controlled("win_rate", wins.reshape(shape), longer.reshape(shape))
