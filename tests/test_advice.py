"""What a run is told before it starts: what its steps see, and what would teach it nothing."""

import numpy as np
import pytest
from commands import write_records
from helpers import data_config, encode_one

from nca_jax import advice, build
from nca_jax.checks import UserError
from nca_jax.data.facts import facts_of
from nca_jax.data.table import table_of
from nca_jax.data.unit import spread
from nca_jax.flags import parse_flags
from nca_jax.infra.optim import make_schedule
from nca_jax.losses import LOSSES

POINTS = [[2.0, 5.0, 9.0], [3.0, 6.0, 8.0], [2.0, 4.0, 7.0], [3.0, 5.0, 9.0]]


def config_of(arg: str = "", **changes):
    config, _ = parse_flags(["x", f"--config=configs/jsonl.py:files=x,smoke{arg}"])
    config.update_from_flattened_dict({"data.batch_size": 2} | changes)
    return config


def said(scores, config, steps: int = 20, num_heldout: int = 3) -> list[str]:
    records = [
        {"prompt_ids": [1], "response_ids": [[k] for k in range(len(one))], "scores": one}
        for one in scores
    ]
    examples = table_of(encode_one(one, data_config(), least_responses=1) for one in records)
    return advice.before_training(examples, config, steps, num_heldout=num_heldout, num_devices=8)


def best_targets(scores, alpha: float) -> float:
    weights = [np.exp((np.array(one) - max(one)) / alpha) for one in scores]
    return float(np.mean([max(w) / sum(w) for w in weights]))


@pytest.mark.parametrize(
    ("steps", "changes", "words"),
    [
        (3, {"data.batch_size": 6}, "3 steps of 6 prompts (0.9 epochs, 2 left over)"),
        (10, {"data.batch_size": 4}, "10 steps of 4 prompts (2 epochs)"),
        (3, {"data.weights": "1,2"}, "3 steps of 2 prompts (drawn by config.data.weights)"),
    ],
)
def test_what_the_steps_see_of_the_prompts_is_said(steps, changes, words):
    plan, *_ = said([[0.0, 0.1]] * 20, config_of(**changes), steps)
    assert plan == f"20 training prompts, 3 held out, {words} on 8 devices"


def test_a_run_with_nothing_wrong_is_not_warned():
    assert len(said(POINTS, config_of(",alpha=1.5"))) == 1


def test_a_batch_larger_than_the_data_is_said_with_what_to_set():
    _, warning = said(POINTS, config_of(",alpha=1.5", **{"data.batch_size": 5}))
    assert "a step of 5 prompts sees some of the 4" in warning
    assert "config.data.batch_size=4 or less" in warning


@pytest.mark.parametrize(("frac", "is_long"), [(0.0, False), (0.1, False), (0.7, True)])
def test_a_warmup_of_most_of_the_steps_is_said(frac, is_long):
    _, *warnings = said(POINTS, config_of(",alpha=1.5", **{"optim.warmup_frac": frac}))
    assert ["still rises" in one for one in warnings] == [True] * is_long


def test_a_run_in_which_the_rate_is_never_above_0_is_warned():
    config = config_of(",alpha=1.5")
    never = make_schedule(config.optim, 1)(0) == 0
    assert len(said(POINTS, config, steps=1)) == 1 + never


def test_ties_of_nearly_all_prompts_are_said_whatever_the_loss():
    for arg in (",alpha=1", ",algo=dpo"):
        _, warning = said([[1.0, 1.0]] * 19 + [[0.0, 1.0]], config_of(arg))
        assert "the scores of 19 of 20 training prompts are tied" in warning


def test_one_hot_targets_are_said_with_the_alpha_that_softens_them():
    _, warning = said(POINTS, config_of(",alpha=0.1"))
    assert "targets are one-hot: scores span 2 to 9, alpha 0.1: the best has 1.000" in warning
    alpha = advice.alpha_for([np.array(one, np.float32) for one in POINTS])
    assert best_targets(POINTS, alpha) == pytest.approx(0.6, abs=1e-4)
    assert f"; alpha {alpha:.2g} gives 0.6, and 0 says that hard labels are meant" in warning


def test_targets_that_are_one_hot_but_for_ties_are_said():
    tied = [*POINTS, [9.0, 1.0, 9.0]]
    assert len(said(tied, config_of(",alpha=1.5"))) == 1
    _, warning = said(tied, config_of(",alpha=0.1"))
    assert "one-hot but for ties: scores span 1 to 9, alpha 0.1: the best has 0.9" in warning


def test_a_run_of_few_prompts_of_which_none_is_held_out_is_warned_where_some_should_be():
    for fraction, number in ((0.05, 1), (0.0, 0)):
        config = config_of(",alpha=1.5", **{"data.eval_fraction": fraction})
        _, *found = said(POINTS, config, 2, num_heldout=0)
        assert len(found) == number
        assert all("config.data.eval_fraction=0.2 (now 0.05)" in one for one in found)


def test_uniform_targets_are_said_with_the_alpha_that_sharpens_them():
    small = [[x / 1000 for x in one] for one in POINTS]
    _, warning = said(small, config_of(",alpha=1"))
    assert "targets are uniform: scores span 0.002 to 0.009, alpha 1: the best has 0.33" in warning
    assert "gives 0.6 (config.loss.alpha)" in warning


def test_no_alpha_is_proposed_where_the_best_are_tied():
    assert advice.alpha_for([np.array([1, 1, 0], np.float32)]) is None


@pytest.mark.parametrize("arg", [",alpha=0", ",algo=dpo"])
def test_hard_labels_that_are_meant_are_not_warned_of(arg):
    assert len(said(POINTS, config_of(arg))) == 1


def test_a_loss_that_reads_no_scores_is_not_warned_of_them(monkeypatch):
    monkeypatch.setitem(LOSSES, "mine", LOSSES["dpo"]._replace(reads=("ref_logps",)))
    assert len(said([[1.0, 1.0]] * 4, config_of(",algo=mine"))) == 1


@pytest.mark.parametrize(
    ("epochs", "advised"),
    [(0.5, "batch_size=12 or less, or config.epochs=2 or more"), (0.01, "=2")],
)
def test_epochs_of_less_than_one_step_are_refused_with_what_to_set(epochs, advised):
    config = config_of(**{"epochs": epochs, "steps": 0, "data.batch_size": 32})
    with pytest.raises(UserError, match=rf"less than one step of .*=32 prompts.*{advised}"):
        build.num_steps(config, 24)


def test_a_run_that_is_done_says_how_held_out_prompts_went_and_warns_where_their_loss_rose():
    def went(split: str, *losses: float) -> list[dict]:
        return [{"step": 2 * i, "split": split, "loss": loss} for i, loss in enumerate(losses)]

    lines = [*went("train", 3.0, 4.0), *went("eval", 2.0, 1.5), *went("eval/hard", 1.0, 0.5, 1.5)]
    well, badly, warning = advice.after_training(lines)
    assert (
        well
        == "held-out prompts, from step 0 to 2: loss 2 to 1.5; the least loss was 1.5 at step 2"
    )
    assert badly.startswith(
        "held-out prompts of hard, from step 0 to 4: loss 1 to 1.5; the least loss was 0.5"
    )
    assert "the loss of held-out prompts of hard ended above its start" in warning
    assert "Lower config.optim.lr" in warning
    assert advice.after_training(went("train", 1.0, 2.0) + went("eval", 1.0)) == []


# The unit of scores


def test_the_spread_is_the_mean_deviation_of_a_records_scores():
    records = [
        {"prompt_ids": [1], "response_ids": [[2], [3], [4]][: len(scores)], "scores": scores}
        for scores in ([1, 3], [5, 5], [0, 0, 6])
    ]
    examples = table_of(encode_one(record, data_config()) for record in records)
    assert spread(examples) == pytest.approx((1 + 0 + np.sqrt(8)) / 3, rel=1e-12)
    zeros = table_of([encode_one(records[1] | {"scores": [0, 0]}, data_config())])
    for tied in (examples[1:2], zeros):
        with pytest.raises(UserError, match="which is 0 over 1 training records; give scores"):
            spread(tied)


@pytest.fixture
def data_in(tmp_path):
    """Returns a function that reads the data of a run under some flags."""
    rows = write_records(tmp_path / "rows.jsonl")

    def read(*flags: str, **more):
        argv = ["x", f"--config=configs/jsonl.py:files={rows},smoke", "--config.data.rows=8"]
        config, _ = parse_flags([*argv, "--config.data.eval_fraction=0.3", *flags])
        return build.read_data(build.build(config), **more)

    return read


def test_scores_are_divided_by_the_spread_of_the_training_records(data_in):
    raw, unit = data_in(), spread(data_in().sources[0])
    data = data_in("--config.data.score_unit=spread")
    assert raw.score_unit == 1 and data.score_unit == unit and len(raw.heldout)
    for before, after in ((raw.sources[0], data.sources[0]), (raw.heldout, data.heldout)):
        for x, y in zip(before, after, strict=True):
            np.testing.assert_allclose(y.scores, x.scores / unit, rtol=3e-7)
    assert spread(data.sources[0]) == pytest.approx(1, rel=1e-6)


def test_a_recorded_unit_is_taken_whatever_the_records(data_in):
    raw, data = data_in(), data_in("--config.data.score_unit=spread", score_unit=4.0)
    assert (data.heldout[0].scores == raw.heldout[0].scores / 4).all() and data.score_unit == 4


def test_a_bonus_in_the_datas_unit_is_refused_beside_another():
    flags = ["--config.data.score_unit=spread", "--config.data.first_bonus=0.01"]
    with pytest.raises(UserError, match="set config.data.score_unit='raw'"):
        parse_flags(["x", "--config=configs/jsonl.py:files=x,smoke", *flags])


# What is so of usable records


def test_repeats_ties_and_records_of_few_responses_are_counted():
    record = {"prompt_ids": [1], "response_ids": [[2], [3], [4]], "scores": [0, 1, 2]}
    cut = {"prompt_ids": [7], "response_ids": [[2], [3], [4] * 100], "scores": [0, 1, 2]}
    few = {"prompt_ids": [5], "response_ids": [[2], [3]], "scores": [0, 1]}
    tied = {"prompt_ids": [6], "response_ids": [[2], [3], [2]], "scores": [1, 1, 1]}
    given = (record, record, few, tied, cut)
    encode = table_of(encode_one(one, data_config()) for one in given)
    assert facts_of(encode, 3) == {
        "records with the prompt of an earlier one": 1,
        "records with equal responses of equal scores": 1,
        "records whose scores are all equal": 1,
        "records cut to data.max_prompt_len and data.max_response_len": 1,
        "records with fewer responses than data.num_responses=3": 1,
    }
    assert not facts_of(encode[:1], 3)
