"""Checkpoints: which are kept, and what of an older one is read."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from nca_jax.checks import UserError
from nca_jax.infra.checkpoint import open_checkpoints, restore, restore_params, save
from nca_jax.infra.mesh import host_mesh, param_shardings
from nca_jax.infra.optim import make_optimizer, make_schedule
from nca_jax.infra.steps import best_step
from nca_jax.models.decoder import Model
from nca_jax.models.formats import hf
from nca_jax.params import chosen_step
from nca_jax.saved_config import read_saved
from nca_jax.train_step import TrainState

OLD = Path(__file__).parent / "data" / "old_run"


# Which are kept


def state_of(step: int) -> TrainState:
    fields = {name: () for name in TrainState._fields}
    return TrainState(**fields | {"step": jnp.int32(step), "params": {"x": jnp.full(2, step)}})


def kept(workdir: Path, saves: dict[int, dict | None], **options) -> set[int]:
    """Saves tiny states with their metrics; returns the steps of which a checkpoint is left."""
    best_is_high = options.pop("best_is_high", True)
    config = ConfigDict({"keep_last": 1, "best_metric": ""} | options)
    with open_checkpoints(workdir, config, best_is_high=best_is_high) as manager:
        for step, metrics in saves.items():
            save(manager, state_of(step), metrics)
    return {int(path.name) for path in (workdir / "checkpoints").iterdir()}


def margins(*values: float | None) -> dict[int, dict | None]:
    """Returns {step: metrics} from step 1 on; None: nothing was evaluated there."""
    return {i: None if x is None else {"margin": x} for i, x in enumerate(values, start=1)}


def test_without_a_metric_the_latest_are_kept(tmp_path):
    assert kept(tmp_path, margins(9.0, 1.0, None, 2.0), keep_last=2) == {3, 4}


@pytest.mark.parametrize(
    ("values", "best_is_high", "want"),
    [
        ((1.0, 3.0, 2.0, 2.5), True, {2, 4}),
        ((2.0, 1.0, 3.0, 2.5), False, {2, 4}),
        ((1.0, 2.0, None, None), True, {2, 4}),
        ((None, 2.0, None, 1.0), True, {2, 4}),
        ((None, None, None, None), True, {4}),
        ((2.0, 2.0, 1.0, 1.0), True, {2, 4}),  # the latest of equals
        ((1.0, 2.0, 1.5, 3.0), True, {4}),
    ],
)
def test_the_best_of_those_that_were_evaluated_is_kept_beside_the_latest(
    tmp_path, values, best_is_high, want
):
    options = dict(best_metric="margin", best_is_high=best_is_high)
    assert kept(tmp_path, margins(*values), **options) == want


@pytest.mark.parametrize("best_is_high", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_never_best(tmp_path, best_is_high, bad):
    options = dict(best_metric="margin", best_is_high=best_is_high)
    assert kept(tmp_path / "a", margins(bad, 1.0, bad, bad), **options) == {2, 4}
    assert kept(tmp_path / "b", margins(bad, bad, bad), **options) == {3}


def test_the_best_is_still_known_after_a_resume(tmp_path):
    before, after = {1: 3.0, 2: 1.0}, {3: 2.0, 4: 1.5}
    for part in (before, after):
        found = kept(tmp_path, {i: {"margin": x} for i, x in part.items()}, best_metric="margin")
    assert found == {1, 4}


def test_the_step_that_is_best_is_known_by_the_same_rule(tmp_path):
    best = ConfigDict({"keep_last": 3, "best_metric": "margin"})
    kept(tmp_path, margins(2.0, 1.0, 2.0, None), best_metric="margin", keep_last=4)
    assert best_step(tmp_path, best, best_is_high=True) == 3
    assert best_step(tmp_path, best, best_is_high=False) == 2
    config = ConfigDict({"checkpoint": best})
    assert [chosen_step(config, tmp_path, x) for x in ("best", "1", "")] == [3, 1, 4]
    with pytest.raises(UserError, match=r"no checkpoint of step 7; it has those of \[1, 2, 3, 4\]"):
        chosen_step(config, tmp_path, "7")
    with pytest.raises(UserError, match="--step=last: wanted the number of a step, or best"):
        chosen_step(config, tmp_path, "last")
    best.best_metric = ""
    with pytest.raises(UserError, match=r"best_metric is '',.* It has those of \[1, 2, 3, 4\]"):
        chosen_step(config, tmp_path, "best")


def test_a_state_beside_metrics_is_restored_also_where_the_best_is_no_longer_kept(tmp_path):
    kept(tmp_path, margins(1.0), best_metric="margin")
    state = state_of(1)
    shardings = param_shardings(host_mesh(), {"step": state.step})["step"]
    shardings = jax.tree.map(lambda x: shardings, state)
    for metric in ("margin", ""):
        config = ConfigDict({"keep_last": 1, "best_metric": metric})
        with open_checkpoints(tmp_path, config) as manager:
            got = restore(manager, manager.latest_step(), state, shardings)
        assert int(got.step) == 1 and isinstance(got, TrainState)
        np.testing.assert_array_equal(got.params["x"], [1, 1])


# What of an older one is read


def old_state() -> dict:
    """The shapes of the state of tests/data/old_run, without the key that it had."""
    config = read_saved(OLD / "workdir" / "config.json")
    params = Model(hf.open_hf(OLD / "model")[0]).abstract_params()
    tx = make_optimizer(config.optim, make_schedule(config.optim, config.steps))
    opt_state = jax.eval_shape(tx.init, params)
    return {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "params": params,
        "opt_state": opt_state,
    }


def restore_old(abstract: dict, **options):
    shardings = param_shardings(host_mesh(), abstract)
    with open_checkpoints(
        OLD / "workdir", ConfigDict({"keep_last": 1, "best_metric": ""})
    ) as manager:
        return restore(manager, 3, abstract, shardings, **options)


def test_a_dropped_array_of_an_older_checkpoint_is_left_and_all_others_are_read():
    abstract = old_state()
    state = restore_old(abstract, dropped=["key"])
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    assert int(state["step"]) == 3
    moments = next(x for x in state["opt_state"] if isinstance(x, optax.ScaleByAdamState))
    assert int(moments.count) == 3
    want = restore_params(OLD / "workdir", abstract["params"], host_mesh())
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state["params"], want))
    for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
        assert np.isfinite(x).all()


def test_an_array_that_is_not_dropped_is_refused_by_name():
    with pytest.raises(UserError, match=r"key is \(2,\) uint32 there and missing here\.$"):
        restore_old(old_state())


def test_what_is_dropped_need_not_be_there_but_what_is_wanted_must():
    abstract = old_state()
    abstract["params"]["q_norm"] = {"scale": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(
        UserError, match=r"q_norm/scale is missing there and \(2,\) float32 here\.$"
    ):
        restore_old(abstract, dropped=["key", "never", "params/q_norm/scale"])
