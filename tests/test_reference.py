"""Where the reference comes from: another model than the policy's, in bfloat16, and unchanged."""

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import metric_lines
from helpers import data_config, encode_one, id_record
from ml_dtypes import bfloat16
from old_run import ALL_BUT_STEPS, MODEL
from safetensors.numpy import load_file, save_file

from nca_jax import build, evaluate, precompute, train
from nca_jax.checks import UserError
from nca_jax.data.pipeline import Dataset
from nca_jax.data.table import Table, table_of
from nca_jax.flags import parse_flags
from nca_jax.infra.checkpoint import restore_params
from nca_jax.infra.mesh import make_mesh
from nca_jax.params import start_params
from nca_jax.programs import jit_step_logps
from nca_jax.reference import (
    check_fingerprint,
    make_reference,
    part_path,
    read_part,
    write_part,
)

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


@pytest.mark.slow
def test_a_reference_of_its_own_is_what_step_1_compares_with_and_may_not_change(tmp_path, other):
    flags = (*FLAGS, f"--config.reference.init_from={other}", f"--workdir={tmp_path / 'run'}")
    train.main(["train", *flags])
    first = metric_lines(tmp_path / "run", "train")[0]

    config, _ = parse_flags(["train", *flags[:-1]])
    run, data = build.read_all(config)
    batch = Dataset(data.sources, run.config.data, seed=config.seed).batch_at(0).batch
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_without_a_reference_is_compared_with_its_start_or_with_a_model(tmp_path, other):
    simpo = (f"{ALL_BUT_STEPS[0]},algo=simpo", *ALL_BUT_STEPS[1:])
    simpo = (*simpo, "--config.steps=2", "--config.eval_every=0")
    workdir = f"--workdir={tmp_path / 'run'}"
    train.main(["train", *simpo, workdir])

    def evaluated(*flags: str) -> dict:
        out = tmp_path / "evaluation.json"
        evaluate.main(["evaluate", *flags, "--num_prompts=0", f"--out={out}"])
        return json.loads(out.read_text())["metrics"]

    after = evaluated(workdir)
    assert "chosen_logp_drift" not in after and "logratio/0" not in after
    for reference, flags in (("start", ()), (other, (f"--config.model.init_from={other}",))):
        before = evaluated(*simpo, *flags)  # of the model that the reference is
        found = evaluated(workdir, f"--reference={reference}")
        drift = after["logps/0"] - before["logps/0"]
        assert found["chosen_logp_drift"] == pytest.approx(drift, abs=1e-3) and abs(drift) > 0.01


# The cache


def examples(num: int = 5) -> Table:
    config = data_config()
    return table_of(encode_one(id_record(i), config, where=f"f:{i}") for i in range(num))


def written_part(folder: Path, **changes) -> Path:
    """Writes a part of five examples; with `changes` as an older version did, those arrays so."""
    logps = np.linspace(-9, -1, 15, dtype=np.float32)
    write_part(folder, 0, examples(), logps)
    path = part_path(folder, 0)
    if changes:
        arrays = load_file(path)
        del arrays["digest"]
        save_file(arrays | changes, path)
    return path


@pytest.mark.parametrize("seed", range(30))
def test_a_flipped_bit_of_a_cache_is_never_read_back_as_another_number(tmp_path, seed):
    rng, path = random.Random(seed), written_part(tmp_path)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"part-00000.safetensors is damaged .*precompute"):
        read_part(path)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_cut_part_of_a_cache_is_named(tmp_path, size):
    path = written_part(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="part-00000.safetensors is damaged"):
        read_part(path)


def test_a_part_of_an_older_version_is_read_where_it_can_be_right(tmp_path):
    logps = np.arange(15, dtype=np.float32)
    found = read_part(written_part(tmp_path, logps=logps))
    assert found[int(examples().entries["key"][1])].tolist() == [3, 4, 5]
    logps[4] = np.nan
    with pytest.raises(UserError, match="part-00000.safetensors is damaged .*NaN"):
        read_part(written_part(tmp_path, logps=logps))
    with pytest.raises(UserError, match="part-00000.safetensors is damaged .*14 numbers"):
        read_part(written_part(tmp_path, logps=logps[:14]))


@pytest.mark.parametrize(("rows", "row_len", "size"), [(1, 8, 64), (16, 64, 512)])
def test_a_part_fills_the_rows_of_all_devices_several_times(rows, row_len, size):
    config = data_config(rows=rows, row_len=row_len)
    assert precompute.part_size(examples(), config) == size  # of examples of 8 tokens


def test_log_probabilities_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(UserError, match="not finite to f:0"):
        write_part(tmp_path, 0, examples(), np.full(15, np.inf, np.float32))
    assert not part_path(tmp_path, 0).exists()


@pytest.mark.parametrize("content", [b"", b'{"params": "ab', b"[1, 2]", b"\xff\0", b"7"])
def test_a_damaged_fingerprint_of_a_cache_is_one_line(tmp_path, content):
    (tmp_path / "fingerprint.json").write_bytes(content)
    with pytest.raises(UserError, match=r"fingerprint.json is damaged .*; restore it"):
        check_fingerprint(tmp_path, {})


def test_precompute_makes_a_damaged_part_again_and_no_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precompute, "part_size", lambda examples, data: 8)
    cache = tmp_path / "cache"
    flags = ("--config.reference.kind=cached", f"--config.reference.cache={cache}")
    precompute.main(["precompute", *FLAGS, *flags])
    paths = sorted(cache.glob("part-*"))
    want, times = [path.read_bytes() for path in paths], [path.stat().st_mtime_ns for path in paths]
    assert len(paths) > 1
    paths[1].write_bytes(want[1][:-9])
    with pytest.raises(UserError, match=f"{paths[1]} is damaged"):
        train.main(["train", *FLAGS, *flags, f"--workdir={tmp_path / 'run'}"])
    capsys.readouterr()
    precompute.main(["precompute", *FLAGS, *flags])
    assert f"{paths[1]} is damaged" in capsys.readouterr().out
    assert [path.read_bytes() for path in paths] == want
    changed = [path.stat().st_mtime_ns != time for path, time in zip(paths, times, strict=True)]
    assert changed == [i == 1 for i in range(len(paths))]


# Values


def test_weights_that_are_not_finite_are_not_opened(tmp_path, other):
    tensors = load_file(other / "model.safetensors")
    name = "model.norm.weight"
    tensors[name][0] = np.nan
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    run = build.build(parse_flags(["x", *FLAGS])[0])
    for dtype in ("float32", ""):
        with pytest.raises(UserError, match=r"other'?: norm/scale hold NaN or infinity"):
            start_params(run, str(other), dtype=dtype)
