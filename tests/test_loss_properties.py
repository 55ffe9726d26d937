"""What the losses promise for every K, mask, alpha and beta, in float32 and in float64.

The examples are the same in every run (derandomize), so a failure comes back.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from loss_cases import FUNCTIONS, PAIRS, SOFT, at_reference, floor

from nca_jax import losses

B = 3
ROUNDING = {np.float32: 4e-6, np.float64: 1e-13}  # of sums of a few numbers near 1

every_run_the_same = settings(deadline=None, max_examples=25, derandomize=True, database=None)
in_both_precisions = pytest.mark.parametrize(
    "dtype", [np.float64, pytest.param(np.float32, marks=pytest.mark.slow)]
)


# One compilation for each K: examples cost next to nothing.
targets_of = jax.jit(losses.targets_from_scores, static_argnames="alpha")
floor_of = jax.jit(floor, static_argnums=0)
start_of = jax.jit(at_reference, static_argnums=0)


class Problem(NamedTuple):
    """One batch: log-ratios in nats, scores, who is there, and the two temperatures."""

    logratios: np.ndarray  # [B, K]
    scores: np.ndarray  # [B, K]
    mask: np.ndarray  # [B, K] bool, one at least in every row
    alpha: float
    beta: float

    def rewards(self, dtype) -> jax.Array:
        return jnp.asarray(self.beta * self.logratios, dtype)

    def targets(self, dtype) -> jax.Array:
        return targets_of(jnp.asarray(self.scores, dtype), alpha=self.alpha, mask=self.mask)


@st.composite
def problems(draw, ks=(2, 3, 6), hard=False, whole=False) -> Problem:
    shape = (B, draw(st.sampled_from(ks)))
    mask = draw(arrays(bool, shape))
    mask[np.arange(B), draw(arrays(np.int8, B, elements=st.integers(0, shape[1] - 1)))] = True
    # Scores in quarters are exact in float32, also with a constant added, and they tie.
    quarters = arrays(np.int16, shape, elements=st.integers(-40, 40))
    return Problem(
        draw(arrays(np.float64, shape, elements=st.floats(-50, 50))),
        draw(quarters) / 4,
        np.ones(shape, bool) if whole else mask,
        0.0 if hard else draw(st.one_of(st.just(0.0), st.sampled_from([0.01, 1.0, 10.0]))),
        draw(st.sampled_from([0.001, 0.01, 0.1, 1.0])),
    )


def hard_pairs():
    return problems(ks=(2,), hard=True, whole=True).filter(
        lambda x: (x.scores[:, 0] != x.scores[:, 1]).all()
    )


def precision(dtype):
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(name: str, r, p, mask=None):
    """Returns the losses [B] and the gradient [B, K] of their sum."""

    def total(r):
        values = FUNCTIONS[name](r, p, mask)
        return values.sum(), values

    (_, values), grad = jax.value_and_grad(total, has_aux=True)(r)
    return values, grad


def assert_close(found, expected, dtype, scale=1.0):
    np.testing.assert_allclose(found, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * scale)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# Identities


@in_both_precisions
@every_run_the_same
@given(problem=hard_pairs())
def test_a_hard_pair_makes_infonca_dpo_and_nca_pairwise_nca(dtype, problem):
    with precision(dtype):
        r, p = problem.rewards(dtype), problem.targets(dtype)
        values = {name: value_and_grad(name, r, p) for name in FUNCTIONS}
    r, p = np.float64(r), np.float64(p)
    winner, loser = (r * p).sum(-1), (r * (1 - p)).sum(-1)
    repel = 0.5 * (np.logaddexp(0, winner) + np.logaddexp(0, loser))
    for name, formula in (
        ("dpo", np.logaddexp(0, loser - winner)),
        ("pairwise_nca", np.logaddexp(0, -winner) + repel),
    ):
        general = {"dpo": "infonca", "pairwise_nca": "nca"}[name]
        for found, other in zip(values[name], values[general], strict=True):
            assert_close(found, other, dtype, scale=100)  # the same sum in another order
        assert_close(values[name][0], formula, dtype, scale=100)  # sums of rewards up to 50


@in_both_precisions
@every_run_the_same
@given(problem=problems())
def test_gradients_are_their_formulas(dtype, problem):
    with precision(dtype):
        r, p = problem.rewards(dtype), problem.targets(dtype)
        grads = {name: value_and_grad(name, r, p, problem.mask)[1] for name in SOFT}
    r, p, here = np.float64(r), np.float64(p), problem.mask
    weights = np.where(here, np.exp(r - r.max(-1, keepdims=True, where=here, initial=-99)), 0)
    softmax = weights / weights.sum(-1, keepdims=True)
    k = here.sum(-1, keepdims=True)
    assert_close(grads["infonca"], softmax - p, dtype, scale=10)
    assert_close(grads["nca"], here * (sigmoid(r) / k - p * sigmoid(-r)), dtype, scale=10)


# Symmetries


@in_both_precisions
@every_run_the_same
@given(problem=problems(), shift=st.sampled_from([-3.0, 0.5, 2.0]))
def test_a_constant_added_to_the_rewards_leaves_infonca_and_changes_nca(dtype, problem, shift):
    with precision(dtype):
        r, p = problem.rewards(dtype), problem.targets(dtype)
        before = {name: value_and_grad(name, r, p, problem.mask) for name in SOFT}
        after = {name: value_and_grad(name, r + dtype(shift), p, problem.mask) for name in SOFT}
    for found, expected in zip(after["infonca"], before["infonca"], strict=True):
        assert_close(found, expected, dtype, scale=100)
    # NCA is strictly convex along the shift, so its slope differs everywhere: by the change of
    # mean sigmoid(r) and of sum p sigmoid(r), both of one sign.
    slopes = np.asarray(after["nca"][1] - before["nca"][1]).sum(-1)
    near = np.abs(np.where(problem.mask, r, 99)).min(-1) < 5  # beyond, sigmoid is flat
    assert (np.sign(slopes[near]) == np.sign(shift)).all()


@in_both_precisions
@every_run_the_same
@given(problem=problems(), shift=st.sampled_from([-64.0, 8.0, 1024.0]))
def test_a_constant_added_to_the_scores_changes_no_target(dtype, problem, shift):
    with precision(dtype):
        moved = problem._replace(scores=problem.scores + shift)
        np.testing.assert_array_equal(moved.targets(dtype), problem.targets(dtype))


@in_both_precisions
@every_run_the_same
@given(problem=problems(), seed=st.integers(0, 99))
def test_permuting_the_responses_permutes_targets_and_gradients(dtype, problem, seed):
    order = np.random.default_rng(seed).permutation(problem.mask.shape[1])
    moved = Problem(*(x[:, order] for x in problem[:3]), problem.alpha, problem.beta)
    with precision(dtype):
        p = problem.targets(dtype)
        assert_close(moved.targets(dtype), p[:, order], dtype)
        for name in SOFT:
            values, grad = value_and_grad(name, problem.rewards(dtype), p, problem.mask)
            found = value_and_grad(name, moved.rewards(dtype), p[:, order], moved.mask)
            assert_close(found[0], values, dtype, scale=100)
            assert_close(found[1], grad[:, order], dtype)


# Masks


@pytest.mark.slow
@in_both_precisions
@every_run_the_same
@given(
    problem=problems(),
    absent=st.sampled_from([0.0, 1e4, -1e4, math.inf, -math.inf, math.nan]),
)
def test_an_absent_response_is_as_if_it_were_dropped(dtype, problem, absent):
    mask = problem.mask
    with precision(dtype):
        scores, r = (
            jnp.where(mask, jnp.asarray(x, dtype), absent)
            for x in (problem.scores, problem.rewards(dtype))
        )
        p = targets_of(scores, alpha=problem.alpha, mask=mask)
        assert (np.asarray(p)[~mask] == 0).all()
        for name in SOFT:
            values, grad = value_and_grad(name, r, p, mask)
            floors = floor_of(name, p, mask)
            assert (np.asarray(grad)[~mask] == 0).all()
            for b, here in enumerate(mask):
                dropped = targets_of(scores[b : b + 1, here], alpha=problem.alpha)
                value, g = value_and_grad(name, r[b : b + 1, here], dropped)
                assert_close(p[b, here], dropped[0], dtype)
                assert_close(values[b], value[0], dtype, scale=100)
                assert_close(grad[b, here], g[0], dtype)
                assert_close(floors[b], floor_of(name, dropped)[0], dtype, scale=10)


# Floors and the start


@in_both_precisions
@every_run_the_same
@given(problem=problems())
def test_no_loss_is_below_its_floor_and_at_the_reference_it_is_known(dtype, problem):
    with precision(dtype):
        r, p, mask = problem.rewards(dtype), problem.targets(dtype), problem.mask
        for name in SOFT:
            values, floors = value_and_grad(name, r, p, mask)[0], floor_of(name, p, mask)
            assert (values >= floors - ROUNDING[dtype] * 100).all()
            start = value_and_grad(name, jnp.zeros_like(r), p, mask)[0]
            expected = math.log(4) if name == "nca" else np.log(mask.sum(-1))
            assert_close(start, np.broadcast_to(expected, B), dtype, scale=10)
            assert_close(start_of(name, p, mask), start, np.float32)


@in_both_precisions
@every_run_the_same
@given(problem=problems().filter(lambda x: x.alpha >= 1), shift=st.floats(-3, 3))
def test_the_floor_is_reached_at_log_k_p_and_for_infonca_at_any_log_p_plus_c(dtype, problem, shift):
    mask = problem.mask
    k = mask.sum(-1, keepdims=True)
    with precision(dtype):
        p = problem.targets(dtype)
        log_p = jnp.log(jnp.where(mask, p, 1))
        for name, least in (
            ("nca", log_p + jnp.asarray(np.log(k), dtype)),
            ("infonca", log_p + dtype(shift)),
        ):
            values, grad = value_and_grad(name, least, p, mask)
            assert_close(values, floor_of(name, p, mask), dtype, scale=10)
            assert_close(grad, np.zeros_like(grad), dtype)
            moved = value_and_grad(name, least + problem.logratios.astype(dtype), p, mask)[0]
            assert (moved >= values - ROUNDING[dtype] * 100).all()


# Numerics

wide = arrays(np.float32, (B, 4), elements=st.floats(-1e4, 1e4, width=32))
alphas = st.one_of(st.just(0.0), st.floats(-6, 6).map(lambda x: 10.0**x))


@every_run_the_same
@given(wide, wide, alphas)
def test_values_and_gradients_are_finite_at_any_reward_and_alpha(r, scores, alpha):
    p = losses.targets_from_scores(scores, alpha=alpha)
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-6)
    pairs = jnp.float32([[1, 0], [0, 1], [1, 0]])
    for name in FUNCTIONS:
        pair = name in PAIRS
        values, grad = value_and_grad(name, *((r[:, :2], pairs) if pair else (r, p)))
        assert np.isfinite(values).all() and np.isfinite(grad).all(), name
        floors = floor_of(name, pairs if pair else p)
        assert (values >= floors - 2e-6).all(), name  # a few roundings of numbers near 1
