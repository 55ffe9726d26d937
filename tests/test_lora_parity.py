"""Thirty steps beside PEFT, the released batch maths: NCA, and InfoNCA on a base in 4 bits.

Files in tests/data/adapters were made with torch and PEFT: a base, adapters before and after.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import metric_lines
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from test_released import IN_ORDER, PERMUTED, check, golden_flags, largest_differences, mesh

from nca_jax import build, precompute, train
from nca_jax.axes import flatten_paths, nest_paths
from nca_jax.flags import parse_flags
from nca_jax.infra.checkpoint import restore_params
from nca_jax.infra.mesh import param_shardings, put_whole

ADAPTERS = Path(__file__).parent / "data" / "adapters"
FLAGS = (
    f"--config.model.init_from={ADAPTERS / 'tiny_mistral'}",
    "--config.optim.lr=1e-2",
    "--config.lora.alpha=16",
    "--config.reference.kind=base",
)
KINDS = {
    "lora": ("--config.lora.rank=8",),
    "qlora": ("--config.lora.rank=16", "--config.lora.base_dtype=nf4"),
}


def adapters_in(folder: Path, abstract: dict) -> dict[str, np.ndarray]:
    """Returns {path: array} of a PEFT folder."""
    tensors, found = load_file(folder / "adapter_model.safetensors"), {}
    for path, x in flatten_paths(abstract).items():
        _, part, name, _, factor = path.split("/")
        part = {"attn": "self_attn", "mlp": "mlp"}[part]
        layer = "base_model.model.model.layers.{}." + f"{part}.{name}_proj.lora_{factor.upper()}"
        of_layers = [tensors[f"{layer.format(i)}.weight"].T for i in range(x.shape[0])]
        found[path] = np.stack(of_layers).reshape(x.shape)
    return found


@pytest.fixture(params=KINDS)
def golden(request, monkeypatch) -> dict:
    """The trajectory of a kind; runs begin with its adapters."""
    kind = request.param

    def start(run: build.Run, base: dict) -> dict:
        abstract = run.model.abstract_trained()
        shardings = flatten_paths(param_shardings(run.mesh, abstract))
        arrays = adapters_in(ADAPTERS / f"adapter_init_{kind}", abstract)
        return nest_paths({path: put_whole(x, shardings[path]) for path, x in arrays.items()})

    monkeypatch.setattr("nca_jax.start.start_trained", start)
    return json.loads((ADAPTERS / f"trajectory_{kind}.json").read_text())


def apart(kind: str, config: ConfigDict, workdir: Path) -> float:
    """Returns the relative norm of what the last adapters differ in from PEFT's."""
    run = build.build(config)
    abstract = run.model.abstract_trained()
    ours = flatten_paths(restore_params(workdir, abstract, run.mesh))
    theirs = adapters_in(ADAPTERS / f"adapter_final_{kind}", abstract)
    squares = {path: np.sum((np.asarray(ours[path]) - x) ** 2) for path, x in theirs.items()}
    return float(np.sqrt(sum(squares.values()) / sum(np.sum(x**2) for x in theirs.values())))


CASES = {
    "one device": ([0], ()),
    "8 permuted": (PERMUTED, mesh(2, 2, 2)),
    "8": (IN_ORDER, mesh(2, 2, 2)),
    "data": ([0, 1], mesh(2, 1, 1)),
    "fsdp": ([1, 0], mesh(1, 2, 1)),
    "tensor": ([0, 1], mesh(1, 1, 2)),
    "one row at a time, scanned": ([0], ("--config.data.rows=1", "--config.model.scan_layers")),
}


SLOW, LONG = pytest.mark.slow, pytest.mark.long
MARKS = {"one device": (), "8 permuted": SLOW}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=MARKS.get(case, (SLOW, LONG))) for case in CASES]
)
def test_thirty_steps_equal_peft(tmp_path, use_devices, golden, case):
    devices, flags = CASES[case]
    use_devices(*devices)
    kind = golden["kind"]
    flags = golden_flags(tmp_path, golden, *FLAGS, *KINDS[kind], *flags)
    train.main([*flags, f"--workdir={tmp_path / 'run'}"])
    lines = metric_lines(tmp_path / "run", "train")
    assert len(lines) == 30
    assert lines[0]["max_abs_logratio"] == 0 or len(devices) > 1
    check(largest_differences(golden, lines))
    assert apart(kind, parse_flags(flags)[0], tmp_path / "run") < 1e-3


@pytest.mark.slow
def test_a_cache_that_another_rank_made_leaves_the_numbers(tmp_path, use_devices, golden):
    use_devices(0)
    cached = ("--config.reference.kind=cached", f"--config.reference.cache={tmp_path / 'cache'}")
    flags = golden_flags(tmp_path, golden, *FLAGS, *KINDS[golden["kind"]], *cached)
    precompute.main([*flags, "--config.lora.rank=2", "--config.lora.alpha=1"])
    train.main([*flags, f"--workdir={tmp_path / 'run'}"])
    check(largest_differences(golden, metric_lines(tmp_path / "run", "train")))
