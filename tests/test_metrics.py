"""What a step reports, on cases that fit on paper: ties, absent responses, empty slots, ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nca_jax.losses import LOSSES, Responses
from nca_jax.metrics import alignment_metrics, prompt_weights

FIELDS = {"alpha": 1.0, "beta": 0.5}


def responses(logps, scores, mask=None, ref_logps=None, lengths=None) -> Responses:
    logps = np.float32(logps)
    mask = np.ones(logps.shape, bool) if mask is None else np.array(mask)
    ref_logps = np.zeros_like(logps) if ref_logps is None else np.float32(ref_logps)
    lengths = np.ones(logps.shape, np.int32) if lengths is None else np.int32(lengths)
    return Responses(*map(jnp.asarray, (logps, ref_logps, lengths, np.float32(scores), mask)))


def metrics_of(
    given: Responses, loss="nca", has_reference=True, nll_weight=0.0, **change
) -> dict[str, float]:
    record = LOSSES[loss]._replace(**change)
    fields = record.defaults(**FIELDS, nll_weight=nll_weight)

    @jax.jit
    def found(given):
        losses = record.per_prompt(given, fields)
        return alignment_metrics(record, given, fields, losses=losses, has_reference=has_reference)

    return {name: float(value) for name, value in found(given).items()}


def test_ranks_are_by_score_and_ties_are_in_data_order():
    found = metrics_of(responses([[1, 2, 3, 4]], [[0, 5, 5, 1]]))
    assert [found[f"logps/{k}"] for k in range(4)] == [2, 3, 4, 1]
    assert [found[f"rewards/{k}"] for k in range(4)] == [1, 1.5, 2, 0.5]
    assert found["chosen_logp_drift"] == found["logratio/0"] == 2


def test_accuracy_is_the_mean_over_the_others_and_top1_is_all_or_nothing():
    found = metrics_of(responses([[3, 4, 2, 1], [4, 3, 2, 1]], [[9, 3, 2, 1]] * 2))
    assert found["accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["top1"] == 0.5
    assert found["margin"] == pytest.approx(((3 - 7 / 3) + (4 - 2)) / 2 * FIELDS["beta"])


def test_equal_rewards_beat_nothing_and_are_half_a_win_where_ties_are_halves():
    found = metrics_of(responses([[1, 1, 1]], [[3, 2, 1]]))
    assert (found["accuracy"], found["margin"], found["top1"]) == (0, 0, 1)
    assert found["accuracy_half_ties"] == 0.5  # as at the reference
    found = metrics_of(responses([[2, 2, 1, 3]], [[9, 3, 2, 1]]))
    assert (found["accuracy"], found["accuracy_half_ties"]) == pytest.approx((1 / 3, 1 / 2))


def test_an_absent_response_has_no_rank_and_beats_nobody():
    whole = metrics_of(responses([[5, 1]], [[2, 1]]))
    mask = [[True, False, True]]
    found = metrics_of(responses([[5, 99, 1]], [[2, 9, 1]], mask, [[0, -99, 0]]))
    for name, value in whole.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    assert found["logps/2"] == 0  # no prompt has a third response


def test_an_empty_slot_takes_no_part_in_a_mean():
    one = metrics_of(responses([[5, 1]], [[2, 1]]))
    two = responses([[5, 1], [7, 7]], [[2, 1], [0, 0]], [[True, True], [False, False]])
    assert metrics_of(two) == pytest.approx(one, rel=1e-6)


def test_a_prompt_takes_part_in_the_ranks_that_it_has():
    mask = [[True, True, True], [True, True, False]]
    found = metrics_of(responses([[1, 2, 3], [5, 6, 0]], [[3, 2, 1], [3, 2, 1]], mask))
    assert [found[f"logps/{k}"] for k in range(3)] == [3, 4, 3]


def test_the_largest_log_ratio_is_said_whole_and_a_token():
    found = metrics_of(responses([[-4, 1]], [[1, 0]], lengths=[[8, 1]]))
    assert (found["max_abs_logratio"], found["max_abs_logratio_per_token"]) == (4, 1)


def test_the_mean_log_ratio_is_of_all_tokens_together_without_responses_that_are_not_there():
    mask = [[True, True, False]]
    found = metrics_of(responses([[-4, 1, 9]], [[1, 0, 2]], mask, lengths=[[8, 2, 5]]))
    assert found["mean_logratio_per_token"] == pytest.approx((-4 + 1) / (8 + 2))


def test_excess_is_the_loss_above_its_floor_and_start_loss_is_that_of_the_reference():
    given = responses([[1, 2, 3]], [[0, 1, 2]])
    found = metrics_of(given)
    assert found["excess"] == pytest.approx(found["loss"] - found["floor"], abs=1e-6)
    assert found["start_loss"] == pytest.approx(2 * np.log(2), rel=1e-6)
    at_reference = metrics_of(given._replace(logps=given.ref_logps), "infonca")
    assert at_reference["loss"] == pytest.approx(at_reference["start_loss"], rel=1e-6)


def test_what_a_loss_does_not_know_is_absent():
    given = responses([[1, 2]], [[1, 0]])
    bare = metrics_of(given, floor=None)
    assert not {"floor", "excess"} & bare.keys() and "target_entropy" in bare
    beside_likelihood = metrics_of(given, nll_weight=0.5)
    assert not {"floor", "excess", "start_loss"} & beside_likelihood.keys()
    assert "target_entropy" not in metrics_of(given, "dpo")  # its labels are hard


def test_without_a_reference_the_reward_is_the_log_probability_a_token():
    given = responses([[-4, -9]], [[1, 0]], lengths=[[2, 3]])
    found = metrics_of(given, "cpo", has_reference=False)
    assert (found["logps_per_token/0"], found["logps_per_token/1"]) == (-2, -3)
    assert (found["accuracy"], found["margin"]) == (1, 1)
    about_a_reference = ("rewards", "logratio", "chosen_logp", "max_abs", "start_loss")
    assert not [name for name in found if name.startswith(about_a_reference)]


def test_where_a_loss_wants_a_reference_and_has_none_the_rewards_are_those_of_a_reward_model():
    found = metrics_of(responses([[4, 2]], [[1, 0]], lengths=[[2, 3]]), has_reference=False)
    assert (found["rewards/0"], found["rewards/1"], found["margin"]) == (2, 1, 1)  # beta is 1/2
    about_logps = ("logps", "logratio", "chosen_logp", "max_abs", "start_loss", "perplexity")
    assert not [name for name in found if name.startswith(about_logps)]


def test_the_reward_of_a_loss_without_beta_is_the_log_ratio():
    given = responses([[3, 1]], [[1, 0]], ref_logps=[[1, 1]])
    mine = LOSSES["infonca"]._replace(fields={})
    losses = mine.per_prompt(given, {})
    found = alignment_metrics(mine, given, {}, losses=losses, has_reference=True)
    assert (found["rewards/0"], found["rewards/1"]) == (2, 0)


def test_a_loss_may_weigh_prompts_and_other_metrics_are_plain_means():
    def weight(responses, fields):
        return jnp.sum(responses.lengths, axis=-1).astype(jnp.float32)

    given = responses([[1, 2], [4, 3], [9, 9]], [[1, 0]] * 3, [[True] * 2] * 2 + [[False] * 2],
                      lengths=[[1, 2], [4, 5], [0, 0]])  # fmt: skip
    record = LOSSES["nca"]._replace(weight=weight)
    assert prompt_weights(record, given, FIELDS).tolist() == [3, 9, 0]
    alone = [float(x) for x in record.per_prompt(given, FIELDS)]
    found = metrics_of(given, weight=weight)
    assert found["loss"] == pytest.approx((3 * alone[0] + 9 * alone[1]) / 12, rel=1e-6)
    assert found["accuracy"] == 0.5
