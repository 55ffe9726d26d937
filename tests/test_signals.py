"""Ctrl-C and its like: one line and a status; a run that can save does; readers may go away."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, command, finish, metric_lines, write_records

# A command by `run_main`, without JAX. It says when it has begun.
PROGRAM = """
import hashlib, sys, time
from nca_jax import checks, signals

def main(argv):
    if argv[1] == "cleans":
        try:
            print("begun", flush=True)
            time.sleep(60)
        finally:
            time.sleep(0.3)
            print("cleaned")
    elif argv[1] == "native":
        print("begun", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    elif argv[1] == "saves":
        received = []
        with signals.caught(received.append):
            print("begun", flush=True)
            while not received:
                time.sleep(0.01)
            print("asked", flush=True)
            time.sleep(float(argv[2]))
        print("saved")
    elif argv[1] == "prints":
        print("begun", flush=True)
        for i in range(100_000):
            print(i)
        print("all printed", file=sys.stderr)

checks.run_main(main, interrupted="as was said")
"""


def start(*args: str, **how) -> subprocess.Popen:
    """Starts the program, and returns once it has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *args],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "begun\n"
    time.sleep(0.2)  # it is still in that print
    return process


def ends(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_interrupted_cleans_up_and_says_so_in_one_line(number):
    process = start("cleans")
    process.send_signal(number)
    process.send_signal(number)  # at once: it is the same stop, as `timeout` sends it
    said = f"interrupted by {number.name}: as was said\n"
    assert ends(process) == (128 + number, "cleaned\n", said)


def test_native_code_that_does_not_return_is_ended_by_a_second_signal():
    process = start("native")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said = "interrupted by SIGINT: stopped at once\n"
    assert ends(process) == (130, "", said)


def test_what_saves_is_asked_once_and_ended_by_a_second_signal():
    process = start("saves", "0.5")
    process.send_signal(signal.SIGINT)
    assert ends(process) == (0, "asked\nsaved\n", "")
    process = start("saves", "60")
    process.send_signal(signal.SIGINT)
    assert process.stdout and process.stdout.readline() == "asked\n"
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert ends(process)[0] in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which is inherited
    process = start("saves", "0")
    signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert ends(process)[0] == 0


def test_a_reader_that_goes_away_ends_no_command():
    process = start("prints")
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == "all printed\n"
    assert process.wait() == 0


def test_output_that_a_full_disk_refuses_is_one_line():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, "prints"],
        cwd=ROOT, text=True, stdout=open("/dev/full", "w"), stderr=subprocess.PIPE,
    )  # fmt: skip
    assert run.returncode == 2
    assert re.fullmatch(r"error: .*No space left on device.*\n", run.stderr)


def test_a_command_that_still_imports_is_ended_with_a_line():
    process = command("train")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    status, _, err = ends(process)
    assert status == 130 and re.fullmatch(r"interrupted by SIGINT: .*\n", err)


# Runs


def flags(folder: Path) -> list[str]:
    rows = write_records(folder / "rows.jsonl")
    return [
        f"--config=configs/jsonl.py:files={rows},smoke",
        "--config.data.row_len=256",
        "--config.optim.lr=1e-3",
    ]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_ctrl_c_saves_says_so_and_the_same_command_goes_on(tmp_path):
    workdir = tmp_path / "run"
    run = [*flags(tmp_path), f"--workdir={workdir}", "--config.steps=200", "--config.eval_every=0"]
    process = command("train", *run)
    wait_for(workdir / "metrics.jsonl", process)
    assert process.stdout
    process.stdout.close()  # as by `| head`
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 0
    assert process.stderr and "Traceback" not in process.stderr.read()
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert 0 < saved < 200
    assert f"resumed after step {saved}" in finish(command("train", *run))
    assert [line["step"] for line in metric_lines(workdir, "train")] == list(range(1, 201))


@pytest.mark.slow
@pytest.mark.long
def test_generate_stopped_at_any_moment_goes_on_to_the_same_responses(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {i}:"}) + "\n" for i in range(64)))
    small = ["--config.generate.batch_size=1", "--config.generate.max_new_tokens=64"]
    given = [*flags(tmp_path), *small, f"--prompts={prompts}"]
    finish(command("generate", *given, f"--out={tmp_path / 'whole.jsonl'}"))
    out, stops = tmp_path / "out.jsonl", 0
    pieces = tmp_path / "out.jsonl.pieces"
    for number in (signal.SIGINT, signal.SIGKILL):
        before = len(list(pieces.glob("*.jsonl")))
        process = command("generate", *given, f"--out={out}")
        while process.poll() is None and len(list(pieces.glob("*.jsonl"))) < before + 3:
            time.sleep(0.01)
        process.send_signal(number)
        status, _, err = ends(process)
        assert "Traceback" not in err and not out.exists()
        assert status == (130 if number == signal.SIGINT else -number)
        stops += 1
    said = finish(command("generate", *given, f"--out={out}"))
    assert re.search(r"goes on after [1-9]\d* of 64 prompts", said)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not pieces.exists() and stops == 2


@pytest.mark.slow
@pytest.mark.long
def test_no_command_needs_a_home(tmp_path):
    env = {"HOME": "/proc/nothing", "XDG_CACHE_HOME": "", "TMPDIR": str(tmp_path)}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Say"}\n')
    given = flags(tmp_path)
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        finish(command("inspect", *given))
        finish(command("train", *given, f"--workdir={tmp_path / 'run'}", "--config.steps=1"))
        generate = ["--config.generate.max_new_tokens=4", f"--prompts={prompts}"]
        finish(command("generate", *given, *generate, f"--out={tmp_path / 'out.jsonl'}"))
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.mark.slow
def test_a_save_that_the_disk_refuses_is_one_line_and_the_same_command_goes_on(tmp_path):
    workdir = tmp_path / "run"
    run = [*flags(tmp_path), f"--workdir={workdir}", "--config.steps=4", "--config.save_every=2"]
    run += ["--config.log.tensorboard=False", "--config.data.rows=8"]
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}

    def train(**how) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", "nca_jax.train", *run]
        return subprocess.run(words, cwd=ROOT, env=env, text=True, capture_output=True, **how)

    limit = (100_000, 100_000)
    refused = train(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert refused.returncode == 2
    assert re.fullmatch(r"error: .*File too large.*\n", refused.stderr)
    assert list((workdir / "checkpoints").iterdir()) == []
    assert train().returncode == 0
    assert [line["step"] for line in metric_lines(workdir, "train")] == [1, 2, 3, 4]
