"""One step: the gradient of a weighted mean, however many micro-batches; a loss of one's own."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import metric_lines, write_records
from helpers import data_config, encode_one, id_record
from ml_collections import ConfigDict

from nca_jax import train
from nca_jax.data.pipeline import Dataset
from nca_jax.data.table import table_of
from nca_jax.flags import parse_flags
from nca_jax.losses import LOSSES, Loss
from nca_jax.model_config import MODELS, alike
from nca_jax.models.decoder import Model
from nca_jax.train_step import (
    Frozen,
    TrainState,
    make_logps,
    make_step_logps,
    make_train_step,
    responses_of,
)

SMALL = dataclasses.replace(MODELS["tiny"], num_layers=1, width=16, mlp_width=16, head_dim=8)


def weight(responses, fields):
    return jnp.sum(responses.lengths, axis=-1).astype(jnp.float32)


def test_the_gradient_is_that_of_the_weighted_mean_over_all_micro_batches(monkeypatch):
    monkeypatch.setitem(LOSSES, "weighted", LOSSES["nca"]._replace(weight=weight))
    data = data_config(row_len=32, rows=1, batch_size=4)
    config = parse_flags(["x", "--config=configs/jsonl.py:files=x,smoke,algo=weighted"])[0]
    config = ConfigDict(config.to_dict())
    config.data, config.loss.logits_chunk, config.loss.beta = data, 32, 0.5
    examples = []
    for i in range(4):  # of different lengths, so that weights differ
        record = id_record(i + 1)
        record["response_ids"] = [[*ids[:1], *[7] * (i + 1)] for ids in record["response_ids"]]
        examples.append(encode_one(record, data))
    batch = Dataset([table_of(examples)], data, seed=0).batch_at(0).batch
    assert int(batch.num_micro) > 1 and len({*batch.lengths.sum(-1).tolist()}) == 4
    model = Model(SMALL)
    params = model.init(jax.random.key(0))
    reference = jax.tree.map(lambda x: 1.1 * x, params)
    loss, fields = LOSSES["weighted"], {"alpha": config.loss.alpha, "beta": 0.5}
    step_logps = make_step_logps(model, config)

    def mean_loss(params):
        logps = one_pass(params)
        given = responses._replace(logps=logps)
        w = weight(responses, fields)
        return jnp.sum(w * loss.per_prompt(given, fields)) / jnp.sum(w)

    def one_pass(params):  # the same log-probabilities, micro-batch by micro-batch
        logps_of = make_logps(model, config, shape=batch.scores.shape)
        rows = [jax.tree.map(lambda x, m=m: x[m], batch.rows) for m in range(int(batch.num_micro))]
        return sum(logps_of(params, micro) for micro in rows)

    ref_logps = jax.jit(step_logps)(reference, batch)
    responses = responses_of(batch, jnp.zeros_like(ref_logps), ref_logps)
    want, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
    step = make_train_step(model, optax.sgd(1.0), optax.constant_schedule(1.0), config)
    start = TrainState(jnp.int32(0), params, optax.sgd(1.0).init(params))
    state, metrics = jax.jit(step)(start, Frozen(reference=reference), batch)
    assert float(metrics["loss"]) == pytest.approx(float(want), rel=1e-5)
    for old, new, grad in zip(*map(jax.tree.leaves, (params, state.params, grads)), strict=True):
        np.testing.assert_allclose(old - new, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kinds", [alike(), (*alike(window=7), *alike())], ids=["one", "two"])
def test_a_step_holds_one_sum_of_gradients_and_none_of_a_micro_batch(kinds):
    data = data_config(row_len=32, rows=1, batch_size=4)
    config = ConfigDict(parse_flags(["x", "--config=configs/jsonl.py:files=x,smoke"])[0].to_dict())
    config.data, config.loss.logits_chunk = data, 32
    examples = table_of(encode_one(id_record(i + 1), data) for i in range(4))
    batch = Dataset([examples], data, seed=0).batch_at(0).batch
    sizes = dataclasses.replace(SMALL, num_layers=5, mlp_width=2**13)  # most of it is layers
    model = Model(dataclasses.replace(sizes, kinds=kinds), remat="full")
    params, tx = model.abstract_params(), optax.sgd(1.0)
    step = make_train_step(model, tx, optax.constant_schedule(1.0), config)
    start = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, tx.init(params))
    memory = jax.jit(step).lower(start, Frozen(), batch).compile().memory_analysis()
    held = sum(x.size * 4 for x in jax.tree.leaves(params))
    assert memory.temp_size_in_bytes < 1.6 * held


def test_a_loss_that_reads_no_reference_has_no_second_forward_pass_in_its_step():
    data = data_config(row_len=32, rows=1, batch_size=4)
    examples = table_of(encode_one(id_record(i + 1), data) for i in range(4))
    batch = Dataset([examples], data, seed=0).batch_at(0).batch
    model, tx = Model(SMALL), optax.sgd(1.0)
    params = model.abstract_params()
    start = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, tx.init(params))

    def flops(what, *args) -> float:
        return jax.jit(what).lower(*args).cost_analysis()["flops"]

    def config_of(algo: str) -> ConfigDict:
        arg = f"--config=configs/jsonl.py:files=x,smoke,algo={algo}"
        config = ConfigDict(parse_flags(["x", arg])[0].to_dict())
        config.data, config.loss.logits_chunk = data, 32
        return config

    def of_step(algo: str, frozen: Frozen, batch) -> float:
        step = make_train_step(model, tx, optax.constant_schedule(1.0), config_of(algo))
        return flops(step, start, frozen, batch)

    forward = flops(make_step_logps(model, config_of("dpo")), params, batch)
    free = of_step("simpo", Frozen(), batch)
    cached = of_step("dpo", Frozen(), batch._replace(ref_logps=np.zeros_like(batch.scores)))
    live = of_step("dpo", Frozen(reference=params), batch)
    assert free == pytest.approx(cached, rel=0.01)
    assert live - free == pytest.approx(forward, rel=0.05)
    assert forward > 0.2 * free


# The recipe of the README, as it stands there.


def _best(responses, fields):
    # - log pi of the best response, [B] nats: supervised fine-tuning on it.
    best = jnp.argmax(jnp.where(responses.mask, responses.scores, -jnp.inf), axis=-1)
    return -jnp.take_along_axis(responses.logps, best[:, None], axis=-1)[:, 0]


BEST = Loss(_best, fields={}, reads=("scores",), k=(1, None))


def test_a_loss_of_ten_lines_trains_from_a_config_without_a_reference(tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "best", BEST)
    rows = write_records(tmp_path / "rows.jsonl")
    flags = ("--config.data.rows=8", "--config.steps=2", "--config.eval_every=2")
    flags += ("--config.optim.lr=1e-2", "--config.optim.warmup_frac=0.0")
    arg = f"--config=configs/jsonl.py:files={rows},smoke,algo=best"
    train.main(["train", arg, f"--workdir={tmp_path / 'run'}", *flags])
    first, second = metric_lines(tmp_path / "run", "train")
    assert first["loss"] == pytest.approx(-first["logps/0"], rel=1e-5)
    assert math.isfinite(second["loss"])
    before, after = metric_lines(tmp_path / "run", "eval")
    assert after["loss"] < before["loss"]
    about_a_reference = ("rewards", "logratio", "start_loss", "excess", "target_entropy", "max_abs")
    assert not [name for name in first if name.startswith(about_a_reference)]
    assert {"logps_per_token/0", "accuracy", "margin"} <= first.keys()
