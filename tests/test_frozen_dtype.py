"""Frozen parameters, in the dtype of their file, give the numbers of float32 copies exactly."""

import dataclasses
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from families import LENGTHS, NUM_SLOTS, pieces, slots, write_family
from helpers import DENSE
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from nca_jax.axes import flatten_paths
from nca_jax.batch import Rows
from nca_jax.build import Run
from nca_jax.data.pack import RowLayout, pack
from nca_jax.data.plan import causal_bound
from nca_jax.infra.mesh import make_mesh
from nca_jax.logprobs import sum_by_slot, token_logps
from nca_jax.models.decoder import Model
from nca_jax.models.formats import names
from nca_jax.models.formats.hf import open_hf
from nca_jax.params import start_params

BFLOAT16, FLOAT16, FLOAT32 = map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32))
FAMILIES = (
    "qwen2",  # biases, tied head
    "qwen3",  # norms of q and k, a head of its own
    "mixtral",  # experts and their router
    # Norms of (1 + w), embeddings times a number that bfloat16 has not.
    pytest.param("gemma2", marks=pytest.mark.slow),
)


def written(folder: Path, name: str, dtype, only: str = "") -> Path:
    """Writes a family in float32, but those of its tensors in `dtype` whose name has `only`."""
    tensors = load_file(write_family(folder, name) / "model.safetensors")
    stored = {k: v.astype(dtype if only in k else np.float32) for k, v in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    return folder


def run_of(folder: Path, num_devices: int = 1, **options) -> Run:
    sizes = {"data": 1, "fsdp": 1, "tensor": num_devices, "expert": 1}
    mesh = make_mesh(sizes, jax.devices()[:num_devices])
    return Run(ConfigDict({"seed": 0}), mesh, Model(open_hf(folder)[0], **options), None)


def dtypes_of(params: dict) -> dict[str, np.dtype]:
    return {path: x.dtype for path, x in flatten_paths(params).items()}


def logps(model: Model, params: dict) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log-probability of every token [R, T], and of every response [slots]."""
    layout = RowLayout(row_len=32, rows=2, block=16, num_pairs=causal_bound(32, 16), align=1)
    packed, _, _ = pack(pieces(), layout, slots=slots(), num_slots=NUM_SLOTS, num_micro=1)
    rows = Rows(*(x[0] for x in packed))

    @jax.jit
    def both(params):
        found = token_logps(model, params, rows, num_slots=NUM_SLOTS, block=16, chunk=16)
        return found, sum_by_slot(found, rows, NUM_SLOTS)

    return tuple(map(np.asarray, both(params)))


def assert_same_numbers(run: Run, folder: Path, dtype: np.dtype) -> None:
    frozen = start_params(run, str(folder), dtype="")
    copies = start_params(run, str(folder))
    assert set(dtypes_of(frozen).values()) == {dtype}
    assert set(dtypes_of(copies).values()) == {FLOAT32}
    tokens, responses = logps(run.model, frozen)
    want_tokens, want_responses = logps(run.model, copies)
    assert np.count_nonzero(want_tokens) == sum(n for _, lengths in LENGTHS for n in lengths)
    np.testing.assert_array_equal(tokens, want_tokens)
    np.testing.assert_array_equal(responses, want_responses)


in_both_dtypes = pytest.mark.parametrize(
    "compute", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)]
)


@in_both_dtypes
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_parameters_give_the_numbers_of_float32_ones(tmp_path, name, compute):
    folder = written(tmp_path, name, BFLOAT16)
    assert_same_numbers(run_of(folder, dtype=jnp.dtype(compute)), folder, BFLOAT16)


@pytest.mark.slow
@in_both_dtypes
def test_unrolled_layers_do_too(tmp_path, compute):
    folder = written(tmp_path, "qwen2", BFLOAT16)
    run = run_of(folder, dtype=jnp.dtype(compute), scan_layers=False)
    assert_same_numbers(run, folder, BFLOAT16)


def test_float16_parameters_split_over_devices_do_too(tmp_path):
    folder = written(tmp_path, "qwen2", FLOAT16)
    run = run_of(folder, num_devices=2, dtype=jnp.dtype(jnp.bfloat16))
    assert_same_numbers(run, folder, FLOAT16)


def test_every_parameter_of_a_mixed_file_has_its_own_dtype(tmp_path):
    """A parameter whose layers differ is float32."""
    folder = written(tmp_path, "qwen3", BFLOAT16, only="layers.1.")
    frozen = start_params(run_of(folder), str(folder), dtype="")
    assert set(dtypes_of(frozen).values()) == {FLOAT32}
    folder = written(tmp_path, "qwen3", FLOAT16, only="q_proj")
    frozen = dtypes_of(start_params(run_of(folder), str(folder), dtype=""))
    assert [path for path, x in frozen.items() if x == FLOAT16] == ["layers/attn/q/kernel"]
    assert frozen.pop("layers/attn/q/kernel") and set(frozen.values()) == {FLOAT32}


def test_random_parameters_are_float32(tmp_path):
    run = run_of(write_family(tmp_path, "mixtral"), dtype=jnp.dtype(jnp.bfloat16))
    found = jax.eval_shape(lambda: start_params(run, "", dtype=""))
    assert set(dtypes_of(found).values()) == {FLOAT32}


def test_no_float32_copy_is_made_on_the_way():
    shape = (DENSE.vocab_size, 4096)
    stored = np.arange(np.prod(shape)).reshape(shape).astype(BFLOAT16)
    config = dataclasses.replace(DENSE, width=shape[1])
    dtypes = dict.fromkeys(names.tensor_shapes(config, names.HF), BFLOAT16)
    params = names.open_params(config, names.HF, lambda _, index: stored[index], dtypes)
    param = params["embed/table"]
    whole = (slice(None), slice(None))
    padded = stored.nbytes * param.shape[0] // shape[0]
    tracemalloc.start()
    try:
        found = param.reader("")(whole)
        assert tracemalloc.get_traced_memory()[1] < 1.01 * padded
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found[: shape[0]], stored)
    np.testing.assert_array_equal(param.read(whole), found.astype(np.float32))
