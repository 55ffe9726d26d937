"""Sampling has a mesh of its own: the same samples, and little sent for a token."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nca_jax import aot, build
from nca_jax.axes import MESH_AXES, flatten_paths, nest_paths
from nca_jax.checks import UserError
from nca_jax.chips import CHIPS
from nca_jax.compiled.writes import writes_a_turn
from nca_jax.flags import parse_flags
from nca_jax.infra.mesh import check_divides, param_shardings
from nca_jax.model_config import MODELS
from nca_jax.params import start_params
from nca_jax.programs import serving_run
from nca_jax.rollout import make_generator
from nca_jax.sampling.serving import default_sizes, serving_dtypes, serving_params

GIB = 2**30
PROMPTS = [np.arange(5, 5 + n, dtype=np.int32) for n in (3, 1, 5, 2)]


def run_of(*flags: str) -> build.Run:
    small = ("--config.generate.num_samples=2", "--config.generate.max_new_tokens=4")
    argv = ["x", "--config=configs/jsonl.py:files=none,smoke", "--config.data.rows=8"]
    return build.build(parse_flags([*argv, *small, *flags])[0])


# The choice


def sizes_of(model: str, chip: str, chips: int, num_slices: int = 1) -> dict[str, int]:
    """The sizes other than 1 that are chosen for a named model in bfloat16."""
    config = MODELS[model]
    weights = jax.eval_shape(build.Model(config).init, jax.random.key(0))
    num_bytes = 2 * sum(x.size for x in jax.tree.leaves(weights))
    memory = int(CHIPS[chip].memory_gib * GIB)

    def check(sizes):
        check_divides(sizes, config, math.prod(sizes.values()) // sizes["tensor"])

    sizes = default_sizes(chips, num_slices, num_bytes, memory, check)
    assert math.prod(sizes.values()) == chips * num_slices
    return {axis: size for axis, size in sizes.items() if size > 1}


@pytest.mark.parametrize(
    ("model", "chip", "chips", "sizes"),
    [
        ("mistral_7b", "TPU v5 lite", 8, {"tensor": 8}),
        ("mistral_7b", "TPU v5", 64, {"data": 8, "tensor": 8}),
        ("mixtral_8x7b", "TPU v5 lite", 16, {"data": 2, "tensor": 8}),
        # 87 GiB over 8 are 10.9 a chip; over 4 they do not fit 15.75 GiB, on v6e they do.
        ("mixtral_8x7b", "TPU v6 lite", 4, {"tensor": 4}),
        # 9 heads of 3 kv heads divide over no 2, and its 0.25 GiB are read as fast everywhere.
        ("smollm2_135m", "TPU v5 lite", 8, {"data": 8}),
        ("qwen3_0_6b", "TPU v6 lite", 4, {"data": 2, "tensor": 2}),
    ],
)
def test_weights_are_split_over_heads_until_a_chip_reads_little(model, chip, chips, sizes):
    assert sizes_of(model, chip, chips) == sizes


def test_slices_are_copies_and_what_no_tensor_axis_makes_fit_is_gathered():
    assert sizes_of("mistral_7b", "TPU v5 lite", 16, 2) == {"data": 4, "tensor": 8}

    def check(sizes):
        if sizes["tensor"] > 2 or sizes["fsdp"] > 4:
            raise UserError("does not divide")

    def chosen(num_gib: int) -> dict[str, int]:
        return default_sizes(8, 1, num_gib * GIB, 16 * GIB, check)

    assert chosen(24) == dict(zip(MESH_AXES, (4, 1, 2, 1), strict=True))
    assert chosen(25) == dict(zip(MESH_AXES, (2, 2, 2, 1), strict=True))
    assert chosen(900) == dict(zip(MESH_AXES, (1, 4, 2, 1), strict=True))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("tensor=8", "4 query heads over mesh.tensor = 8 does not divide"),
        ("data=3", "does not fill the 8 devices"),
        ("data=16,fsdp=-1", "does not fill the 8 devices"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_by_name(asked, said):
    run = run_of(f"--config.generate.mesh={asked}")
    with pytest.raises(UserError, match=f"config.generate.mesh='{asked}'.*{said}"):
        serving_run(run)


@pytest.mark.parametrize("asked", ["heads=2", "tensor=two", "data=-1,fsdp=-1", "tensor=0", "", "x"])
def test_what_is_no_mesh_is_refused_before_a_device_is_touched(asked):
    said = "config.generate.mesh must be 'auto', 'same', or sizes of data, fsdp, tensor, expert"
    with pytest.raises(UserError, match=said):
        parse_flags(["x", "--config=configs/jsonl.py:smoke", f"--config.generate.mesh={asked}"])


# What samples


def test_samples_on_a_mesh_of_their_own_are_those_of_the_runs_mesh():
    run = run_of()
    with jax.set_mesh(run.mesh):
        params = start_params(run, "")

        def samples(*flags: str) -> list:
            of_prompts = make_generator(run_of(*flags))(params, PROMPTS, 0)
            return [[ids.tolist() for ids in of_prompt] for of_prompt in of_prompts]

        assert serving_run(run).mesh is run.mesh  # on a CPU
        on_run = samples()
        assert samples("--config.generate.mesh=data=-1,tensor=2") == on_run
        greedy = "--config.generate.temperature=0"
        assert samples(greedy, "--config.generate.mesh=data=8") == samples(greedy)


def test_parameters_that_sample_are_what_the_model_makes_of_them_where_it_uses_them():
    run = serving_run(run_of("--config.generate.mesh=data=4,tensor=2"))
    with jax.set_mesh(run.mesh):
        params = start_params(run_of(), "")
        assert serving_params(run.mesh, jnp.dtype("float32"), params) is not params
        served = serving_params(run.mesh, jnp.dtype("bfloat16"), params)
    shardings = param_shardings(run.mesh, params)
    for (path, x), y, sharding in zip(
        flatten_paths(params).items(),
        jax.tree.leaves(served),
        jax.tree.leaves(shardings),
        strict=True,
    ):
        dtype = "float32" if path.endswith("scale") else "bfloat16"
        np.testing.assert_array_equal(y, np.asarray(x).astype(dtype), strict=True)
        assert y.sharding.is_equivalent_to(sharding, y.ndim)
    assert serving_params(run.mesh, jnp.dtype("bfloat16"), served) is served


def test_adapters_their_norms_and_codes_sample_as_they_are_kept():
    flat = {
        "layers/attn/q/kernel": "float32",
        "layers/attn/q/lora/a": "float32",
        "layers/attn/q/lora/m": "float32",
        "layers/attn/o/kernel": "float32",
        "layers/attn/k/kernel": "float16",
        "layers/attn/k/bias": "bfloat16",
        "layers/mlp/up/codes": "uint8",
        "layers/mlp/up/absmax": "float32",
    }
    shapes = {path: jax.ShapeDtypeStruct((1, 1, 1, 1), dtype) for path, dtype in flat.items()}
    found = flatten_paths(serving_dtypes(nest_paths(shapes), jnp.dtype("bfloat16")))
    changed = {path: str(x.dtype) for path, x in found.items() if x.dtype != flat[path]}
    assert changed == dict.fromkeys(("layers/attn/o/kernel", "layers/attn/k/kernel"), "bfloat16")


# What the compiler says of it


def test_a_slice_that_is_written_in_each_turn_counts_and_what_is_written_once_does_not():
    def f(x):
        x = x.at[0].set(1.0)

        def turn(carry):
            i, x = carry
            return i + 1, jax.lax.dynamic_update_slice(x, x[:1, :] * 2, (i, 0))

        return jax.lax.while_loop(lambda carry: jnp.sum(carry[1]) < 9, turn, (0, x))

    text = jax.jit(f).lower(jnp.ones((64, 32))).compile().as_text() or ""
    assert writes_a_turn(text) == (32 * 4, 32 * 4)


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="wants libtpu")
def test_a_sampled_token_sends_less_than_half_a_percent_of_the_weights():
    argv = ("--config=configs/ultrafeedback.py:model=mistral_7b,algo=nca", "--topology=v5e:2x4")
    sizes = ("--config.generate.num_samples=8", "--config.generate.batch_size=64")
    config, flags = parse_flags(["aot", *argv, *sizes], sections=("generate",), topology=None)
    program = aot.compile_apart(
        "decode",
        build.build_for(
            aot.changed(config, {"data.rows": 8}), aot.topology_devices(flags.topology, 1)
        ),
        flags.topology,
        1,
        with_code=False,
    )
    assert program["mesh"] == {"data": 1, "fsdp": 1, "tensor": 8, "expert": 1}
    assert 0 < program["a_turn"]["sent"] < 0.005 * program["weights"]
