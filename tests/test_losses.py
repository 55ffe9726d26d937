"""The claims of losses.py on chosen examples; test_loss_properties.py has those on random ones."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import FUNCTIONS, NAMES, PAIRS, SOFT, at_reference, floor, own_fields

from nca_jax import losses
from nca_jax.losses import LOSSES, Responses

RELEASED = json.loads((Path(__file__).parent / "data" / "released_losses.json").read_text())
RELEASED_NAMES = {"NCA": "nca", "InfoNCA": "infonca", "DPO": "dpo", "biasedNCA": "biased_nca"}
B, K = 3, 4


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def problem(seed: int = 0, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Returns (implicit_rewards, soft targets), both [B, k] float64."""
    rng = np.random.default_rng(seed)
    p = np.exp(rng.normal(size=(B, k)))
    return rng.normal(size=(B, k)), p / p.sum(-1, keepdims=True)


def pair_problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns (implicit_rewards, hard targets), both [B, 2]; the winner is not always first."""
    r, p = problem(seed, k=2)
    return r, (p == p.max(-1, keepdims=True)).astype(np.float64)


def value_and_grad(name: str, r, p, mask=None):
    """Returns the losses [B] and the gradient [B, K] of their sum."""

    def total(r):
        values = FUNCTIONS[name](r, jnp.asarray(p), mask)
        return values.sum(), values

    (_, values), grad = jax.value_and_grad(total, has_aux=True)(jnp.asarray(r))
    return values, grad


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# Formulas


def test_targets_are_the_softmax_of_scores_over_alpha(x64):
    scores = problem()[0]
    weights = np.exp(scores / 0.7)
    expected = weights / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(losses.targets_from_scores(scores, alpha=0.7), expected, rtol=1e-13)


def test_infonca_equals_its_formula_and_its_gradient(x64):
    r, p = problem()
    softmax = np.exp(r) / np.exp(r).sum(-1, keepdims=True)
    values, grad = value_and_grad("infonca", r, p)
    np.testing.assert_allclose(values, -(p * np.log(softmax)).sum(-1), rtol=1e-13)
    np.testing.assert_allclose(grad, softmax - p, rtol=1e-12, atol=1e-15)


def test_nca_equals_its_formula_and_its_gradient(x64):
    r, p = problem()
    values, grad = value_and_grad("nca", r, p)
    expected = -(p * np.log(sigmoid(r)) + np.log(sigmoid(-r)) / K).sum(-1)
    np.testing.assert_allclose(values, expected, rtol=1e-13)
    np.testing.assert_allclose(grad, sigmoid(r) / K - p * sigmoid(-r), rtol=1e-12, atol=1e-15)


def test_dpo_is_the_log_sigmoid_of_the_difference_and_infonca_of_a_hard_pair(x64):
    r, p = pair_problem()
    r_w, r_l = (r * p).sum(-1), (r * (1 - p)).sum(-1)
    values, grad = value_and_grad("dpo", r, p)
    np.testing.assert_allclose(values, np.log1p(np.exp(r_l - r_w)), rtol=1e-13)
    np.testing.assert_allclose(grad, (1 - 2 * p) * sigmoid(r_l - r_w)[:, None], rtol=1e-12)
    np.testing.assert_allclose(values, losses.infonca(jnp.asarray(r), jnp.asarray(p)), rtol=1e-15)


def test_pairwise_nca_equals_its_formula_and_nca_of_a_hard_pair(x64):
    r, p = pair_problem()
    r_w, r_l = (r * p).sum(-1), (r * (1 - p)).sum(-1)
    expected = -np.log(sigmoid(r_w)) - 0.5 * np.log(sigmoid(-r_w)) - 0.5 * np.log(sigmoid(-r_l))
    values, grad = value_and_grad("pairwise_nca", r, p)
    np.testing.assert_allclose(values, expected, rtol=1e-13)
    np.testing.assert_allclose(grad, sigmoid(r) / 2 - p * sigmoid(-r), rtol=1e-12)
    np.testing.assert_allclose(values, losses.nca(jnp.asarray(r), jnp.asarray(p)), rtol=1e-15)


def test_biased_nca_raises_the_winner_and_lowers_only_the_loser(x64):
    r, p = pair_problem()
    r_w, r_l = (r * p).sum(-1), (r * (1 - p)).sum(-1)
    values, grad = value_and_grad("biased_nca", r, p)
    expected = -np.log(sigmoid(r_w)) - np.log(sigmoid(-r_l))
    np.testing.assert_allclose(values, expected, rtol=1e-13)
    np.testing.assert_allclose(grad, (1 - p) * sigmoid(r) - p * sigmoid(-r), rtol=1e-12)


# Closed forms


@pytest.mark.parametrize("k", [2, 3, 7])
def test_at_the_reference_nca_is_2_ln_2_and_infonca_is_ln_k(x64, k):
    p = problem(k=k)[1]
    np.testing.assert_allclose(losses.nca(np.zeros_like(p), p), 2 * math.log(2), rtol=1e-14)
    np.testing.assert_allclose(losses.infonca(np.zeros_like(p), p), math.log(k), rtol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_at_the_reference_is_the_loss_where_all_rewards_are_0(name):
    k = 2 if name in PAIRS else K
    p = np.float32(np.eye(k)[[0, 1, 0]])
    mask = np.ones((B, k), bool)
    if name in SOFT:
        mask[1, 2:] = False  # K differs between prompts
    found = at_reference(name, p, mask)
    np.testing.assert_allclose(found, FUNCTIONS[name](np.zeros_like(p), p, mask), rtol=1e-6)


def test_the_floors_of_hard_nca_and_of_an_infonca_one_hot():
    one_hot = np.float32([[1, 0, 0, 0]])
    np.testing.assert_allclose(losses.nca_floor(one_hot[:, :2]), 0.9548, atol=5e-5)
    np.testing.assert_allclose(losses.nca_floor(one_hot), 0.6255, atol=5e-5)
    np.testing.assert_array_equal(floor("infonca", one_hot), 0.0)
    np.testing.assert_allclose(losses.entropy(np.full((1, 4), 0.25)), math.log(4), rtol=1e-6)


@pytest.mark.parametrize("name", SOFT)
def test_the_floor_is_reached_with_zero_gradient(x64, name):
    p = problem()[1]
    least = {"nca": np.log(K * p), "infonca": np.log(p)}[name]
    values, grad = value_and_grad(name, least, p)
    np.testing.assert_allclose(grad, 0.0, atol=1e-15)
    np.testing.assert_allclose(values, floor(name, p), rtol=1e-13)
    moved = value_and_grad(name, least + problem(seed=1)[0], p)[0]
    assert (moved > values).all()


@pytest.mark.parametrize("name", SOFT)
def test_the_record_of_a_loss_is_its_function_of_rewards_and_targets(x64, name):
    logps, ref_logps, scores = np.random.default_rng(0).normal(size=(3, B, K))
    mask = np.ones((B, K), bool)
    mask[0, 1:] = False  # K differs between prompts
    given = Responses(logps, ref_logps, np.ones((B, K)), scores, mask)
    own = own_fields(name) | {"alpha": 0.5, "beta": 0.3}
    p = losses.targets_from_scores(scores, alpha=0.5, mask=mask)
    found = LOSSES[name].per_prompt(given, own)
    np.testing.assert_allclose(
        found, FUNCTIONS[name](0.3 * (logps - ref_logps), p, mask), rtol=1e-14
    )
    expected = losses.nca_floor(p, mask) if name == "nca" else losses.entropy(p)
    np.testing.assert_allclose(LOSSES[name].floor(given, own), expected, atol=1e-15)


def test_a_loss_takes_the_nearest_number_of_responses():
    assert [LOSSES["nca"].nearest_k(k) for k in (1, 2, 9)] == [2, 2, 9]
    assert [LOSSES["dpo"].nearest_k(k) for k in (1, 2, 9)] == [2, 2, 9]


def test_alpha_0_is_one_hot_and_ties_share():
    scores = np.float32([[1, 3, 2, 0], [5, 5, 1, 5], [0, 0, 0, 0]])
    third = 1 / 3
    expected = [[0, 1, 0, 0], [third, third, 0, third], [0.25] * 4]
    np.testing.assert_allclose(losses.targets_from_scores(scores, alpha=0), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.targets_from_scores(scores, alpha=1e-6), expected, rtol=1e-6)


# Masks and numerics


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_row_is_0_with_zero_gradient(name):
    k = 2 if name in PAIRS else K
    mask = np.ones((B, k), bool)
    mask[1] = False
    r, scores = (np.float32(problem(seed, k)[0]) for seed in (1, 2))
    p = losses.targets_from_scores(scores, alpha=0, mask=mask)
    values, grad = value_and_grad(name, r, p, mask)
    assert values[1] == 0 and (grad[1] == 0).all()
    assert np.isfinite(values).all() and np.isfinite(grad).all()


def test_a_large_alpha_makes_targets_even():
    p = losses.targets_from_scores(np.float32([[1, 2, 3, 4]]), alpha=1e6)
    np.testing.assert_allclose(p, 0.25, rtol=1e-5)  # they differ by 3e-6 / 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_half_precision_is_computed_in_float32_and_double_stays_double(x64, dtype):
    r, p = (jnp.asarray(x, dtype) for x in problem())
    wanted = jnp.promote_types(dtype, jnp.float32)
    assert losses.targets_from_scores(r, alpha=1.0).dtype == wanted
    for name in SOFT:
        values = FUNCTIONS[name](r, p)
        assert values.dtype == wanted
        np.testing.assert_array_equal(values, FUNCTIONS[name](r.astype(wanted), p.astype(wanted)))
    assert losses.nca_floor(p).dtype == wanted


def test_the_entropy_of_half_precision_targets_is_float32():
    assert losses.entropy(jnp.full((1, 4), 0.25, jnp.bfloat16)).dtype == jnp.float32


# Errors


@pytest.mark.parametrize("name", SOFT)
def test_shapes_that_would_broadcast_are_refused(name):
    r, p = np.zeros((B, 2), np.float32), np.full((1, 2), 0.5, np.float32)
    with pytest.raises(ValueError, match=r"implicit_rewards \(3, 2\), targets \(1, 2\)"):
        FUNCTIONS[name](r, p)
    with pytest.raises(ValueError, match=r"mask \(1, 2\)"):
        FUNCTIONS[name](r, np.zeros_like(r), np.ones((1, 2), bool))


# The released PyTorch code


def released_problem(case: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (implicit_rewards, scores, alpha) of a case, float64; the first of a pair wins."""
    logratio = np.subtract(case["policy_logps"], case["ref_logps"])
    rewards = np.array(case.get("implicit_rewards", case["beta"] * logratio))
    if case["kind"] == "pair":
        return rewards, np.tile([1.0, 0.0], (len(rewards), 1)), 0.0
    scores = np.array(case["scores"])
    scores[:, 0] += case["tie_break_on_first"]
    return rewards, scores, case["alpha"]


def released_loss_and_grad(case: dict, rewards, targets):
    """Returns the mean loss, the losses [B] and the mean's gradient by the policy's logps."""
    values, grad = value_and_grad(RELEASED_NAMES[case["loss_type"]], rewards, targets)
    return values.mean(), values, case["beta"] * grad / len(rewards)


def grad_scale(case: dict) -> float:
    """What rounding of a gradient is relative to: p - softmax(r) of numbers near 1 can cancel."""
    return case["beta"] / len(case["policy_logps"])


def released_id(case: dict) -> str:
    return f"{case['kind']}-{case['seed']}-{case['loss_type']}"


@pytest.mark.parametrize("case", RELEASED, ids=released_id)
def test_float64_equals_the_released_code(x64, case):
    rewards, scores, alpha = released_problem(case)
    targets = losses.targets_from_scores(scores, alpha=alpha)
    loss, values, grad = released_loss_and_grad(case, rewards, targets)
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-12)
    np.testing.assert_allclose(grad, case["grad"], rtol=1e-12, atol=1e-15 * grad_scale(case))
    if "per_prompt" in case:  # of a softmax near 1 the log is exact to 1e-16, not relative to it
        np.testing.assert_allclose(values, case["per_prompt"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", RELEASED, ids=released_id)
def test_float32_equals_the_released_code(case):
    # Rewards and targets are made in float64: a log-probability of -300 rounded to float32 moves
    # beta * logratio by 3e-5 * beta, and a score of 7.51 divided by alpha moves by 5e-7 / alpha.
    rewards, scores, alpha = released_problem(case)
    with jax.enable_x64(True):
        targets = np.asarray(losses.targets_from_scores(scores, alpha=alpha))
    loss, _, grad = released_loss_and_grad(case, np.float32(rewards), np.float32(targets))
    assert loss.dtype == grad.dtype == jnp.float32
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-6)
    np.testing.assert_allclose(grad, case["grad"], rtol=1e-6, atol=1e-6 * grad_scale(case))


@pytest.mark.parametrize("case", [c for c in RELEASED if c["kind"] == "reward"], ids=released_id)
def test_float32_targets_move_only_by_the_rounding_of_scores(case):
    _, scores, alpha = released_problem(case)
    with jax.enable_x64(True):
        expected = losses.targets_from_scores(scores, alpha=alpha)
    rounding = np.spacing(np.float32(scores.max())) / alpha
    found = losses.targets_from_scores(np.float32(scores), alpha=alpha)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 + rounding)
