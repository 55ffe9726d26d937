"""Adapters: what they compute, where they start, and that nothing else is trained."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import NUM_SLOTS, greedy, pieces, slots
from helpers import data_config, encode_one, id_record
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict

from nca_jax import build
from nca_jax.axes import flatten_paths, nest_paths
from nca_jax.batch import Rows
from nca_jax.checks import UserError
from nca_jax.data.pack import RowLayout, pack
from nca_jax.data.pipeline import Dataset
from nca_jax.data.plan import causal_bound
from nca_jax.data.table import table_of
from nca_jax.flags import parse_flags
from nca_jax.infra.mesh import make_mesh, param_shardings
from nca_jax.infra.optim import make_optimizer, merge_trained
from nca_jax.logprobs import token_logps
from nca_jax.model_config import MODELS, TARGETS, alike
from nca_jax.models.decoder import Model
from nca_jax.models.lora import Lora, split_adapters
from nca_jax.train_step import Frozen, TrainState, make_train_step

TINY = dataclasses.replace(MODELS["tiny"], qkv_bias=True, qk_norm="head", mlp_width=96)
MOE = MODELS["tiny_moe"]
KINDS = dataclasses.replace(
    TINY, num_layers=3, kinds=(*alike(window=5), *alike()), norms="both", norm_offset=True,
    attn_cap=2.0, logit_cap=3.0,
)  # fmt: skip
DENSE_TARGETS = tuple(name for name in TARGETS if name != "router")
CASES = {
    "all": (TINY, Lora(4, 8.0, DENSE_TARGETS)),
    "rslora": (TINY, Lora(4, 8.0, ("q", "down"), rslora=True)),
    "dora": (TINY, Lora(4, 8.0, DENSE_TARGETS, dora=True)),
    "experts and router": (MOE, Lora(4, 8.0, TARGETS)),
    "dora beside experts": (MOE, Lora(4, 8.0, ("q", "o", "router"), dora=True)),
    "layers of two kinds": (KINDS, Lora(4, 8.0, DENSE_TARGETS)),
}
SLOW = pytest.mark.slow


def all_but(fast: str):
    """Parametrizes a test by all cases, of which but one are slow."""
    marked = [case if case == fast else pytest.param(case, marks=SLOW) for case in CASES]
    return pytest.mark.parametrize("case", marked)


def model_of(case: str, **options) -> Model:
    config, lora = CASES[case]
    return Model(config, lora, **options)


def logps(model: Model, params: dict) -> jax.Array:
    """Returns the log-probability of every response token of two packed rows, [R, T]."""
    layout = RowLayout(row_len=32, rows=2, block=16, num_pairs=causal_bound(32, 16), align=1)
    packed, _, _ = pack(pieces(), layout, slots=slots(), num_slots=NUM_SLOTS, num_micro=1)
    rows = Rows(*(x[0] for x in packed))
    compute = jax.jit(
        lambda params: token_logps(model, params, rows, num_slots=NUM_SLOTS, block=16, chunk=16)
    )
    return compute(params)


def start(model: Model) -> tuple[dict, dict]:
    """Returns (adapters, base) of a random model."""
    base = model.base.init(jax.random.key(0))
    return jax.jit(model.init_adapters)(jax.random.key(1), base), base


def random_adapters(adapters: dict) -> dict:
    rng = np.random.default_rng(0)
    flat = flatten_paths(adapters)
    moved = {path: x * (1 + 0.3 * rng.normal(size=x.shape)) for path, x in flat.items()}
    drawn = {k: 0.3 * rng.normal(size=x.shape) for k, x in flat.items() if k.endswith("/b")}
    return nest_paths({path: jnp.float32(x) for path, x in (moved | drawn).items()})


def effective(adapters: dict, base: dict, lora: Lora) -> dict:
    """Returns a base whose kernels are m (W + scale a b) / |W + scale a b|, in float64."""
    flat, kernels = flatten_paths(adapters), flatten_paths(base)
    for path in (path.removesuffix("/a") for path in flat if path.endswith("/a")):
        name = path.removesuffix("lora") + "kernel"
        a, b, w = (
            np.asarray(x, np.float64) for x in (flat[f"{path}/a"], flat[f"{path}/b"], kernels[name])
        )
        lead = 2 if "moe" in path and "router" not in path else 1
        size = w.shape[:lead]
        a = a.reshape(*size, -1, lora.rank)
        whole = w.reshape(*size, a.shape[-2], -1) + lora.scale * a @ b.reshape(*size, lora.rank, -1)
        if f"{path}/m" in flat:
            norm = np.linalg.norm(whole, axis=-2, keepdims=True)
            whole *= np.asarray(flat[f"{path}/m"]).reshape(norm.shape) / norm
        kernels[name] = jnp.float32(whole.reshape(w.shape))
    return nest_paths(kernels)


@all_but("experts and router")
def test_adapters_start_at_their_base_and_leave_its_numbers_bit_for_bit(case):
    model = model_of(case)
    adapters, base = start(model)
    both = merge_trained(adapters, base)
    assert jax.tree.map(jnp.shape, both) == jax.tree.map(jnp.shape, model.abstract_params())
    found, want = logps(model, both), logps(model, base)
    if model.lora.dora:  # m / |W| is a rounded 1
        np.testing.assert_allclose(found, want, atol=1e-4)
    else:
        np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(want, logps(model.base, base))


@all_but("dora")
@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=SLOW, id="unrolled")])
def test_adapters_compute_what_a_merged_kernel_does(case, scan_layers):
    model = model_of(case, scan_layers=scan_layers)
    adapters, base = start(model)
    adapters = random_adapters(adapters)
    found = logps(model, merge_trained(adapters, base))
    want = logps(model.base, effective(adapters, base, model.lora))
    assert np.abs(want - logps(model.base, base)).max() > 0.1
    np.testing.assert_allclose(found, want, atol=1e-4)


@SLOW
@pytest.mark.parametrize("scan_layers", [True, False])
def test_sampling_takes_adapters_as_a_merged_kernel(scan_layers):
    model = model_of("dora", scan_layers=scan_layers)
    adapters, base = start(model)
    adapters = random_adapters(adapters)
    found = greedy(model, merge_trained(adapters, base))
    np.testing.assert_array_equal(found, greedy(model, effective(adapters, base, model.lora)))
    assert (found != greedy(model, base)).any()


def test_the_scale_is_alpha_over_rank_or_its_root():
    assert Lora(16, 8.0, ("q",)).scale == 0.5
    assert Lora(16, 8.0, ("q",), rslora=True).scale == 2.0


@SLOW
def test_the_first_factor_is_uniform_by_its_inputs_and_the_same_under_every_sharding():
    model = model_of("experts and router")
    key = jax.random.key(3)
    once = flatten_paths(split_adapters(model.init(key))[0])
    for path, x in once.items():
        if not path.endswith("/a"):
            assert not np.asarray(x).any()
            continue
        size_in = math.prod(x.shape[(2 if "moe" in path and "router" not in path else 1) : -1])
        spread = np.abs(np.asarray(x)) * math.sqrt(size_in)
        assert 0.9 < spread.max() < 1 and 0.4 < spread.mean() < 0.6
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "expert": 2})
    shardings = param_shardings(mesh, model.abstract_params())
    split = jax.jit(model.init, out_shardings=shardings)(key)
    for path, x in flatten_paths(split_adapters(split)[0]).items():
        np.testing.assert_array_equal(x, once[path], err_msg=path)


# The step


def step_and_shapes(model: Model, *flags: str):
    """Returns (the jitted step, the shapes of its arguments) of a small batch."""
    data = data_config(row_len=32, rows=1, batch_size=4)
    asked = ["x", "--config=configs/jsonl.py:files=x,smoke", "--config.lora.rank=4", *flags]
    config = ConfigDict(parse_flags(asked)[0].to_dict())
    config.data, config.loss.logits_chunk = data, 32
    examples = table_of(encode_one(id_record(i + 1), data) for i in range(4))
    batch = Dataset([examples], data, seed=0).batch_at(0).batch
    tx = optax.adam(1.0)
    step = make_train_step(model, tx, optax.constant_schedule(1.0), config)
    trained = model.abstract_trained()
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(tx.init, trained)
    )
    base = model.base.abstract_params()
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), base)
    return jax.jit(step), (state, Frozen(base, {}), batch)


def shapes_made(jaxpr) -> set[tuple]:
    """Returns (shape, dtype) of all that a program computes, in all its loops."""
    found = set()
    for eqn in jaxpr.eqns:
        found |= {
            (x.aval.shape, str(x.aval.dtype)) for x in eqn.outvars if hasattr(x.aval, "shape")
        }
        for inner in jaxprs_in_params(eqn.params):
            found |= shapes_made(inner)
    return found


@pytest.mark.parametrize("remat", [pytest.param("none", marks=SLOW), "full"])
def test_nothing_of_the_base_is_differentiated_or_has_a_moment(remat):
    model = Model(dataclasses.replace(TINY, mlp_width=80), Lora(4, 8.0, DENSE_TARGETS), remat=remat)
    step, shapes = step_and_shapes(model)
    made = shapes_made(jax.make_jaxpr(step)(*shapes).jaxpr)
    kernels = {
        path: x.shape for path, x in flatten_paths(shapes[1].base).items() if "kernel" in path
    }
    c = model.config
    gradients = {shape[1:] if "layers" in path else shape for path, shape in kernels.items()}
    # What is cast to float32 to be used has such a shape too, but no sum or stack of gradients.
    assert not {(shape, "float32") for shape in kernels.values() if len(shape) > 2} & made
    text = step.lower(*shapes).as_text()
    d, f, v = c.width, c.mlp_width, c.padded_vocab
    outer = [f"-> tensor<{a}x{b}xf32>" for a, b in ((d, f), (f, d), (d, v), (v, d))]
    assert gradients >= {(d, f), (f, d), (d, v)}
    assert not [
        x for x in outer for line in text.splitlines() if "dot_general" in line and x in line
    ]


def test_decay_is_of_both_factors_and_the_second_may_learn_faster():
    optim = ConfigDict(
        dict(
            b1=0.0, b2=0.0, eps=1e-8, mu_dtype="float32", weight_decay=0.5, clip_norm=0.0, freeze=""
        )
    )
    tx = make_optimizer(optim, optax.constant_schedule(0.1), b_lr_ratio=4.0)
    params = {"q": {"lora": {name: jnp.full(2, 2.0) for name in ("a", "b", "m")}}}
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    found = {name: float(x[0]) for name, x in updates["q"]["lora"].items()}
    assert found == pytest.approx({"a": -0.1 * 2, "b": -0.4 * 2, "m": -0.1})


# Config


def refusal(*flags: str) -> str:
    with pytest.raises(UserError) as error:
        flags = ("--config.data.rows=8", *flags)
        build.build(parse_flags(["x", "--config=configs/jsonl.py:files=x,smoke", *flags])[0])
    return str(error.value)


def test_what_cannot_be_meant_of_adapters_is_refused_by_name():
    rank = "--config.lora.rank=2"
    assert "config.lora.targets must be some of q, k" in refusal("--config.lora.targets=q,q_proj")
    assert "names router" in refusal("--config.lora.targets=q,router")
    moe = (rank, "--config.model.name=tiny_moe", "--config.lora.dora")
    assert "config.lora.dora is not of experts" in refusal(*moe)
    base = "--config.reference.kind=base"
    assert "set config.lora.rank" in refusal(base)
    assert "config.reference.init_from is" in refusal(rank, base, "--config.reference.init_from=x")
    freeze = refusal(rank, base, "--config.optim.freeze=embed")
    assert "in none of the parameters" in freeze and "layers/attn/k/lora/a" in freeze
