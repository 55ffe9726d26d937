"""Every mesh gives the numbers of one device; what cannot be split is refused by name."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_logprobs import RAGGED, make_groups, slots_of

from nca_jax.axes import MESH_AXES
from nca_jax.checks import UserError
from nca_jax.data.pack import RowLayout, pack
from nca_jax.data.plan import causal_bound
from nca_jax.infra.mesh import (
    check_divides,
    check_split,
    make_mesh,
    param_shardings,
    put_rows,
    row_shards,
    rows_here,
    rows_shardings,
)
from nca_jax.logprobs import sequence_logps
from nca_jax.model_config import MODELS
from nca_jax.models.decoder import Model

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LAYOUT = RowLayout(128, rows=8, block=16, num_pairs=causal_bound(128, 16), align=1)
# Eight heads of each kind, so that tensor=8 divides them.
DENSE = dataclasses.replace(MODELS["tiny"], num_heads=8, num_kv_heads=8, head_dim=8)
MOE = dataclasses.replace(MODELS["tiny_moe"], num_layers=1)


def logps_and_gradient(config, mesh) -> tuple[jax.Array, dict]:
    """Returns the log-probabilities of ragged rows, and the gradient of a fixed sum of them."""
    model = Model(config)
    groups = make_groups(RAGGED, seed=1, vocab_size=config.vocab_size)
    shape = (len(groups), 3)
    rows = pack(groups, LAYOUT, slots=slots_of(groups), num_slots=shape[0] * shape[1], num_micro=1)[
        0
    ]
    rows = jax.tree.map(lambda x: x[0], rows)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    def loss(params, rows):
        logps = sequence_logps(model, params, rows, shape=shape, block=16, chunk=32)
        return jnp.sum(weights * logps) / weights.size, logps

    shardings = param_shardings(mesh, model.abstract_params())
    with jax.set_mesh(mesh):
        params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
        grad = jax.jit(
            jax.grad(loss, has_aux=True),
            in_shardings=(shardings, rows_shardings(mesh)),
            out_shardings=(shardings, None),
            compiler_options=QUICK,
        )
        grads, logps = grad(params, rows)
    return jax.device_get((logps, grads))


@pytest.fixture(scope="module")
def on_one_device():
    """Returns a function from a decoder to its numbers."""
    mesh = make_mesh(ONE, jax.devices()[:1])
    return functools.cache(lambda config: logps_and_gradient(config, mesh))


def test_the_table_is_gathered_nowhere_and_the_heads_gradient_is_scattered_once():
    mesh = make_mesh(ONE | {"data": 2, "fsdp": 4})
    model = Model(DENSE, dtype=jnp.dtype("bfloat16"))
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((8, *x.shape[2:]), x.dtype),
        pack([], LAYOUT, slots=[], num_slots=4, num_micro=1)[0],
    )
    shardings = param_shardings(mesh, model.abstract_params())

    def loss(params, rows):
        return jnp.sum(sequence_logps(model, params, rows, shape=(1, 4), block=16, chunk=32))

    with jax.set_mesh(mesh):
        grad = jax.jit(
            jax.grad(loss),
            in_shardings=(shardings, rows_shardings(mesh)),
            out_shardings=shardings,
            compiler_options=QUICK,
        )
        text = grad.lower(model.abstract_params(), rows).compile().as_text()
    v, d = DENSE.padded_vocab, DENSE.width
    sent = [line for line in text.splitlines() if re.search(COLLECTIVE, line)]
    assert not [line for line in sent if f"[{v},{d}]" in line.split(" = ")[1]]
    of_head = [line for line in sent if re.search(rf"\[({d}|{d // 4}),{v}\]", line)]
    kinds = [re.search(COLLECTIVE, line)[1] for line in of_head]
    assert kinds == ["all-gather", "reduce-scatter", "all-reduce"]  # the last one over data


COLLECTIVE = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
PERMUTED = (5, 2, 7, 0, 3, 6, 1, 4)
MESHES = {  # each axis alone, and together
    "data": (DENSE, {"data": 8}),
    "fsdp": (DENSE, {"fsdp": 8}),
    "tensor": (DENSE, {"tensor": 8}),
    "2 x 2 x 2": (DENSE, {"data": 2, "fsdp": 2, "tensor": 2}),
    "experts": (MOE, {"data": 2, "fsdp": 2, "expert": 2}),
    "expert": (MOE, {"expert": 4, "tensor": 2}),
}


@pytest.mark.parametrize(
    "name",
    ["permuted", *[pytest.param(x, marks=pytest.mark.slow) for x in MESHES]],
)
def test_every_mesh_gives_the_numbers_of_one_device(on_one_device, name):
    devices = np.array(jax.devices())
    if name == "permuted":  # a device's place in the mesh must not matter
        devices = devices[list(PERMUTED)]
        name = "2 x 2 x 2"
    config, sizes = MESHES[name]
    logps, grads = logps_and_gradient(config, make_mesh(ONE | sizes, list(devices)))
    want_logps, want_grads = on_one_device(config)
    np.testing.assert_allclose(logps, want_logps, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def fake_devices(num_slices: int, a_slice: int) -> list:
    """Devices of several slices, as far as a mesh asks them."""
    return [
        SimpleNamespace(
            id=i, slice_index=i // a_slice, process_index=i, platform="cpu", device_kind="cpu"
        )
        for i in range(num_slices * a_slice)
    ]


def test_the_data_axis_and_no_other_lies_over_slices(monkeypatch):
    grids = []
    monkeypatch.setattr("nca_jax.infra.mesh.Mesh", lambda grid, *_, **__: grids.append(grid))
    make_mesh(ONE | {"data": 4, "fsdp": -1}, fake_devices(num_slices=2, a_slice=8))
    slices = np.vectorize(lambda device: device.slice_index)(grids[0])  # data, fsdp, ...
    assert slices.shape == (4, 4, 1, 1)
    assert (slices == np.array([0, 0, 1, 1])[:, None, None, None]).all()


def test_slices_that_data_does_not_divide_over_are_refused():
    with pytest.raises(UserError, match=r"data=1.*2 slices.*config\.mesh\.data to a multiple of 2"):
        make_mesh(ONE | {"fsdp": -1}, fake_devices(num_slices=2, a_slice=4))


@pytest.mark.parametrize(
    ("sizes", "rows", "said"),
    [
        ({"tensor": 8}, 8, "2 kv heads over mesh.tensor = 8"),
        ({"expert": 8}, 8, "4 experts over mesh.expert = 8"),
        ({"expert": 2, "fsdp": 4}, 4, "4 data.rows over mesh.data . mesh.fsdp . mesh.expert = 8"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(sizes, rows, said):
    config = dataclasses.replace(MODELS["tiny_moe"], num_heads=8)
    with pytest.raises(UserError, match=said):
        check_divides(make_mesh(ONE | sizes).shape, config, rows)


def test_a_large_array_that_is_on_every_device_is_named():
    mesh = make_mesh(ONE | {"data": 2, "fsdp": 4})
    large = {"small": {"kernel": jnp.zeros(8)}, "mlp": {"kernel": np.zeros((2**11, 2**11), "f4")}}

    def shardings(spec):
        return {"small": {"kernel": NamedSharding(mesh, P())},
                "mlp": {"kernel": NamedSharding(mesh, spec)}}  # fmt: skip

    check_split(mesh, large, shardings(P("fsdp")), copied_over="data")
    with pytest.raises(ValueError, match=r"'mlp/kernel' of shape .* 8 copies .*, wanted 2"):
        check_split(mesh, large, shardings(P()), copied_over="data")
    with pytest.raises(ValueError, match="4 copies"):
        check_split(mesh, large, shardings(P("data")), copied_over="data")


def test_what_a_batch_lacks_and_what_a_program_does_not_read_is_no_array():
    mesh = make_mesh(ONE | {"data": 2, "fsdp": 4})
    split = NamedSharding(mesh, P("fsdp"))
    arrays = {"a": None, "b": jnp.zeros((8, 8)), "c": jnp.zeros((8, 8))}
    check_split(mesh, arrays, {"a": None, "b": None, "c": split}, copied_over="data")


def test_rows_are_split_over_all_axes_but_tensor():
    assert row_shards(make_mesh({"data": 2, "fsdp": 1, "tensor": 2, "expert": 2})) == 4


@pytest.mark.parametrize("sizes", [ONE | {"data": 2, "fsdp": 4}, ONE | {"tensor": 4, "expert": 2}])
def test_rows_that_are_put_on_a_mesh_are_the_rows_of_the_host(sizes):
    devices = np.random.default_rng(0).permutation(np.array(jax.devices()))
    mesh = Mesh(devices.reshape([sizes[axis] for axis in MESH_AXES]), MESH_AXES)
    groups = make_groups(RAGGED, seed=1, vocab_size=256)
    rows = pack(groups, LAYOUT, slots=slots_of(groups), num_slots=3 * len(groups), num_micro=2)[0]
    assert rows_here(mesh, LAYOUT.rows) == list(range(LAYOUT.rows))
    put = put_rows(mesh, rows, LAYOUT.rows)
    assert put.tokens.sharding.shard_shape(put.tokens.shape)[1] == LAYOUT.rows // row_shards(mesh)
    for got, want in zip(put, rows, strict=True):
        np.testing.assert_array_equal(got, want)
