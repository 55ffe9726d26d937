"""Killed or told to stop at any moment and started again, a command ends as if it never was."""

import signal
from pathlib import Path

import pytest
from campaign import (
    Job,
    cache_result,
    files_result,
    finish,
    nca_jax,
    prepared_result,
    run_flags,
    run_result,
    start,
    stop_at_random,
    text_flags,
)
from commands import write_records
from old_run import OLD

GENTLE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RAW = Path("tests/data/old_run/rows.jsonl")


def train(tmp_path) -> Job:
    return Job(
        "train", lambda to: nca_jax("train", *run_flags(), f"--workdir={to}/run"),
        lambda to: run_result(to / "run"),
    )  # fmt: skip


def precompute(tmp_path) -> Job:
    records = tmp_path / "many.jsonl"
    records.write_text((OLD / "rows.jsonl").read_text() * 20)
    cached = ("--config.reference.kind=cached", "--config.data.eval_fraction=0")
    return Job(
        "precompute",
        lambda to: nca_jax(
            "precompute", *run_flags(records), *cached, "--config.eval_every=0",
            f"--config.reference.cache={to}/cache",
        ),
        lambda to: cache_result(to / "cache"),
    )  # fmt: skip


def sweep(tmp_path) -> Job:
    flags = [flag for flag in run_flags() if "lr=" not in flag]

    def command(to: Path) -> list[str]:
        name, *rest = nca_jax("train", *flags)[2:]
        return [
            *nca_jax("train")[:2], "experiments.sweep", *rest, f"--out={to}/sweep",
            "--grid=optim.lr=1e-2",
        ]  # fmt: skip

    def result(to: Path):
        return run_result(to / "sweep/optim.lr=1e-2/seed=0")

    return Job("sweep", command, result)


def export(tmp_path) -> Job:
    run = tmp_path / "trained"
    finish(start(nca_jax("train", *run_flags(), f"--workdir={run}")), "train")
    return Job(
        "export",
        # Its --out must not be there, or be empty: a command that is done is not done again.
        lambda to: ["bash", "-c", f"test -e {to}/hf || exec \"$@\"", "-",
                    *nca_jax("export", f"--workdir={run}", f"--out={to}/hf")],
        lambda to: files_result(to / "hf"),
    )  # fmt: skip


def prepare(tmp_path) -> Job:
    write_records(tmp_path / "train.jsonl", num_rows=2000)
    return Job(
        "prepare",
        lambda to: ["bash", "-c", f"test -e {to}/scored_jsonl/1.0.0 || exec \"$@\"", "-",
                    *nca_jax("prepare", "--name=scored_jsonl", f"--raw={tmp_path}/train.jsonl",
                             f"--out={to}")],
        lambda to: prepared_result(to),
    )  # fmt: skip


def generate(tmp_path) -> Job:
    records = write_records(tmp_path / "records.jsonl", num_rows=8)
    return Job(
        "generate",
        lambda to: nca_jax(
            "generate", *text_flags(records), f"--prompts={records}", f"--out={to}/out.jsonl"
        ),
        lambda to: (to / "out.jsonl").read_text(),
    )


def rounds(tmp_path) -> Job:
    records = write_records(tmp_path / "records.jsonl", num_rows=8)
    flags = [
        *(*text_flags(records), f"--prompts={records}", "--scorer=length", "--config.save_every=1"),
        *("--config.rounds.number=3", "--config.rounds.prompts=3", "--config.rounds.samples=2"),
        *("--config.rounds.steps=2", "--config.rounds.reference=previous", "--config.eval_every=2"),
    ]

    def result(to: Path):
        files = {path: x for path, x in files_result(to / "run/rounds").items() if ".json" in path}
        return files, run_result(to / "run", "tiny")

    return Job("rounds", lambda to: nca_jax("rounds", *flags, f"--workdir={to}/run"), result)


JOBS = (train, precompute, sweep, export, prepare, generate, rounds)
SLOW = (sweep, rounds)  # jobs that take several times as long as the others


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_a_command_killed_at_any_moment_ends_as_if_it_never_was(job, tmp_path, tries, seed, tally):
    tries = tries // 2 if job in SLOW else tries
    stop_at_random(
        job(tmp_path), tmp_path / "stops", [signal.SIGKILL], tries=tries, seed=seed, tally=tally
    )


@pytest.mark.parametrize("job", (train, precompute, generate), ids=lambda job: job.__name__)
def test_a_command_told_to_stop_ends_as_if_it_never_was(job, tmp_path, tries, seed, tally):
    stop_at_random(job(tmp_path), tmp_path / "stops", GENTLE, tries=tries, seed=seed, tally=tally)
