"""The losses of the field: values and gradients of an independent implementation, and properties.

data/field_losses.json was computed in float64 by other code than ours.
"""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nca_jax.losses import LOSSES, Responses
from nca_jax.losses.ordered import is_pair

CASES = json.loads((Path(__file__).parent / "data" / "field_losses.json").read_text())
OF_PAIRS = [name for name, loss in LOSSES.items() if "pairs" in loss.fields]
REFERENCE_FREE = ["slic", "simpo", "cpo", "orpo", "rrhf", "pro", "likelihood"]
# Which see a constant added to every log-ratio of a prompt, and which one added to every score.
SEE_LEVEL = ["nca", "pairwise_nca", "biased_nca", "kto", "apo_zero", "apo_down", "dpop", "cal_dpo"]
SEE_LEVEL += ["sppo", "una", "group_advantage", "orpo", "likelihood", "pro"]
SEE_SCORE_LEVEL = ["una", "lipo"]
B, K = 5, 4


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def responses(seed: int = 0, k: int = K, scale: float = 1.0) -> Responses:
    """Random responses [B, k], float64: scores in quarters, which tie."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, (B, k)).astype(float)
    logps = -rng.uniform(0.2, 2, (B, k)) * lengths
    ref_logps = logps - scale * rng.normal(size=(B, k))
    return Responses(
        *map(jnp.asarray, (logps, ref_logps, lengths, rng.integers(0, 9, (B, k)) / 4)),
        jnp.ones((B, k), bool),
    )


def value_and_grad(name: str, given: Responses, **fields) -> tuple[np.ndarray, np.ndarray]:
    """Returns the losses [B] and the gradient of their sum by the log-probabilities [B, K]."""
    values, (grad, _) = jitted(name, tuple(sorted(fields.items())))(
        given.logps, given.ref_logps, given
    )
    return np.asarray(values), np.asarray(grad)


@functools.cache  # few compilations serve many tests
def jitted(name: str, fields: tuple):
    """(logps, ref_logps, given) -> losses [B], gradients of their sum by the first two."""
    loss = LOSSES[name]

    def total(logps, ref_logps, given):
        given = given._replace(logps=logps, ref_logps=ref_logps)
        values = loss.per_prompt(given, loss.defaults(**dict(fields)))
        return jnp.sum(values), values

    def found(*args):
        (_, values), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(*args)
        return values, grads

    return jax.jit(found)


def ids_of(case: dict) -> str:
    changed = {
        x: v for x, v in case["fields"].items() if v != LOSSES[case["name"]].fields[x].default
    }
    return f"{case['name']}-k{len(case['scores'][0])}-" + ",".join(map(str, changed.values()))


def given_of(case: dict, dtype) -> Responses:
    arrays = [jnp.asarray(np.array(case[x], dtype)) for x in Responses._fields if x != "mask"]
    return Responses(*arrays, jnp.asarray(np.array(case["mask"], bool)))


def assert_agree(found, expected, tolerance: float) -> None:
    np.testing.assert_array_less(
        np.abs(found - np.array(expected)) / np.maximum(1, np.abs(expected)), tolerance
    )


# Beside an independent implementation


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(np.float64, 1e-9), pytest.param(np.float32, 1e-5, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("case", CASES, ids=ids_of)
def test_values_and_gradients_are_those_of_an_independent_implementation(case, dtype, tolerance):
    of_steps = {"reduce"}  # how prompts are put together, by default as all losses do
    assert case["fields"].keys() == LOSSES[case["name"]].fields.keys() - of_steps
    with jax.enable_x64(dtype is np.float64):
        values, grad = value_and_grad(case["name"], given_of(case, dtype), **case["fields"])
        assert values.dtype == grad.dtype == dtype
        assert_agree(values, case["per_prompt"], tolerance)
        assert_agree(grad, case["grad_logps"], tolerance)


# Pairs


def test_pairs_are_the_best_and_the_worst_the_best_and_each_or_all_and_ties_are_none():
    scores = jnp.float32([[1, 3, 3, 0, 0]])
    mask = jnp.array([[True, True, True, True, True]])
    given = Responses(scores, scores, scores, scores, mask)

    def of(pairs):
        return [tuple(x) for x in np.argwhere(is_pair(given, pairs)[0]).tolist()]

    assert of("best_worst") == [(1, 4)]
    assert of("best_each") == [(1, 0), (1, 3), (1, 4)]
    assert of("all") == [(0, 3), (0, 4), (1, 0), (1, 3), (1, 4), (2, 0), (2, 3), (2, 4)]


@pytest.mark.parametrize("name", OF_PAIRS)
def test_a_prompt_without_a_pair_has_loss_0_and_no_gradient(x64, name):
    given = responses()
    tied = given._replace(scores=given.scores.at[0].set(2.0))
    values, grad = value_and_grad(name, tied, pairs="all")
    assert values[0] == 0 and (grad[0] == 0).all()
    assert (np.abs(grad[1:]).sum(-1) > 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_PAIRS)
def test_all_ways_to_pair_two_responses_are_one(x64, name):
    given = responses(k=2)
    values = [value_and_grad(name, given, pairs=x)[0] for x in ("best_worst", "best_each", "all")]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-14)
    np.testing.assert_allclose(values[0], values[2], rtol=1e-14)


# Identities


def assert_same(one, other, rtol=1e-10):
    for found, expected in zip(one, other, strict=True):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)


def without_ties(given: Responses) -> Responses:
    return given._replace(scores=given.scores + jnp.arange(given.scores.shape[1])[None] * 0.01)


def test_at_two_responses_plackett_luce_and_hard_infonca_are_dpo(x64):
    given = without_ties(responses(k=2))
    dpo = value_and_grad("dpo", given)
    assert_same(value_and_grad("plackett_luce", given), dpo)
    assert_same(value_and_grad("infonca", given, alpha=0.0), dpo)
    assert_same(value_and_grad("pairwise_nca", given), value_and_grad("nca", given, alpha=0.0))


def test_infonca_with_hard_labels_is_s_dpo(x64):
    given = without_ties(responses())
    beta_l = 0.1 * np.asarray(given.logps - given.ref_logps)
    best = np.argmax(np.asarray(given.scores), axis=-1)[:, None]
    gaps = beta_l - np.take_along_axis(beta_l, best, axis=-1)
    others = np.where(np.arange(K) == best, 0, np.exp(gaps)).sum(-1)
    s_dpo = np.log1p(others)  # - log sigmoid(- log sum_others e^{beta (l_j - l_best)})
    np.testing.assert_allclose(value_and_grad("infonca", given, alpha=0.0)[0], s_dpo, rtol=1e-12)


def test_backward_rpo_is_infonca_less_the_entropy_and_forward_rpo_is_exo(x64):
    given = without_ties(responses(k=2))
    soft = LOSSES["infonca"].defaults(alpha=1 / 0.7)
    floor = LOSSES["infonca"].floor(given, soft)
    values, grad = value_and_grad("infonca", given, alpha=1 / 0.7)
    backward = value_and_grad("rpo", given, eta=0.7, distance="backward")
    assert_same(backward, (values - floor, grad))
    forward = value_and_grad("rpo", given, eta=0.7, distance="forward")
    assert_same(forward, value_and_grad("exo", given, alpha=1 / 0.7, beta=0.1))


def test_rebel_is_dro_with_its_value_minimised_out(x64):
    given = responses()
    apart = np.asarray(given.logps - given.ref_logps - given.scores)  # beta 1
    dro = ((apart - apart.mean(-1, keepdims=True)) ** 2).mean(-1)  # min over V of mean (x - V)^2
    np.testing.assert_allclose(value_and_grad("rebel", given)[0], 2 * K / (K - 1) * dro, rtol=1e-12)


def test_swepo_without_weights_and_one_above_the_mean_is_hard_infonca(x64):
    given = responses()._replace(scores=jnp.asarray(np.eye(B, K) + 5.0).at[4].set([1, 0, 0, 0.1]))
    found = value_and_grad("swepo", given, weight=0.0)
    assert_same(found, value_and_grad("infonca", given, alpha=0.0))


@pytest.mark.parametrize(
    ("name", "fields", "of_scores"),
    [
        ("infonca", {"alpha": 0.5, "beta": 0.2}, 10.0),
        ("exo", {"alpha": 0.5, "beta": 0.2}, 10.0),
        ("rebel", {"beta": 0.2}, 5.0),
        ("rpo", {"eta": 2.0, "beta": 0.2, "pairs": "all"}, 10.0),
        ("rpo", {"eta": 2.0, "beta": 0.2, "pairs": "all", "distance": "square"}, 10.0),
        ("rpo", {"eta": 2.0, "beta": 0.2, "pairs": "all", "distance": "forward"}, 10.0),
    ],
)
def test_losses_that_share_an_optimum_are_least_where_log_ratios_are_scores(
    x64, name, fields, of_scores
):
    given = responses()
    best = given._replace(logps=given.ref_logps + of_scores * given.scores + 3.0)
    values, grad = value_and_grad(name, best, **fields)
    np.testing.assert_allclose(grad, 0, atol=1e-12)
    floor = LOSSES[name].floor(best, LOSSES[name].defaults(**fields))
    np.testing.assert_allclose(values, floor, atol=1e-12)
    moved = best._replace(logps=best.logps + responses(seed=1).scores)
    assert (value_and_grad(name, moved, **fields)[0] >= values).all()


# What a loss sees


@pytest.mark.parametrize("name", LOSSES)
def test_which_losses_see_a_constant_added_to_all_log_probabilities_or_scores(x64, name):
    given = without_ties(responses())
    before = value_and_grad(name, given)[0]
    # Of one length, so that a mean token has the constant too.
    alike = given._replace(lengths=jnp.full_like(given.lengths, 10.0))
    start = value_and_grad(name, alike)[0]
    moved = value_and_grad(name, alike._replace(logps=alike.logps - 2.0))[0]
    assert np.allclose(moved, start, rtol=1e-12) == (name not in SEE_LEVEL)
    higher = value_and_grad(name, given._replace(scores=given.scores + 2.0))[0]
    assert np.allclose(higher, before, rtol=1e-9) == (name not in SEE_SCORE_LEVEL)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_a_reference_or_has_no_gradient_by_it(x64, name):
    given = responses()
    _, (_, by_reference) = jitted(name, ())(given.logps, given.ref_logps, given)
    reads = bool((by_reference != 0).any())
    assert reads == ("ref_logps" in LOSSES[name].reads) == (name not in REFERENCE_FREE)


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_responses_changes_nothing_where_none_tie(x64, name):
    given = without_ties(responses())
    order = np.array([2, 0, 3, 1])
    values, grad = value_and_grad(name, given)
    moved = value_and_grad(name, Responses(*(x[:, order] for x in given)))
    assert_same(moved, (values, grad[:, order]))


@pytest.mark.slow
@pytest.mark.parametrize("absent", [0.0, 1e4, -1e4, math.nan, math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_an_absent_response_is_as_if_it_were_dropped(x64, name, absent):
    whole = responses(k=K - 1)
    extra = jnp.full((B, 1), absent)
    given = Responses(
        *(jnp.concatenate([x, extra], axis=1) for x in whole[:-1]),
        mask=jnp.concatenate([whole.mask, jnp.zeros((B, 1), bool)], axis=1),
    )._replace(lengths=jnp.concatenate([whole.lengths, jnp.zeros((B, 1))], axis=1))
    fields = {"pairs": "all"} if "pairs" in LOSSES[name].fields else {}
    values, grad = value_and_grad(name, given, nll_weight=0.5, **fields)
    assert (grad[:, -1] == 0).all()
    assert_same((values, grad[:, :-1]), value_and_grad(name, whole, nll_weight=0.5, **fields))


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_prompt_is_0_with_zero_gradient(name):
    given = Responses(
        *(jnp.asarray(x, jnp.float32) for x in responses()[:-1]), jnp.ones((B, K), bool)
    )
    empty = given._replace(mask=given.mask.at[1].set(False))
    values, grad = value_and_grad(name, empty, nll_weight=0.5)
    assert values[1] == 0 and (grad[1] == 0).all()
    assert np.isfinite(values).all() and np.isfinite(grad).all()


OVERFLOW = {"group_advantage"}  # e^l of a response that is worse than the mean


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in OVERFLOW])
def test_values_and_gradients_are_finite_at_any_log_ratio(name):
    fields = {"pairs": "all"} if "pairs" in LOSSES[name].fields else {}
    for far in (1e2, 1e3, 1e4):
        given = Responses(
            *(jnp.asarray(x, jnp.float32) for x in responses()[:-1]), jnp.ones((B, K), bool)
        )
        signs = jnp.float32(np.random.default_rng(1).choice([-1, 0, 1], (B, K)))
        given = given._replace(
            logps=jnp.minimum(given.logps, 0.0), ref_logps=given.logps + far * signs
        )
        values, grad = value_and_grad(name, given, nll_weight=0.5, **fields)
        assert np.isfinite(values).all() and np.isfinite(grad).all()
    certain = given._replace(
        logps=jnp.zeros_like(given.logps), ref_logps=jnp.zeros_like(given.logps)
    )
    values, grad = value_and_grad(name, certain, **fields)  # a policy that is sure of every token
    assert np.isfinite(values).all() and np.isfinite(grad).all()


def test_a_response_that_ppo_clips_has_no_gradient_however_far_it_is():
    given = Responses(
        *(jnp.asarray(x, jnp.float32) for x in responses()[:-1]), jnp.ones((B, K), bool)
    )
    better = given.scores > given.scores.mean(-1, keepdims=True)
    far = given._replace(ref_logps=given.logps - jnp.where(better, 1e4, -1e4))
    values, grad = value_and_grad("group_advantage", far)
    assert np.isfinite(values).all() and (grad == 0).all()


# The start and the floor


@pytest.mark.parametrize("name", LOSSES)
def test_the_start_is_the_value_at_the_reference_and_no_value_is_below_the_floor(x64, name):
    given, loss = without_ties(responses()), LOSSES[name]
    at = value_and_grad(name, given._replace(ref_logps=given.logps))[0]
    start = loss.at_reference(given, loss.defaults())
    assert (start is None) == (name in REFERENCE_FREE)
    if start is not None:
        np.testing.assert_allclose(at, start, rtol=1e-12)
    floor = loss.floor(given, loss.defaults()) if loss.floor else None
    if floor is not None:
        for seed in range(5):
            spread = responses(seed, scale=50.0)
            moved = given._replace(logps=spread.logps, ref_logps=spread.ref_logps)
            assert (value_and_grad(name, moved)[0] >= np.asarray(floor) - 1e-12).all()


@pytest.mark.parametrize(
    ("name", "start"),
    [("dpo", math.log(2)), ("ipo", 25.0), ("hinge", 1.0), ("apo_zero", 1.0), ("kto", 1.0),
     ("dpop", math.log(2)), ("plackett_luce", math.log(math.factorial(K)))],
)  # fmt: skip
def test_the_start_of_a_loss_is_its_closed_form(name, start):
    loss = LOSSES[name]
    found = loss.at_reference(without_ties(responses()), loss.defaults())
    np.testing.assert_allclose(found, start, rtol=1e-5)


@pytest.mark.slow
def test_nll_weight_adds_the_best_responses_loss_a_token_to_any_loss(x64):
    given = without_ties(responses())
    best = np.argmax(given.scores, axis=-1)
    nll = -np.asarray(given.logps / given.lengths)[np.arange(B), best]
    for name in LOSSES:
        alone, with_it = (value_and_grad(name, given, nll_weight=x)[0] for x in (0.0, 0.3))
        np.testing.assert_allclose(with_it - alone, 0.3 * nll, rtol=1e-9)
