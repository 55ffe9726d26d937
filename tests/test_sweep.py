"""A sweep runs what is left, survives any stop, and says what broke; mostly on a stub of train."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import QUICK, ROOT, write_records

from experiments import sweep
from nca_jax import signals
from nca_jax.checks import UserError
from nca_jax.config import flatten
from nca_jax.files import whole_lines
from nca_jax.flags import parse_flags
from nca_jax.losses import LOSSES
from nca_jax.saved_config import check_same_run

# In the place of nca_jax.train: leaves what train leaves, and a line a start in starts.txt.
STUB = """
import json, pathlib, sys, time
name, flags = sys.argv[1], dict(flag.split("=", 1) for flag in sys.argv[2:])
alpha, seed = flags.get("--config.loss.alpha", "0.1"), int(flags["--config.seed"])
folder = pathlib.Path(flags.get("--workdir", flags.get("--config.reference.cache")))
with open(folder / "starts.txt", "a") as file:
    file.write(name + "\\n")
if name == "precompute":
    (folder / "complete.json").write_text("{}")
elif name == "evaluate":
    content = {"metrics": {"kl": 1.0 + seed, "reward": float(alpha)}, "samples": []}
    content["metrics"]["reward_reference"] = 0.0
    (folder / "evaluation.json").write_text(json.dumps(content))
elif alpha == "3":
    print("warning: of no concern", file=sys.stderr)
    sys.exit("error: alpha 3 diverges")
elif alpha == "4" and not (folder / "run.json").exists():
    (folder / "run.json").write_text('{"steps": 2}')
    print("SIGTERM: saved after step 1 of 2")
else:
    (folder / "run.json").write_text('{"steps": 2}')
    while alpha == "5" and not pathlib.Path(flags["--config.log.wandb_project"]).exists():
        time.sleep(0.05)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in (1, 2):
            line = {"step": step, "split": "train", "loss": step + seed, "excess": 1.0}
            file.write(json.dumps(line) + "\\n")
    (folder / "checkpoints/2").mkdir(parents=True, exist_ok=True)
"""
CONFIG = "--config=configs/jsonl.py:files=x.jsonl,smoke"


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Returns `run(grid, *flags)`, which sweeps with the stub and returns the exit status."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(sweep, "nca_jax", lambda *x: [sys.executable, f"{tmp_path}/stub.py", *x])
    monkeypatch.setattr(sweep, "write_page", lambda out: 0)

    def check_if_there(config, file):  # the stub writes no config.json
        if file.exists():
            check_same_run(config, file)

    monkeypatch.setattr(sweep, "check_same_run", check_if_there)

    def run(grid: str, *flags: str) -> int:
        grids = [f"--grid={grid}"] if grid else []
        return sweep.main(["sweep", CONFIG, f"--out={tmp_path / 'out'}", *grids, *flags])

    return run


def starts(folder: Path) -> list[str]:
    return (folder / "starts.txt").read_text().split()


def test_every_setting_runs_with_every_seed_once(stub, tmp_path):
    grid = "loss.alpha=0.1,1;config.algo=nca,infonca"
    assert stub(grid, "--seeds=2", "--jobs=2", "--evaluate=4") == 0
    workdirs = sorted((tmp_path / "out").glob("*/seed=*"))
    assert len(workdirs) == 8
    assert all(starts(workdir) == ["train", "evaluate"] for workdir in workdirs)
    table = (tmp_path / "out/table.md").read_text()
    assert "| 0.1 | nca | 2 | evaluation | 0.1 ± 0 | 0 ± 0 | 1.50 ± 0.71 |" in table

    assert stub(grid, "--seeds=3", "--evaluate=4") == 0  # one seed more: nothing else runs again
    assert all(starts(workdir) == ["train", "evaluate"] for workdir in workdirs)
    assert len(list((tmp_path / "out").glob("*/seed=*"))) == 12


def test_a_point_that_breaks_says_why_and_stops_no_other(stub, tmp_path, capsys):
    assert stub("loss.alpha=3,4,-1,1") == 1
    said = capsys.readouterr().out
    assert "1 of 3: loss.alpha=3/seed=0 ...\nloss.alpha=3/seed=0: broken after " in said
    assert re.search(r"\n3 of 3: loss.alpha=1/seed=0 \.\.\.\n.*: done in [\d.]+ s\n", said)
    assert re.search(r"alpha=4/seed=0: broken after [\d.]+ s, about [\d.]+ s left\n", said)
    assert "broken loss.alpha=3/seed=0: error: alpha 3 diverges" in said
    assert "broken loss.alpha=4/seed=0: SIGTERM: saved after step 1 of 2" in said
    assert "broken loss.alpha=-1/seed=0: config.loss.alpha must be" in said
    assert "| 1 | 1 | training step 2 |" in (tmp_path / "out/table.md").read_text()

    assert stub("loss.alpha=4,1") == 0  # the same command goes on
    assert starts(tmp_path / "out/loss.alpha=4/seed=0") == ["train", "train"]
    assert starts(tmp_path / "out/loss.alpha=1/seed=0") == ["train"]


def test_points_share_a_cached_reference_that_is_made_once(stub, tmp_path):
    cached = ("--config.reference.kind=cached", "--config.model.init_from=somewhere")
    assert stub("loss.alpha=0.1,1", "--seeds=2", *cached) == 0
    (cache,) = (tmp_path / "out/reference").iterdir()
    assert starts(cache) == ["precompute"]
    assert stub("loss.alpha=0.1,1;data.max_response_len=8", *cached) == 0
    assert len(list((tmp_path / "out/reference").iterdir())) == 2
    assert stub("", "--seeds=2", "--config.reference.kind=cached") == 0  # random weights: by seed
    assert len(list((tmp_path / "out/reference").iterdir())) == 4


def test_a_workdir_of_another_config_is_refused_by_field(stub, tmp_path, capsys):
    workdir = tmp_path / "out/loss.alpha=1/seed=0"
    (workdir / "checkpoints" / "1").mkdir(parents=True)
    config, _ = parse_flags(["x", CONFIG, "--config.loss.alpha=1", "--config.optim.lr=0.5"])
    (workdir / "config.json").write_text(json.dumps(flatten(config)))
    assert stub("loss.alpha=1") == 1
    assert "optim.lr: 0.5 there, 5e-06 here" in capsys.readouterr().out


def test_a_damaged_run_is_named_and_stops_no_other(stub, tmp_path, capsys):
    assert stub("loss.alpha=1,2") == 0
    workdir = tmp_path / "out/loss.alpha=1/seed=0"
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write("\0\0\n")
    (workdir / "run.json").write_text('{"ste')
    assert stub("loss.alpha=1,2,3") == 1
    table = (tmp_path / "out/table.md").read_text()
    assert "| 2 | 1 | training step 2 |" in table
    assert starts(workdir) == ["train", "train"]  # which says what is wrong with run.json
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write("\0\0\n")
    assert stub("loss.alpha=1,2") == 1
    assert f"left out: {workdir}/metrics.jsonl is damaged (line 3)" in capsys.readouterr().out


def test_print_gives_a_line_for_every_point_that_is_left(stub, tmp_path, capsys):
    assert stub("loss.alpha=1") == 0
    capsys.readouterr()
    flags = ("--print", "--evaluate=8", "--seeds=2", "--config.optim.lr=1e-4")
    assert stub("config.algo=nca,infonca", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("train" in line and " && " in line and "--num_prompts=8" in line for line in lines)
    assert all("--config.optim.lr=1e-4" in line for line in lines)
    assert f"{CONFIG},algo=infonca" in lines[2] and "config.algo=infonca/seed=0" in lines[2]
    assert not (tmp_path / "out/config.algo=nca").exists()


def test_a_point_has_a_name_of_its_own_and_values_know_their_seed(stub, tmp_path, capsys):
    point = "--point=some pairs: loss.alpha=0.1;data.files=rows-{seed}.jsonl;config.k=4"
    assert stub("", point, "--seeds=2", "--evaluate=1", "--judge=length", "--text=x.txt") == 0
    assert starts(tmp_path / "out/some pairs/seed=1") == ["train", "evaluate"]
    assert "| some pairs | 2 | evaluation |" in (tmp_path / "out/table.md").read_text()
    capsys.readouterr()
    assert stub("", point, "--seeds=3", "--evaluate=1", "--judge=length", "--print") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "smoke,k=4 " in line and "--config.data.files=rows-2.jsonl" in line
    assert "--judge=length" in line and "--text" not in line


def test_checkpoints_of_a_point_that_is_evaluated_may_be_removed(stub, tmp_path):
    assert stub("loss.alpha=1", "--evaluate=1") == 0
    workdir = tmp_path / "out/loss.alpha=1/seed=0"
    shutil.rmtree(workdir / "checkpoints")
    assert stub("loss.alpha=1", "--evaluate=1") == 0
    assert starts(workdir) == ["train", "evaluate"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--point=nca"], "--point wants 'NAME: FIELD=VALUE"),
        (["--point=a/b: loss.alpha=1"], "--point wants 'NAME: FIELD=VALUE"),
        (["--grid=loss.alpha"], "--grid wants NAME=VALUE"),
        (["--grid=loss.alpha=1,,2"], "--grid wants NAME=VALUE"),
        (["--grid=loss.alpha=1,1"], "gives loss.alpha=1/seed=0 twice"),
        (["--jobs=0"], "--jobs=0 must be at least 1"),
        (["--out=gs://bucket/sweep"], "wants a path on a local disk"),
        (["--optim.lr=1"], "Unknown argument '--optim.lr=1'"),
    ],
)
def test_a_wrong_argument_is_named(stub, flags, said):
    with pytest.raises(UserError, match=said):
        stub("", *flags)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_waits_for_the_run_that_it_left_behind(stub, tmp_path):
    """kill -9 leaves the child alive; the next sweep must not start a second one beside it."""
    released, out = tmp_path / "released", tmp_path / "out"
    flags = [
        CONFIG,
        f"--out={out}",
        "--grid=loss.alpha=5",
        f"--config.log.wandb_project={released}",
    ]
    program = (
        "import sys; from experiments import sweep\n"
        f"sweep.nca_jax = lambda *x: [sys.executable, {str(tmp_path / 'stub.py')!r}, *x]\n"
        "sweep.write_page, run_tasks = lambda out: 0, sweep.run_tasks\n"
        "def run(*args, **more):\n"
        f"    open({str(tmp_path / 'began')!r}, 'a').close()\n"
        "    return run_tasks(*args, **more)\n"
        "sweep.run_tasks = run\n"
        f"sys.exit(sweep.main(['sweep', *{flags!r}]))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=env)

    workdir, first = out / "loss.alpha=5/seed=0", start()
    wait_for(lambda: (workdir / "run.json").exists())
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    (tmp_path / "began").unlink()
    second = start()
    wait_for((tmp_path / "began").exists)  # it has seen what there is to do
    released.touch()
    assert second.wait(timeout=60) == 0
    assert starts(workdir) == ["train"]
    assert [line["step"] for line in whole_lines(workdir / "metrics.jsonl")] == [1, 2]


def test_sigterm_stops_the_runs_and_the_same_command_goes_on(stub, tmp_path):
    workdir = tmp_path / "out/loss.alpha=5/seed=0"

    def stop_once_it_runs():
        wait_for(lambda: (workdir / "run.json").exists())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_it_runs).start()
    flag = f"--config.log.wandb_project={tmp_path / 'released'}"
    with pytest.raises(signals.Interrupted, match="SIGTERM"):
        stub("loss.alpha=5", flag)
    (tmp_path / "released").touch()
    assert stub("loss.alpha=5", flag) == 0
    assert starts(workdir) == ["train", "train"]


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [["nca"], pytest.param([*LOSSES], marks=pytest.mark.long)], ids=["nca", "every loss"]
)
def test_a_real_sweep_over_losses_trains_and_reports_each(tmp_path, names):
    pytest.importorskip("matplotlib")
    rows, out = write_records(tmp_path / "rows.jsonl"), tmp_path / "out"
    argv = [
        f"--config=configs/jsonl.py:files={rows},smoke",
        f"--out={out}",
        f"--grid=config.algo={','.join(names)}",
        "--config.steps=2",
        "--config.eval_every=0",
        "--config.log.tensorboard=False",
    ]
    env = os.environ | {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sweep", *argv],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = (out / "table.md").read_text()
    for name in names:
        workdir = out / f"config.algo={name}/seed=0"
        assert f"| {name} | 1 | training step 2 |" in table
        assert "train step 2 of 2" in (workdir / "train.log").read_text()
        reference = json.loads((workdir / "run.json").read_text())["reference"]
        assert (reference != "none") == ("ref_logps" in LOSSES[name].reads)
    assert "<svg" in (out / "report.html").read_text()
