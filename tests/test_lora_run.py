"""Runs with adapters: what is saved, what a stop leaves, and whose base it is."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import metric_lines
from families import write_family
from helpers import id_record, stopping, write
from safetensors.numpy import load_file, save_file

from nca_jax import build, evaluate, train
from nca_jax.axes import flatten_paths
from nca_jax.checks import UserError
from nca_jax.flags import parse_flags
from nca_jax.infra.checkpoint import RECORD
from nca_jax.params import policy_params
from nca_jax.reference import reference_params

FLAGS = (
    "--config.reference.kind=base",
    "--config.lora.rank=2",
    "--config.data.row_len=64",
    "--config.loss.logits_chunk=64",
    "--config.eval_every=2",
    "--config.save_every=2",
    "--config.checkpoint.keep_last=2",
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_device(use_devices):
    use_devices(0)


@pytest.fixture
def flags(tmp_path) -> list[str]:
    (tmp_path / "model").mkdir()
    model = write_family(tmp_path / "model", "mistral")
    records = [id_record(i, 4) for i in range(1, 6)]
    rows, held = (
        write(tmp_path / name, some)
        for name, some in (("rows.jsonl", records[:4]), ("held.jsonl", records[4:]))
    )
    config = f"configs/torch_parity.py:model={model},rows={rows},steps=4,batch_size=2,lr=1e-2"
    return ["train", f"--config={config}", f"--config.data.eval_files={held}", *FLAGS]


def params_of(flags: list[str], workdir: Path) -> dict[str, np.ndarray]:
    run = build.build(parse_flags(flags)[0])
    with jax.set_mesh(run.mesh):
        return jax.tree.map(np.asarray, flatten_paths(policy_params(run, str(workdir))))


DORA = pytest.param(("--config.lora.dora", "--config.lora.b_lr_ratio=4"), marks=pytest.mark.long)


@pytest.mark.parametrize("more", [(), DORA])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, flags, monkeypatch, more):
    flags = [*flags, *more]
    train.main([*flags, f"--workdir={tmp_path / 'whole'}"])
    steps = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(train, "stop_asked", stopping(lambda: next(steps) == 3))
        train.main([*flags, f"--workdir={tmp_path / 'parts'}"])
    train.main([*flags, f"--workdir={tmp_path / 'parts'}"])
    assert metric_lines(tmp_path / "parts") == metric_lines(tmp_path / "whole")
    found, want = (params_of(flags, tmp_path / name) for name in ("parts", "whole"))
    assert any("/lora/a" in path for path in want)
    for path, x in want.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)


def test_a_checkpoint_holds_adapters_alone_and_another_base_is_refused_by_name(tmp_path, flags):
    workdir = tmp_path / "run"
    train.main([*flags, f"--workdir={workdir}"])
    record = json.loads((workdir / "checkpoints" / "4" / RECORD).read_text())
    saved = [name for name in record["custom_metadata"]["digests"] if not name.endswith("/b")]
    counters = {"step", "opt_state/1/count", "opt_state/3/count"}
    assert {name for name in saved if not name.endswith("lora/a")} == counters
    assert len(saved) - len(counters) == 3 * 7  # parameters and both moments of seven matrices
    evaluate.main(["evaluate", f"--workdir={workdir}", "--num_prompts=0"])

    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = -tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    for go_on in (
        lambda: train.main([*flags, f"--workdir={workdir}"]),
        lambda: evaluate.main(["evaluate", f"--workdir={workdir}", "--num_prompts=0"]),
    ):
        with pytest.raises(UserError, match=r"began with something else \(base of the adapters"):
            go_on()


def test_the_reference_is_the_base_itself_whatever_the_adapters(flags):
    run = build.build(parse_flags(flags)[0])
    with jax.set_mesh(run.mesh):
        policy = policy_params(run, "")
        base = {path: x for path, x in flatten_paths(policy).items() if "/lora/" not in path}
        found = flatten_paths(reference_params(run, policy))
    assert found.keys() == base.keys()
    assert all(found[path] is x for path, x in base.items())  # no copy
