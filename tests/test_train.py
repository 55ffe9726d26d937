"""The training command: every way to the same step, and clear stops. See also test_released.py."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import metric_lines, write_records
from safetensors.numpy import load_file, save_file

from nca_jax import flops, precompute, train
from nca_jax.checks import UserError
from nca_jax.chips import CHIPS, Chip
from nca_jax.infra import profile
from nca_jax.model_config import MODELS

EIGHT = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")


def run(workdir: Path, rows: Path, *flags: str, arg: str = "smoke") -> list[dict]:
    """Trains in this process on 8 devices; returns the train lines."""
    train.main(flags_of(workdir, rows, *flags, arg=arg))
    return metric_lines(workdir, "train")


def flags_of(workdir: Path, rows: Path, *flags: str, arg: str = "smoke") -> list[str]:
    return [
        "train",
        f"--config=configs/jsonl.py:files={rows},{arg}",
        f"--workdir={workdir}",
        "--config.data.rows=4",
        "--config.data.row_len=256",
        "--config.log.tensorboard=False",
        *EIGHT,
        *flags,
    ]


@pytest.fixture
def rows(tmp_path):
    return write_records(tmp_path / "rows.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(("algo", "start"), [("nca", 2 * math.log(2)), ("infonca", math.log(4))])
def test_first_loss_is_that_of_policy_equal_to_reference(tmp_path, rows, algo, start):
    flags = ("--config.steps=1", "--config.eval_every=0")
    lines = run(tmp_path / "run", rows, *flags, arg=f"algo={algo},smoke")
    assert lines[0]["loss"] == pytest.approx(start, abs=1e-6)
    assert lines[0]["max_abs_logratio"] == 0


SEVERAL_MICRO_BATCHES = (
    "--config.data.row_len=128",
    "--config.data.max_response_len=16",
    "--config.data.batch_size=8",
    "--config.steps=3",
    "--config.eval_every=0",
    "--config.optim.lr=1e-3",
)


@pytest.fixture(scope="module")
def several_micro_batches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    rows = write_records(folder / "rows.jsonl")
    return rows, run(folder / "run", rows, *SEVERAL_MICRO_BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            (
                "--config.mesh.data=8",
                "--config.mesh.fsdp=1",
                "--config.mesh.tensor=1",
                "--config.data.rows=8",
            ),
            marks=pytest.mark.slow,
        ),
        (
            "--config.data.row_len=512",
            "--config.data.align=16",
            "--config.data.block=32",
            "--config.model.scan_layers=True",
            "--config.model.remat=full",
        ),
        pytest.param(
            (
                "--config.data.row_len=512",
                "--config.data.align=8",
                "--config.data.block=128",
                "--config.model.attention=splash",
            ),
            marks=(pytest.mark.slow, pytest.mark.long),
        ),
    ],
    ids=["other mesh, more rows", "one micro-batch, aligned, scanned, remat", "splash"],
)
def test_how_a_step_is_laid_out_does_not_change_its_numbers(tmp_path, several_micro_batches, flags):
    rows, want = several_micro_batches
    got = run(tmp_path / "got", rows, *SEVERAL_MICRO_BATCHES, *flags)
    assert len(got) == len(want) == 3
    for a, b in zip(want, got, strict=True):
        for name in ("loss", "grad_norm", "logps/0", "logps/3", "margin"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5), name


@pytest.mark.slow
def test_steps_after_the_first_compile_nothing(tmp_path, rows):
    compiled = []

    def listen(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    counts = []
    for num_steps in (1, 2, 6):  # the first run compiles what the process keeps
        before = len(compiled)
        # Steps of one to four micro-batches.
        flags = (*SEVERAL_MICRO_BATCHES, f"--config.steps={num_steps}")
        run(tmp_path / str(num_steps), rows, *flags, "--config.data.shuffle=True")
        counts.append(len(compiled) - before)
    assert counts[2] == counts[1] > 0


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The workdir of a run of four steps, of which 2 and 3 are traced, on devices of 1 TFLOP/s."""
    folder = tmp_path_factory.mktemp("measured")
    flags = ("--config.steps=4", "--config.eval_every=0", "--profile=2:3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHIPS, "cpu", Chip(peak_flops=1e12, memory_gib=1.0))
        run(folder / "run", write_records(folder / "rows.jsonl"), *flags)
    return folder / "run"


@pytest.mark.slow
def test_a_profile_holds_the_asked_steps(measured):
    (trace,) = (measured / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == profile.STEP]
    assert sorted(steps) == [2, 3]


@pytest.mark.slow
def test_mfu_is_written_where_the_peak_of_the_devices_is_known(measured):
    lines = [json.loads(line) for line in (measured / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        # All needed tokens pass the trunk; the head and attention are less than ten times that.
        least = 6 * flops.trunk_params(MODELS["tiny"]) * line["needed_tokens"]
        least /= line["step_seconds"] * 8 * 1e12
        assert least < line["mfu"] < 10 * least


def test_a_profile_beyond_the_epochs_of_a_run_is_refused_before_the_first_step(tmp_path, rows):
    flags = ("--config.steps=0", "--config.epochs=1.0", "--profile=5:7")
    with pytest.raises(UserError, match="--profile=5:7, but the run has 5 steps"):
        run(tmp_path / "run", rows, *flags)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
def test_cached_reference_equals_live_one_and_is_checked(tmp_path, rows):
    cache = tmp_path / "cache"
    cached = ("--config.reference.kind=cached", f"--config.reference.cache={cache}")
    flags = ("--config.optim.lr=1e-3", "--config.steps=3")
    precompute.main([f for f in flags_of(tmp_path, rows, *cached) if "workdir" not in f])
    want, got = run(tmp_path / "live", rows, *flags), run(tmp_path / "got", rows, *flags, *cached)
    for a, b in zip(want, got, strict=True):
        for name in ("loss", "grad_norm", "chosen_logp_drift", "margin"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-4), name

    with pytest.raises(UserError, match="stale.*max_response_len: 96 there, 20 here"):
        run(tmp_path / "stale", rows, *cached, "--config.data.max_response_len=20")

    part = next(cache.glob("part-*"))
    arrays = load_file(part)
    save_file(arrays | {"logps": arrays["logps"] + np.float32(1)}, part)
    with pytest.raises(UserError, match=f"{part} is damaged"):
        run(tmp_path / "damaged", rows, *cached)
    del arrays["digest"]  # as of an older version, which had none
    save_file(arrays | {"logps": arrays["logps"] + np.float32(1)}, part)
    with pytest.raises(UserError, match="policy and reference start equal"):
        run(tmp_path / "wrong", rows, *cached)


@pytest.mark.slow
def test_non_finite_loss_names_step_and_rows_and_keeps_the_last_checkpoint(tmp_path, rows):
    flags = ("--config.optim.lr=1e30", "--config.save_every=1", "--config.optim.warmup_frac=0.3")
    flags += ("--config.optim.warmup_from=zero", "--config.eval_every=0")
    with pytest.raises(UserError, match=r"Step 3: loss nan.*rows\.jsonl:\d+"):
        run(tmp_path / "run", rows, *flags)
    assert [line["step"] for line in metric_lines(tmp_path / "run", "train")] == [1, 2]
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.slow
def test_a_last_step_after_which_nothing_is_finite_is_not_saved(tmp_path, rows):
    flags = ("--config.optim.lr=1e30", "--config.steps=1", "--config.optim.warmup_frac=0")
    flags += ("--config.eval_every=1", "--config.data.eval_fraction=0.3")
    with pytest.raises(UserError, match="Step 1, eval: .* is nan.*it has no checkpoint yet"):
        run(tmp_path / "run", rows, *flags)
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    assert [line["step"] for line in metric_lines(tmp_path / "run")] == [0, 1]


@pytest.mark.slow
def test_the_last_and_the_best_checkpoint_are_kept(tmp_path, rows):
    flags = ("--config.checkpoint.keep_last=1", "--config.checkpoint.best_metric=margin")
    flags += ("--config.eval_every=2", "--config.save_every=2", "--config.optim.lr=3e-3")
    run(tmp_path / "run", rows, *flags, "--config.data.eval_fraction=0.3", "--config.steps=8")
    saved = [line for line in metric_lines(tmp_path / "run", "eval") if line["step"] > 0]
    best = max(saved, key=lambda line: line["margin"])["step"]
    kept = {int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()}
    assert kept == {8, best}
    assert json.loads((tmp_path / "run/run.json").read_text())["best_step"] == best


def test_resume_refuses_another_config_by_name(tmp_path, rows):
    run(tmp_path / "run", rows, "--config.steps=2", "--config.eval_every=0")
    with pytest.raises(UserError, match="optim.lr: 5e-06 there, 0.1 here"):
        run(tmp_path / "run", rows, "--config.steps=2", "--config.optim.lr=0.1")
    with pytest.raises(UserError, match="model.name: 'tiny' there, 'tiny_moe' here"):
        run(tmp_path / "run", rows, "--config.steps=2", "--config.model.name=tiny_moe")


@pytest.mark.slow
def test_mixture_of_experts_trains(tmp_path, rows):
    lines = run(
        tmp_path / "run",
        rows,
        "--config.model.name=tiny_moe",
        "--config.optim.lr=3e-3",
        "--config.optim.warmup_from=zero",
        "--config.steps=12",
        "--config.eval_every=0",
    )
    assert lines[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-6)
    assert lines[-1]["excess"] < lines[0]["excess"]
