"""Several processes are one run: the same numbers whatever their number, and all stop together."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import command, finish, launch, metric_lines, write_records
from jax.experimental import multihost_utils
from safetensors.numpy import load_file
from test_readme import write_chat_model

from experiments.launch import local
from nca_jax import build, score
from nca_jax.checks import UserError
from nca_jax.flags import parse_flags
from nca_jax.infra import distributed
from nca_jax.infra.steps import saved_step

STEPS = 24


def shared_flags(rows: Path) -> list[str]:
    return [
        f"--config=configs/jsonl.py:files={rows},smoke",
        "--config.data.row_len=256",
        "--config.data.rows=4",
        "--config.data.eval_fraction=0.2",
    ]


def train_flags(workdir: Path, rows: Path, steps: int) -> list[str]:
    return [
        *shared_flags(rows),
        f"--workdir={workdir}",
        f"--config.steps={steps}",
        "--config.optim.lr=1e-4",
        f"--config.save_every={min(steps, 4)}",
        f"--config.eval_every={min(steps, 8)}",
        "--config.log.tensorboard=False",
    ]


def assert_same_metrics(got: Path, want: Path) -> None:
    """Every line, every name, to 1e-5 of the value (and of 1, near 0)."""
    for a, b in zip(metric_lines(got), metric_lines(want), strict=True):
        assert a.keys() == b.keys()
        assert (a["step"], a.pop("split")) == (b["step"], b.pop("split"))
        for name in a:
            # Differences of sums of hundreds of nats, whose float32 neighbours are 3e-5 apart.
            is_difference = "logratio" in name or "drift" in name
            near_zero = 1e-4 if is_difference else 1e-5
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=near_zero), name


def of_launcher(launcher: subprocess.Popen) -> dict[int, int]:
    """Returns {JAX_PROCESS_ID: pid} of the processes that a launcher has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        if parent == launcher.pid:
            ids = [v for v in variables if v.startswith(b"JAX_PROCESS_ID=")]
            found[int(ids[0].split(b"=")[1])] = int(folder.name)
    return found


def wait_for_checkpoint(workdir: Path, step: int, launcher: subprocess.Popen) -> None:
    while not (workdir / "checkpoints" / str(step)).exists():
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, rows):
    """The workdir of one process with two devices that was never stopped."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(command("train", *train_flags(workdir, rows, STEPS), devices=2))
    return workdir


@pytest.mark.slow
def test_two_processes_have_the_metrics_of_one(tmp_path, rows):
    one, two = tmp_path / "one", tmp_path / "two"
    alone = command("train", *train_flags(one, rows, 3), devices=2)
    out = finish(launch("train", *train_flags(two, rows, 3), "--profile=2:3", processes=2))
    finish(alone)
    assert out.count("train step 3 ") == 1  # one of them speaks
    assert_same_metrics(two, one)
    assert saved_step(two) == 3
    assert len(list(two.rglob("*.xplane.pb"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", ["fsdp=4", *(pytest.param(x, marks=pytest.mark.long) for x in ("data=4", "tensor=2"))]
)
def test_four_processes_have_the_metrics_of_one(tmp_path, rows, mesh):
    one, four = tmp_path / "one", tmp_path / "four"
    sizes = ["--config.mesh.fsdp=1", "--config.mesh.data=-1", f"--config.mesh.{mesh}"]
    finish(command("train", *train_flags(one, rows, 3), *sizes, devices=4))
    finish(launch("train", *train_flags(four, rows, 3), *sizes, processes=4))
    assert_same_metrics(four, one)


@pytest.mark.slow
@pytest.mark.long
def test_three_processes_over_which_the_rows_divide_have_the_metrics_of_one(tmp_path, rows):
    one, many = tmp_path / "one", tmp_path / "many"
    sizes = ["--config.mesh.fsdp=1", "--config.mesh.data=-1", "--config.data.rows=24"]
    finish(command("train", *train_flags(one, rows, 3), *sizes))
    finish(launch("train", *train_flags(many, rows, 3), *sizes, processes=3))
    assert_same_metrics(many, one)


@pytest.mark.slow
def test_a_number_of_processes_over_which_the_rows_do_not_divide_is_refused_by_name(tmp_path, rows):
    sizes = ["--config.mesh.fsdp=1", "--config.mesh.data=-1"]
    launcher = launch("train", *train_flags(tmp_path / "run", rows, 3), *sizes, processes=3)
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 2
    assert "4 data.rows over mesh.data * mesh.fsdp * mesh.expert = 3 does not divide" in err
    assert err.count("launch: ") == 1
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("by", ["generate", "score"])
def test_a_reward_model_over_two_processes_scores_as_by_one(tmp_path, rows, by):
    policy, scorer = tmp_path / "policy", f"reward_model:{tmp_path / 'rm'}"
    write_chat_model(policy)
    write_chat_model(tmp_path / "rm", num_labels=1)
    two, one = tmp_path / "two.jsonl", tmp_path / "one.jsonl"
    flags = [f"--rows={rows}", f"--scorer={scorer}"]
    if by == "generate":
        flags = [f"--config=configs/jsonl.py:files=x,init_from={policy}", f"--prompts={rows}"]
        small = (f"scorer={scorer}", "num_samples=2", "max_new_tokens=4")
        flags += [f"--config.generate.{flag}" for flag in small]
    finish(launch(by, *flags, f"--out={two}", processes=2))
    score.main(["score", f"--rows={two}", f"--out={one}", f"--scorer={scorer}"])
    found, wanted = (
        [json.loads(line)["scores"] for line in file.read_text().splitlines()]
        for file in (two, one)
    )
    assert len(found) == 24
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_when_one_is_killed_all_stop_and_one_process_goes_on(tmp_path, rows, alone, victim):
    workdir = tmp_path / "run"
    flags = train_flags(workdir, rows, STEPS)
    launcher = launch("train", *flags, processes=2)
    wait_for_checkpoint(workdir, 4, launcher)
    pids = of_launcher(launcher)
    os.kill(pids[victim], signal.SIGKILL)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    said = [line for line in err.splitlines() if line.startswith("launch:")]
    assert len(said) == 1
    assert f"process {victim} of 2 ended with signal SIGKILL" in said[0]
    assert "the others stopped too" in said[0]

    saved = saved_step(workdir)
    assert saved < STEPS
    out = finish(command("train", *flags, devices=2))
    assert f"resumed after step {saved} " in out
    assert_same_metrics(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_when_one_hangs_the_others_stop_within_the_limit(tmp_path, rows, victim):
    workdir = tmp_path / "run"
    flags = train_flags(workdir, rows, 3000)
    launcher = launch("train", *flags, "--host_timeout=5", processes=2)
    wait_for_checkpoint(workdir, 4, launcher)
    pids = of_launcher(launcher)
    os.kill(pids[victim], signal.SIGSTOP)
    end = time.monotonic() + 60
    while Path(f"/proc/{pids[1 - victim]}").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    os.kill(pids[victim], signal.SIGKILL)  # a launcher would give it a minute
    _, err = launcher.communicate(timeout=60)
    assert f"launch: process {1 - victim} of 2 ended with signal SIGABRT" in err


@pytest.mark.slow
def test_ctrl_c_at_the_launcher_saves_once_on_all(tmp_path, rows):
    workdir = tmp_path / "run"
    launcher = launch("train", *train_flags(workdir, rows, 3000), processes=2)
    wait_for_checkpoint(workdir, 4, launcher)
    launcher.send_signal(signal.SIGINT)
    out = finish(launcher)
    assert f"SIGINT: saved after step {saved_step(workdir)} of 3000" in out


@pytest.mark.slow
def test_sigterm_to_one_saves_on_all_and_another_number_of_processes_goes_on(tmp_path, rows, alone):
    workdir = tmp_path / "run"
    flags = train_flags(workdir, rows, STEPS)
    launcher = launch("train", *flags, processes=2)
    wait_for_checkpoint(workdir, 4, launcher)
    os.kill(of_launcher(launcher)[1], signal.SIGTERM)
    out = finish(launcher)
    saved = saved_step(workdir)
    assert f"SIGTERM: saved after step {saved} of {STEPS}" in out
    assert f"resumed after step {saved} " in finish(launch("train", *flags, processes=4))
    assert_same_metrics(workdir, alone)


@pytest.mark.slow
def test_precompute_evaluate_and_generate_give_what_one_process_gives(tmp_path, rows):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {i}:"}) + "\n" for i in range(5)))
    shared = [*shared_flags(rows), "--config.generate.max_new_tokens=8"]
    for name, run in (
        ("one", lambda *flags: command(*flags, devices=2)),
        ("two", lambda *flags: launch(*flags, processes=2)),
    ):
        folder = tmp_path / name
        cache = ("--config.reference.kind=cached", f"--config.reference.cache={folder}/cache")
        finish(run("precompute", *shared, *cache))
        finish(run("evaluate", *shared, f"--out={folder}/evaluation.json", "--num_prompts=4"))
        finish(run("generate", *shared, f"--prompts={prompts}", f"--out={folder}/out.jsonl"))
    one, two = tmp_path / "one", tmp_path / "two"
    assert (two / "out.jsonl").read_text() == (one / "out.jsonl").read_text()
    got, want = (json.loads((x / "evaluation.json").read_text()) for x in (two, one))
    assert got["samples"] == want["samples"]
    assert got["metrics"] == pytest.approx(want["metrics"], rel=1e-5, abs=1e-5)
    got, want = ({p.name: p for p in (x / "cache").iterdir()} for x in (two, one))
    assert got.keys() == want.keys()
    for name in ("fingerprint.json", "complete.json"):
        assert got[name].read_text() == want[name].read_text()
    for name in (name for name in want if name.startswith("part-")):
        a, b = load_file(got[name]), load_file(want[name])
        assert (a["keys"] == b["keys"]).all()
        assert a["logps"] == pytest.approx(b["logps"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_rounds_of_two_processes_are_those_of_one(tmp_path, rows):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me {i}:"}) + "\n" for i in range(8)))
    flags = [
        *shared_flags(rows),
        *(f"--prompts={prompts}", "--scorer=length", "--config.log.tensorboard=False"),
        *("--config.rounds.number=2", "--config.rounds.prompts=4", "--config.rounds.steps=1"),
        *("--config.rounds.reference=previous", "--config.generate.max_new_tokens=8"),
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    finish(command("rounds", *flags, f"--workdir={one}", devices=2))
    finish(launch("rounds", *flags, f"--workdir={two}", processes=2))
    assert_same_metrics(two, one)
    for number in (1, 2):
        got, want = (folder / "rounds" / str(number) / "rollouts.jsonl" for folder in (two, one))
        assert got.read_text() == want.read_text()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_PROCESS_ID": "0"}, "set, but not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "localhost:1",
                "JAX_NUM_PROCESSES": "two",
                "JAX_PROCESS_ID": "0",
            },
            "JAX_NUM_PROCESSES='two'; wanted a number",
        ),
    ],
)
def test_variables_that_do_not_say_where_the_others_are_are_refused(
    monkeypatch, variables, message
):
    set_only(monkeypatch, variables)
    with pytest.raises(UserError, match=message):
        distributed.together(lambda argv: 0)([])


def set_only(monkeypatch, variables: dict[str, str]) -> None:
    """Sets environment variables, and unsets all others that say where processes are."""
    for name in (*distributed.VARIABLES, *distributed.OF_LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
        {"SLURM_PROCID": "1"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_SIZE": "2"},
    ],
)
def test_one_of_several_processes_that_cannot_find_the_others_is_refused(monkeypatch, variables):
    monkeypatch.setattr(distributed, "_has_tpu", lambda: False)
    set_only(monkeypatch, variables)
    with pytest.raises(UserError) as caught:
        distributed.together(lambda argv: 0)([])
    said = {name: f"{name}={value}" for name, value in variables.items() if value != "0"}
    assert str(caught.value).startswith(", ".join(said.values()) + ": ")
    assert all(name in str(caught.value) for name in distributed.VARIABLES)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "JAX_NUM_PROCESSES": "1"},
    ],
)
def test_a_process_that_is_alone_or_is_said_to_be_runs(monkeypatch, variables):
    monkeypatch.setattr(distributed, "_has_tpu", lambda: False)
    set_only(monkeypatch, variables)
    assert distributed.together(lambda argv: len(argv))(["a", "b"]) == 2


def test_what_says_nothing_is_killed_and_named(monkeypatch):
    monkeypatch.setattr(local, "GRACE", 0.2)
    commands = (["true"], ["sleep", "60"])
    assert local.wait_or_kill([subprocess.Popen(command) for command in commands]) == [1]


@pytest.mark.parametrize(
    ("argv", "seconds", "rest"),
    [
        (["x", "--a"], 40, ["x", "--a"]),
        (["x", "--host_timeout=7", "--a"], 7, ["x", "--a"]),
    ],
)
def test_how_long_a_process_may_say_nothing_is_a_flag(argv, seconds, rest):
    assert distributed._host_timeout(argv) == (seconds, rest)


@pytest.mark.parametrize("value", ["0", "soon", "-1", "1.5"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(value):
    with pytest.raises(UserError, match="--host_timeout"):
        distributed.together(lambda argv: 0)(["x", f"--host_timeout={value}"])


@pytest.mark.parametrize("what", ["config", "code", "JAX"])
def test_a_start_with_another_config_code_or_jax_is_refused_by_name(monkeypatch, what):
    def gather(mine):  # of two processes, the second of which differs in one thing
        asked.append(None)
        is_other = ("config", "code", "JAX")[len(asked) - 1] == what
        return np.stack([mine, mine + is_other])

    asked = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    config, _ = parse_flags(["x", "--config=configs/jsonl.py:files=x.jsonl,smoke"])
    with pytest.raises(UserError, match=rf"processes \[1\] do not have the same {what};"):
        build.build(config)


def gathered_by(num_processes: int):
    """Stands for `process_allgather` among processes that all give the same, in JAX's integers."""
    return lambda x: np.asarray(jnp.stack([jnp.asarray(x)] * num_processes))


@pytest.mark.parametrize("size", [0, 1, 2**31 - 1, 2**31, 3 * 2**30, 2**40 + 5])
def test_sizes_beyond_two_gib_are_gathered_whole(monkeypatch, size):
    monkeypatch.setattr(multihost_utils, "process_allgather", gathered_by(3))
    assert distributed._sizes(size) == [size] * 3


@pytest.mark.parametrize("mine", [b"", b"abc", bytes(range(256))])
def test_the_bytes_of_every_process_are_gathered_in_pieces(monkeypatch, mine):
    assert distributed.gather(mine) == [mine]  # alone
    monkeypatch.setattr(distributed, "PIECE", 100)
    monkeypatch.setattr(multihost_utils, "process_allgather", gathered_by(2))
    assert distributed.gather(mine) == [mine, mine]
