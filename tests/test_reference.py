"""Where the reference comes from: another model than the policy's, in bfloat16, and unchanged."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import metric_lines
from ml_dtypes import bfloat16
from old_run import ALL_BUT_STEPS, MODEL
from safetensors.numpy import load_file, save_file

from nca_jax import build, train
from nca_jax.checks import UserError
from nca_jax.data.pipeline import Dataset
from nca_jax.flags import parse_flags
from nca_jax.infra.checkpoint import restore_params
from nca_jax.infra.mesh import make_mesh
from nca_jax.params import start_params
from nca_jax.programs import jit_step_logps
from nca_jax.reference import make_reference

FLAGS = (
    *ALL_BUT_STEPS,
    "--config.steps=2",
    "--config.data.eval_fraction=0",
    "--config.eval_every=0",
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Programs for one device are compiled in half the time; others are for other files."""
    monkeypatch.setattr(build, "make_mesh", lambda sizes, _: make_mesh(sizes, jax.devices()[:1]))


@pytest.fixture
def other(tmp_path) -> Path:
    """A folder of the same model with other weights, in bfloat16."""
    folder = shutil.copytree(MODEL, tmp_path / "other")
    change_weights(folder, 1.5)
    return folder


def change_weights(folder: Path, factor: float) -> None:
    tensors = load_file(MODEL / "model.safetensors")
    changed = {name: (factor * x).astype(bfloat16) for name, x in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_reference_of_its_own_is_what_step_1_compares_with_and_may_not_change(tmp_path, other):
    flags = (*FLAGS, f"--config.reference.init_from={other}", f"--workdir={tmp_path / 'run'}")
    train.main(["train", *flags])
    first = metric_lines(tmp_path / "run", "train")[0]

    config, _ = parse_flags(["train", *flags[:-1]])
    run = build.build(config)
    batch = Dataset(build.read_data(run).sources, config.data, seed=config.seed).batch_at(0).batch
    with jax.set_mesh(run.mesh):
        reference = make_reference(run).params
        assert {x.dtype for x in jax.tree.leaves(reference)} == {np.dtype(bfloat16)}
        step_logps = jit_step_logps(run)
        policy = step_logps(start_params(run, config.model.init_from), batch)
        logratio = np.asarray(policy - step_logps(reference, batch))
    assert first["max_abs_logratio"] == pytest.approx(np.abs(logratio).max(), rel=1e-5)
    assert first["max_abs_logratio"] > 0.1
    assert first["loss"] != pytest.approx(first["start_loss"], abs=1e-3)

    change_weights(other, 2.0)
    with pytest.raises(UserError, match=r"reference \(config.reference.*there, .* here"):
        train.main(["train", *flags])


def test_a_run_in_bfloat16_starts_at_its_reference_and_keeps_float32_parameters(tmp_path):
    flags = (*FLAGS, "--config.model.dtype=bfloat16", f"--workdir={tmp_path / 'run'}")
    train.main(["train", *flags])
    first, second = metric_lines(tmp_path / "run", "train")
    assert first["max_abs_logratio_per_token"] < 2e-2
    assert first["loss"] == pytest.approx(2 * np.log(2), abs=5e-3)
    assert second["grad_norm"] > 0
    run = build.build(parse_flags(["train", *flags[:-1]])[0])
    mesh = make_mesh({"data": -1, "fsdp": 1, "tensor": 1, "expert": 1})
    params = restore_params(tmp_path / "run", run.model.abstract_params(), mesh)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 2
