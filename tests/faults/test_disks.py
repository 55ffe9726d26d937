"""A disk that is full or read-only ends a command with one line; with room made it goes on."""

import os
import random
import subprocess
from pathlib import Path

import pytest
from campaign import is_one_line, nca_jax, start
from test_stops import export, generate, precompute, prepare, train

JOBS = (train, precompute, generate, export, prepare)


def mount(folder: Path, options: str) -> None:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder])
    if done.returncode:
        pytest.skip("mounting a disk wants root")


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, to be mounted by `mount`."""
    folder = tmp_path / "disk"
    yield folder
    subprocess.run(["umount", "-q", folder])


def used(folder: Path) -> int:
    """Bytes that files of a folder take on its disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk wants root")
@pytest.mark.parametrize("make", JOBS, ids=lambda job: job.__name__)
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_once_there_is_room(
    make, tmp_path, disk, tries, seed, tally
):
    job = make(tmp_path)
    rng = random.Random(f"{job.name} {seed}")
    mount(disk, "size=256m")
    process = start(job.command(disk))
    assert process.wait() == 0, process.stderr.read()
    want, needed = job.result(disk), used(disk)
    subprocess.run(["umount", disk], check=True)
    what = f"full disk in {job.name}"
    for _ in range(max(1, tries // 5)):
        mount(disk, f"size={4096 * max(1, round(rng.uniform(0, 1) * needed / 4096))}")
        process = start(job.command(disk))
        _, err = process.communicate()
        is_refused = process.returncode == 2 and is_one_line(err)
        if process.returncode and not is_refused:
            tally.lost(what, f"status {process.returncode}: {err}")
        subprocess.run(["mount", "-o", "remount,size=256m", disk], check=True)
        if is_refused:
            process = start(job.command(disk))
            _, err = process.communicate()
            if process.returncode:
                tally.lost(what, f"with room: {err}")
        if job.result(disk) != want:
            tally.lost(what, "other numbers")
        tally.refused(what) if is_refused else tally.survived(what)
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk wants root")
@pytest.mark.parametrize("make", JOBS, ids=lambda job: job.__name__)
def test_a_read_only_disk_is_refused_in_one_line(make, tmp_path, disk, tally):
    job = make(tmp_path)
    mount(disk, "size=256m,ro")
    process = start(job.command(disk))
    _, err = process.communicate()
    if process.returncode == 2 and is_one_line(err):
        tally.refused(f"read-only disk in {job.name}")
    else:
        tally.lost(f"read-only disk in {job.name}", f"status {process.returncode}: {err}")


def test_no_room_for_a_report_names_the_place(tmp_path, tally):
    """A report that cannot be written says where."""
    command = nca_jax("x")[:2] + ["experiments.report", str(tmp_path), "--out=/dev/null/x.html"]
    process = start(command)
    _, err = process.communicate()
    assert process.returncode == 2 and is_one_line(err), err
    tally.refused("no place for a report")
