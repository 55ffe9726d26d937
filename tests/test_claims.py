"""Claim (a): the closed forms of the tabular experiment, and that the losses lead there."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nca_jax import losses
from nca_jax.losses import targets_from_scores

pytest.importorskip("matplotlib")
from experiments.claims import tabular  # noqa: E402  (it plots)
from experiments.claims.tabular import MU, REWARDS, Problem, infonca_optimum, nca_optimum  # noqa: E402
from experiments.results import markdown  # noqa: E402
from nca_jax.files import read_json  # noqa: E402


def test_four_responses_of_a_uniform_reference_give_two_times_and_not_more():
    ratio = nca_optimum(MU, REWARDS, alpha=1.0, k=4) / MU
    assert ratio[-1] == pytest.approx(2.02, abs=0.005)
    assert infonca_optimum(MU, REWARDS, 1.0)[-1] / MU[-1] == pytest.approx(2.58, abs=0.005)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_closed_form_is_the_mean_over_every_draw(k):
    mu, expected = np.array([0.1, 0.2, 0.3, 0.4]), np.zeros(4)
    for others in itertools.product(range(4), repeat=k - 1):
        weights = np.exp(REWARDS / 0.7)
        sums = weights + weights[list(others)].sum()
        expected += np.prod(mu[list(others)]) * k * weights / sums
    got = nca_optimum(mu, REWARDS, alpha=0.7, k=k)
    np.testing.assert_allclose(got, mu * expected, rtol=1e-12)
    assert got.sum() == pytest.approx(1, abs=1e-12)  # so a policy can be there


def test_as_k_grows_the_optimum_becomes_the_limit():
    limit = infonca_optimum(MU, REWARDS, 1.0)
    apart = [float(tabular.kl(nca_optimum(MU, REWARDS, 1.0, k), limit)) for k in (4, 8, 16, 32)]
    assert all(small < large / 3 for large, small in itertools.pairwise(apart))
    assert apart[-1] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "beta", "optimum"),
    [
        ("nca", 1.0, nca_optimum(MU, REWARDS, 1.0, 4)),
        ("infonca", 1.0, infonca_optimum(MU, REWARDS, 1.0)),
        ("infonca", 2.0, infonca_optimum(MU, REWARDS, 2.0)),
    ],
)
def test_the_mean_loss_over_every_draw_has_no_gradient_at_the_optimum(loss, beta, optimum):
    responses = jnp.array(list(itertools.product(range(4), repeat=4)))  # [256, K]: mu is uniform
    targets = targets_from_scores(jnp.asarray(REWARDS, jnp.float32)[responses], alpha=1.0)

    def mean_loss(logits):
        ratio = jax.nn.log_softmax(logits) - jnp.log(jnp.asarray(MU, jnp.float32))
        return getattr(losses, loss)(beta * ratio[responses], targets).mean()

    at_optimum = jax.grad(mean_loss)(jnp.log(jnp.asarray(optimum, jnp.float32)))
    np.testing.assert_allclose(at_optimum, 0, atol=1e-6)
    assert np.abs(jax.grad(mean_loss)(jnp.zeros(4))).max() > 0.05


@pytest.mark.slow
def test_training_reaches_the_optimum_and_only_nca_keeps_the_mass_of_what_is_drawn():
    def final(problem: Problem) -> np.ndarray:
        return np.asarray(jax.nn.softmax(tabular.train(problem, 500, jax.random.key(0))[-1]))

    assert final(Problem("nca", 4))[-1] / 0.25 == pytest.approx(2.02, abs=0.03)
    assert final(Problem("infonca", 4))[-1] / 0.25 == pytest.approx(2.58, abs=0.01)
    start = tabular.STARTS[-1]
    mass = {x: final(tabular.unseen_problem(x, start))[:4].sum() for x in ("nca", "infonca")}
    assert mass["nca"] == pytest.approx(0.5, abs=0.02)  # as under mu
    assert mass["infonca"] > start


def test_what_is_drawn_of_the_shared_optimum_holds_and_the_readme_says_it():
    stored = read_json(tabular.HERE / "optima.json")
    assert list(stored) == [*tabular.SHARED, *tabular.OTHERS]
    for loss in tabular.SHARED:  # l_i - l_j = (r_i - r_j) / (alpha beta)
        np.testing.assert_allclose(stored[loss], [REWARDS] * tabular.SEEDS, atol=1e-4)
    of_nca = np.log(nca_optimum(MU, REWARDS, 1.0, tabular.OF_LOSSES) / MU)
    for loss in ("nca", "likelihood"):  # sum_k p_k log pi is least there too
        np.testing.assert_allclose(np.mean(stored[loss], axis=0), of_nca - of_nca[0], atol=0.02)
    assert min(np.min(stored[loss], axis=0)[-1] for loss in ("dpo", "plackett_luce")) > 4  # no end
    assert markdown(tabular.table_of_losses(stored)) in (tabular.HERE / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("loss", tabular.SHARED[1:])  # the first is above
def test_training_leads_each_of_them_to_the_shared_optimum(loss):
    trained = tabular.train(Problem(loss, 4), 500, jax.random.key(0))[-1]
    apart = tabular.apart_from_first(np.asarray(jax.nn.softmax(trained)))
    np.testing.assert_allclose(apart, REWARDS, atol=0.02)
