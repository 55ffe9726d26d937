"""Means, standard errors and intervals, on numbers that fit on paper."""

import numpy as np
import pytest

from nca_jax.comparison import comparison, table


def test_the_error_of_a_difference_is_that_of_the_paired_differences():
    found = comparison("reward", np.array([1.0, 3.0]), np.array([0.0, 3.0]))
    assert found == pytest.approx(
        {"reward": 2.0, "reward_se": 1.0, "reward_reference": 1.5, "reward_reference_se": 1.5}
        | {"reward_difference": 0.5, "reward_difference_se": 0.5}
    )


def test_one_prompt_has_a_mean_and_no_error():
    assert comparison("kl", np.array([2.0])) == {"kl": 2.0}
    assert "reward_difference_se" not in comparison("reward", np.array([2.0]), np.array([1.0]))


def test_the_table_has_policy_reference_difference_and_an_interval_in_a_line_each():
    rewards = comparison("reward", np.array([1.0, 3.0]), np.array([0.0, 3.0]))
    lines = table(rewards | comparison("kl", np.array([0.0, 2.0])) | {"loss": 1.5}, 2)
    assert lines[0].split()[:3] == ["policy", "reference", "difference"]
    # Student's t of one degree of freedom: 12.7062 standard errors.
    assert lines[1].split() == "reward 2.0000 1.5000 0.5000 -5.8531 to 6.8531".split()
    assert lines[2].split() == "kl 1.0000 -11.7062 to 13.7062".split()
    assert lines[3].split() == ["loss", "1.5000"]
    assert "reference" not in table({"loss": 1.5}, 2)[0]
