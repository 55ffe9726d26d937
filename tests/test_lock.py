"""One run at a time in a folder, whichever way a run ends."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading

import memory_gcs
import pytest
from commands import ROOT

from nca_jax import precompute, train
from nca_jax.checks import UserError
from nca_jax.infra import distributed, lock
from nca_jax.infra.lock import held


def test_a_second_run_in_a_folder_is_refused_and_told_which_has_it(tmp_path):
    with held(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        held(tmp_path).__enter__()
    with held(tmp_path):
        pass


@pytest.mark.parametrize("command", [train, precompute])
def test_a_folder_that_is_held_is_refused_before_anything_in_it_is_read(tmp_path, command):
    (tmp_path / "config.json").write_text("{")
    argv = ["x", "--config=configs/jsonl.py:files=x.jsonl,smoke"]
    cached = ["--config.reference.kind=cached", f"--config.reference.cache={tmp_path}"]
    argv += [f"--workdir={tmp_path}"] if command is train else cached
    with held(tmp_path), pytest.raises(UserError, match=f"{tmp_path} is in use by process"):
        command.main(argv)


def test_a_killed_run_leaves_its_folder_free_and_its_children_do_not_keep_it(tmp_path):
    program = (
        "import subprocess, sys, time\nfrom pathlib import Path\n"
        "from nca_jax.infra.lock import held\n"
        f"with held(Path({str(tmp_path)!r})):\n"
        "    child = subprocess.Popen(['sleep', '60'], stdout=2, close_fds=False)\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(60)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    with pytest.raises(UserError, match=f"process {process.pid} "):
        held(tmp_path).__enter__()
    process.kill()
    process.communicate()
    with held(tmp_path):
        os.kill(child, signal.SIGKILL)


def test_a_folder_deleted_under_a_run_is_noticed(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with held(folder) as check:
        check()
        shutil.rmtree(folder)
        with pytest.raises(UserError, match=f"{folder} was deleted"):
            check()
        folder.mkdir()
        with held(folder), pytest.raises(UserError, match=f"{folder} was deleted or replaced"):
            check()


def taken_over(folder) -> None:
    """Starts one run in a folder, and another that takes it over."""
    with held(folder) as check_first:
        check_first()
        with held(folder) as check_second:
            check_second()
            with pytest.raises(UserError, match=f"taken over by process {os.getpid()} on "):
                check_first()
    assert not (folder / "owner").exists()


def test_where_nothing_can_be_locked_the_run_that_lost_its_folder_stops(
    tmp_path, monkeypatch, capsys
):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    taken_over(tmp_path)
    assert f"{tmp_path} is taken over from process {os.getpid()} on " in capsys.readouterr().out


def test_who_makes_what_others_want_too_is_waited_for(tmp_path, capsys):
    order = []

    def second():
        with lock.waited_for(tmp_path / "store.lock"):
            order.append("second")

    with lock.waited_for(tmp_path / "store.lock"):
        other = threading.Thread(target=second)
        other.start()
        other.join(timeout=0.2)
        order.append("first")
    other.join(timeout=10)
    assert order == ["first", "second"]
    assert f"waiting for another process that makes {tmp_path}/store" in capsys.readouterr().out


def test_on_gs_the_run_that_lost_its_folder_stops(monkeypatch):
    taken_over(memory_gcs.serve(monkeypatch) / "run")


def test_every_process_of_a_run_is_refused_where_the_first_is(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    monkeypatch.setattr(distributed, "gather", lambda mine: [b"it is in use", mine])
    with pytest.raises(UserError, match="it is in use"):
        held(tmp_path).__enter__()
    assert not list(tmp_path.iterdir())
