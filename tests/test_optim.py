"""The optimizer is the released trainer's: AdamW exact in float32, warmup and cosine."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from nca_jax.axes import flatten_paths, nest_paths
from nca_jax.checks import UserError
from nca_jax.config import default_config
from nca_jax.infra.optim import (
    make_optimizer,
    make_schedule,
    merge_trained,
    scale_by_adam,
    split_trained,
)
from nca_jax.programs import build_optimizer

OPTIM = dict(lr=0.01, schedule="constant", warmup_frac=0.0, b1=0.9, b2=0.95, eps=1e-8)
OPTIM |= dict(mu_dtype="float32", weight_decay=0.0, clip_norm=0.0)
OPTIM |= dict(warmup_from="zero", decay_frac=0.0, freeze="")


def test_adam_equals_its_formula_in_float64_from_the_first_step_on():
    b1, b2, eps = 0.9, 0.999, 1e-8
    adam = scale_by_adam(b1, b2, eps, mu_dtype="float32")
    grads = np.random.default_rng(0).normal(size=(20, 3))
    state = adam.init({"x": jnp.zeros(3)})
    m, v = np.zeros(3), np.zeros(3)
    for t, grad in enumerate(grads, start=1):
        updates, state = adam.update({"x": jnp.float32(grad)}, state)
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        want = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        # An update is at most about 1; bias corrections by powers of a float32 are 1e-5 off.
        np.testing.assert_allclose(updates["x"], want, atol=1e-6)


@pytest.mark.parametrize(("num_steps", "warmup"), [(30, 3), (31, 4), (5, 1)])
def test_schedule_warms_up_over_the_ceiling_and_falls_to_zero_by_a_cosine(num_steps, warmup):
    optim = ConfigDict(OPTIM | dict(lr=2.0, schedule="cosine", warmup_frac=0.1))
    schedule = make_schedule(optim, num_steps)
    for step in range(num_steps + 1):
        want = 2.0 * step / warmup
        if step >= warmup:
            want = 1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))
        assert float(schedule(step)) == pytest.approx(want, abs=1e-6)


FALLS = {  # of the share of the steps after the warmup that are done
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "wsd": lambda x: min(1.0, (1 - x) * 45 / 30),  # 45 steps after the warmup, 30 of them fall
}


@pytest.mark.parametrize("name", FALLS)
def test_a_schedule_rises_from_the_first_steps_share_and_falls_by_its_formula(name):
    decay = 0.6 if name == "wsd" else 0.0
    optim = dict(lr=2.0, schedule=name, warmup_frac=0.1, warmup_from="share", decay_frac=decay)
    schedule = make_schedule(ConfigDict(optim), 50)
    rates = [float(schedule(step)) for step in range(50)]
    want = [2.0 * (step + 1) / 5 for step in range(5)]
    want += [2.0 * FALLS[name](step / 45) for step in range(45)]
    assert rates == pytest.approx(want, abs=1e-6) and min(rates) > 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("num_steps", "warmup_frac"), [(1, 0.1), (2, 0.9), (3, 0.0), (7, 0.3)])
def test_no_step_of_a_run_has_rate_0_unless_it_is_asked_for(schedule, num_steps, warmup_frac):
    optim = default_config().optim
    optim.schedule, optim.warmup_frac = schedule, warmup_frac
    rate = make_schedule(optim, num_steps)
    assert min(float(rate(step)) for step in range(num_steps)) > 0


SHAPES = {  # of every kind that a model has
    "embed/table": (5, 4),
    "head/kernel": (4, 5),
    "layers/attn/q/kernel": (2, 4, 2, 2),
    "layers/attn/q/bias": (2, 2, 2),
    "layers/attn_norm/scale": (2, 4),
    "norm/scale": (4,),
}
IS_DECAYED = {path: path.endswith(("table", "kernel")) for path in SHAPES}


def nested(flat: dict) -> dict:
    return nest_paths({path: jnp.float32(x) for path, x in flat.items()})


def random_arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {path: rng.normal(size=shape) for path, shape in SHAPES.items()}


def assert_equal_to(got: dict, want: dict[str, np.ndarray], **tolerance) -> None:
    """Compares nested arrays with flat ones, by path."""
    flat = flatten_paths(got)
    assert flat.keys() == want.keys()
    for path, x in flat.items():
        np.testing.assert_allclose(x, want[path], err_msg=path, **tolerance)


def test_decay_is_of_matrices_alone_and_proportional_to_rate_and_parameter():
    optim = ConfigDict(OPTIM | dict(weight_decay=0.1))
    tx = make_optimizer(optim, make_schedule(optim, 4))
    start = random_arrays(np.random.default_rng(0))
    zero = nested({path: np.zeros(shape) for path, shape in SHAPES.items()})
    updates, _ = tx.update(zero, tx.init(nested(start)), nested(start))
    want = {path: -0.01 * 0.1 * x * IS_DECAYED[path] for path, x in start.items()}
    assert_equal_to(updates, want, rtol=1e-6, atol=0)


def adamw_in_float64(optim: dict, params: dict, grads: list[dict]) -> tuple[dict, list[float]]:
    """Returns the parameters after all gradients, and the global norm of each gradient."""
    params, norms = dict(params), []
    m, v = ({path: np.zeros(shape) for path, shape in SHAPES.items()} for _ in range(2))
    b1, b2 = optim["b1"], optim["b2"]
    for t, grad in enumerate(grads, start=1):
        norms.append(math.sqrt(sum((x**2).sum() for x in grad.values())))
        clip = min(1.0, optim["clip_norm"] / norms[-1]) if optim["clip_norm"] else 1.0
        for path, g in grad.items():
            m[path] = b1 * m[path] + (1 - b1) * clip * g
            v[path] = b2 * v[path] + (1 - b2) * (clip * g) ** 2
            step = m[path] / (1 - b1**t) / (np.sqrt(v[path] / (1 - b2**t)) + optim["eps"])
            step += optim["weight_decay"] * IS_DECAYED[path] * params[path]
            params[path] = params[path] - optim["lr"] * step
    return params, norms


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip_norm", [0.0, 6.0])
def test_the_optimizer_equals_clipped_adamw_in_float64(clip_norm, weight_decay):
    optim = OPTIM | dict(weight_decay=weight_decay, clip_norm=clip_norm)
    rng = np.random.default_rng(1)
    start = random_arrays(rng)
    # Small ones, which the clip leaves, between large ones, of which it takes nine tenths.
    scales = (1.0, 10.0, 0.1, 10.0, 0.5)
    grads = [{path: s * x for path, x in random_arrays(rng).items()} for s in scales]
    want, norms = adamw_in_float64(optim, start, grads)
    assert any(norm > 6 for norm in norms) and any(norm < 6 for norm in norms)
    tx = make_optimizer(ConfigDict(optim), make_schedule(ConfigDict(optim), len(grads)))
    params = nested(start)
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(nested(grad), state, params)
        params = optax.apply_updates(params, updates)
    moved = {path: np.abs(want[path] - start[path]).max() for path in SHAPES}
    assert min(moved.values()) > 0.01
    assert_equal_to(params, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_an_extension_goes_through_the_schedule_anew_from_its_peak(schedule):
    config = ConfigDict({"optim": OPTIM | dict(schedule=schedule, warmup_frac=0.5, lr=0.3)})
    once = build_optimizer(config, 4).schedule
    found = build_optimizer(config, 4, [2, 4]).schedule
    assert [float(found(n)) for n in range(4)] == [float(once(n)) for n in range(4)]
    half = 0.15 if schedule == "cosine" else 0.3
    np.testing.assert_allclose([found(n) for n in (4, 5, 6, 8)], [0.3, half, 0.3, half], rtol=1e-6)


def test_a_clipped_gradient_keeps_its_direction_and_has_the_norm():
    """By hand: without momentum the first moment is the gradient that Adam was given."""
    optim = ConfigDict(OPTIM | dict(clip_norm=1.0, b1=0.0))
    params = {"a": {"kernel": jnp.zeros(1)}, "b": {"scale": jnp.zeros(1)}}
    tx = make_optimizer(optim, make_schedule(optim, 2))
    for scale, want in ((10.0, (0.6, 0.8)), (0.1, (0.3, 0.4))):
        grads = {"a": {"kernel": jnp.array([3.0])}, "b": {"scale": jnp.array([4.0])}}
        grads = jax.tree.map(lambda x, scale=scale: scale * x, grads)
        _, state = tx.update(grads, tx.init(params), params)
        adam = next(x for x in state if isinstance(x, optax.ScaleByAdamState))
        got = (float(adam.mu["a"]["kernel"][0]), float(adam.mu["b"]["scale"][0]))
        assert got == pytest.approx(want, rel=1e-6)


def test_what_is_frozen_has_no_moments_and_is_put_back_where_it_was():
    optim = ConfigDict(OPTIM | dict(freeze="embed|norm"))
    params = nested(random_arrays(np.random.default_rng(0)))
    trained, frozen = split_trained(params, optim.freeze)
    assert set(flatten_paths(frozen)) == {"embed/table", "layers/attn_norm/scale", "norm/scale"}
    assert merge_trained(trained, frozen) == params
    state = make_optimizer(optim, make_schedule(optim, 2)).init(params)
    adam = next(x for x in state if isinstance(x, optax.ScaleByAdamState))
    assert jax.tree.structure(adam.mu) == jax.tree.structure(adam.nu)
    assert flatten_paths(adam.mu).keys() == SHAPES.keys() - flatten_paths(frozen).keys()


@pytest.mark.parametrize(
    ("freeze", "said"), [("lm_head", "in none of the"), (".", "in all of the")]
)
def test_a_pattern_that_freezes_nothing_or_all_is_refused(freeze, said):
    with pytest.raises(UserError, match=f"{said} parameters.*: embed/table, head/kernel"):
        split_trained(nested(random_arrays(np.random.default_rng(0))), freeze)
