"""A long run on many records holds no more at its end than near its beginning."""

import os
import tempfile
from pathlib import Path

import jax
from campaign import run_flags
from commands import metric_lines
from helpers import id_record, write

from nca_jax import build, train
from nca_jax.fit import fit
from nca_jax.infra.mesh import make_mesh


def held() -> tuple[int, int, int]:
    """Bytes in memory, open files, and entries of the folder of temporary files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(os.listdir("/proc/self/fd"))
    return pages * os.sysconf("SC_PAGE_SIZE"), files, len(os.listdir(tempfile.gettempdir()))


def record(i: int, first: int) -> dict:
    """Returns a record whose prompt is of its number alone, in ids below 60."""
    prompt = [first, 3 + i % 50, 3 + i // 50 % 50, 3 + i // 2500]
    return id_record(i % 5) | {"prompt_ids": prompt}


def test_memory_files_and_temporary_folders_stay_flat(tmp_path, monkeypatch, tries, tally):
    num_records, num_heldout, steps = 200 * tries, 10 * tries, 20 * tries
    records = write(tmp_path / "records.jsonl", [record(i, 1) for i in range(num_records)])
    heldout = write(tmp_path / "heldout.jsonl", [record(i, 2) for i in range(num_heldout)])
    monkeypatch.setattr(build, "make_mesh", lambda sizes, _: make_mesh(sizes, jax.devices()[:1]))
    seen = []

    def watched(*args, asked_to_stop, **kwargs):
        def ask() -> bool:
            seen.append(held())
            return asked_to_stop()

        return fit(*args, asked_to_stop=ask, **kwargs)

    monkeypatch.setattr(train, "fit", watched)
    flags = [flag for flag in run_flags(records) if "eval_fraction" not in flag]
    every = steps // 10
    train.main([
        "train", *flags, f"--workdir={tmp_path}/run", f"--config.data.eval_files={heldout}",
        "--config.data.eval_fraction=0", f"--config.steps={steps}", "--config.optim.lr=1e-3",
        f"--config.save_every={every}", f"--config.eval_every={every}",
        "--config.log.tensorboard=True",
    ])  # fmt: skip
    early, late = seen[2 * every + 1], seen[-1]
    assert late[0] < early[0] + 50e6, f"memory from {early[0] / 1e6} to {late[0] / 1e6} MB"
    assert late[1] <= early[1] + 2, f"open files from {early[1]} to {late[1]}"
    assert late[2] <= early[2] + 2, f"temporary files from {early[2]} to {late[2]}"
    assert len(metric_lines(tmp_path / "run", "train")) == steps
    tally.survived(f"{steps} steps on {num_records} records, {num_heldout} held out")
