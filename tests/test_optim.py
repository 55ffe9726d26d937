"""The optimizer is the released trainer's: AdamW exact in float32, warmup and cosine."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from nca_jax.infra.optim import make_schedule, scale_by_adam


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
    optim = ConfigDict(dict(lr=2.0, schedule="cosine", warmup_frac=0.1))
    schedule = make_schedule(optim, num_steps)
    for step in range(num_steps + 1):
        want = 2.0 * step / warmup
        if step >= warmup:
            want = 1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))
        assert float(schedule(step)) == pytest.approx(want, abs=1e-6)
