"""Errors that are nobody's slip are one line too; `test_mistakes` has the table of the others."""

import errno
import re
import subprocess
import sys

import jax
import pytest
from commands import ROOT, write_records

from nca_jax import checks, train


@pytest.fixture
def flags(tmp_path):
    rows = write_records(tmp_path / "rows.jsonl")
    return (
        f"--config=configs/jsonl.py:files={rows},smoke",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.rows=8",
    )


def test_a_prompt_that_does_not_fit_a_row_is_named_with_the_length_it_needs(fails, flags):
    short = ("--config.data.row_len=64", "--config.loss.logits_chunk=64")
    error = fails("train", *flags, *short)
    assert "rows.jsonl:" in error and "tokens of a row, but data.row_len is 64" in error


def test_a_config_field_that_nobody_reads_is_refused(fails, tmp_path):
    source = open("configs/jsonl.py").read()
    (tmp_path / "more.py").write_text(
        source.replace("    return c.lock()", "    c.depth = 3\n    return c")
    )
    error = fails(
        "train", f"--workdir={tmp_path}", f"--config={tmp_path / 'more.py'}:files=x,smoke"
    )
    assert "depth" in error and "does not read" in error


@pytest.mark.slow
def test_a_workdir_of_another_model_is_refused(fails, flags, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    train.main(["train", *flags, "--config.steps=1", "--config.eval_every=0"])
    error = fails("train", *flags, "--config.steps=1", "--config.model.name=tiny_moe")
    assert "model.name: 'tiny' there, 'tiny_moe' here" in error
    (run / "config.json").unlink()
    (run / "run.json").unlink()
    error = fails("train", *flags, "--config.steps=1", "--config.model.name=tiny_moe")
    assert "run/config.json is not there" in error
    out = f"--out={tmp_path / 'evaluation.json'}"
    error = fails("evaluate", *flags, "--config.model.name=tiny_moe", out)
    assert "is of another model" in error


def test_evaluate_without_a_checkpoint_and_generate_without_a_prompt_are_refused(
    fails, flags, tmp_path
):
    config, _, rows = flags
    workdir = f"--workdir={tmp_path / 'empty'}"
    assert "has no checkpoint" in fails("evaluate", config, rows, workdir)
    assert "or the --workdir of a run: " in fails("evaluate", workdir)
    (tmp_path / "prompts.jsonl").write_text('{"question": "a"}\n')
    prompts, out = f"--prompts={tmp_path / 'prompts.jsonl'}", f"--out={tmp_path / 'out.jsonl'}"
    assert "prompts.jsonl:1: wanted a 'prompt'" in fails("generate", config, rows, prompts, out)


@pytest.mark.slow
def test_an_export_without_a_checkpoint_or_into_a_full_folder_is_refused(fails, flags, tmp_path):
    workdir, out = f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"
    assert "has no config.json" in fails("export", workdir, out)
    assert "has no checkpoint" in fails("export", workdir, out, flags[0])
    assert "Give --out" in fails("export", workdir)
    train.main(["train", *flags, "--config.steps=1", "--config.eval_every=0"])
    assert "--dtype must be one of float32, bfloat16" in fails(
        "export", workdir, out, "--dtype=int8"
    )
    assert "is not an empty folder" in fails("export", workdir, f"--out={tmp_path}")
    assert "no checkpoint of step 7; it has those of [1]" in fails(
        "export", workdir, out, "--step=7"
    )
    assert "has no best checkpoint" in fails("export", workdir, out, "--step=best")
    (tmp_path / "run" / "config.json").unlink()
    assert "has no config.json" in fails("export", workdir, out)


@pytest.mark.slow
def test_a_damaged_checkpoint_stops_every_command_by_one_line(fails, flags, tmp_path):
    train.main(["train", *flags, "--config.steps=1", "--config.eval_every=0"])
    state = tmp_path / "run/checkpoints/1/default"
    for path in state.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-100])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    prompts, out = f"--prompts={tmp_path / 'prompts.jsonl'}", f"--out={tmp_path / 'out'}"
    said = f"{state} is damaged"
    assert said in fails("generate", *flags, prompts, out)
    assert said in fails("evaluate", *flags, out)
    assert said in fails("export", flags[1], out)
    flags += ("--config.steps=1", "--config.eval_every=0")
    assert f"No checkpoint is whole: {said}" in fails("train", *flags)
    assert said in fails("train", *flags, "--config.checkpoint.on_damage=stop")


# Disks


def failing(error: Exception):
    """Returns a command in which a library of storage meets `error`."""

    def main(argv):
        try:
            raise error
        except OSError as inner:
            raise ValueError("saving failed") from inner

    return main


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "what is written: No space left on dev"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "a/b: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a/b"), "a/b: Disk quota exceeded"),
        (OSError(errno.EFBIG, "File too large", "a/b"), "a/b: File too large"),
        (RuntimeError("Error writing x/d/1: No space left on device"), "x/d/1: No space left"),
    ],
)
def test_a_disk_that_refuses_is_one_line_whoever_says_so(fails, monkeypatch, error, said):
    monkeypatch.setattr(train, "main", failing(error))
    assert said in fails("train")


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch):
    assert checks._to_mend(FileNotFoundError(errno.ENOENT, "No such file", "a")) is None


# Memory


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nA"),
         "out of memory of a device (Out of memory allocating 9 bytes.)"),
        (MemoryError("Unable to allocate 8 EiB"), "of the host (Unable to allocate 8 EiB)"),
        (MemoryError(), "of the host (no more memory)"),
    ],
)  # fmt: skip
def test_memory_that_is_too_small_is_one_line_that_says_what_to_lower(
    fails, monkeypatch, error, said
):
    monkeypatch.setattr(train, "main", failing(error))
    line = fails("train")
    assert said in line
    for name in ("loss.logits_chunk", "data.rows", "row_len", "model.remat", "mesh.fsdp"):
        assert name in line


def test_other_errors_of_xla_keep_their_traceback():
    assert checks._to_mend(jax.errors.JaxRuntimeError("INTERNAL: RESOURCE")) is None


# Extras


def without_extras(program: str) -> str:
    """Runs a program where no library of `checks.EXTRAS` can be imported; returns its output."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({list(checks.EXTRAS)}))\n"
    command = [sys.executable, "-c", blocked + program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_every_command_starts_without_the_extras():
    found = {path.stem for path in (ROOT / "nca_jax").glob("*.py")}
    commands = found - {"__init__", "harness"}  # which lm_eval imports once it is asked for tasks
    assert "prepare" in commands
    program = "import importlib\n" + "".join(
        f"importlib.import_module('nca_jax.{name}')\n" for name in commands
    )
    assert without_extras(program + "print('started')") == "started\n"


def test_a_library_of_an_extra_that_lacks_is_named_with_the_extra(fails, monkeypatch, tmp_path):
    for library in checks.EXTRAS:
        monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "nca_jax.models.formats.gguf", raising=False)
    (tmp_path / "model.gguf").touch()
    (tmp_path / "tfds" / "x" / "1.0.0").mkdir(parents=True)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    rows = write_records(tmp_path / "rows.jsonl")
    config = "--config=configs/jsonl.py:smoke"
    tfds, gguf = "pip install 'nca_jax[tfds]'", "pip install 'nca_jax[gguf]'"
    assert tfds in fails("prepare", "--name=scored_jsonl", f"--raw={rows}")
    assert tfds in fails("inspect", f"{config},files=tfds:x:train", "--config.data.rows=8")
    init_from = f"init_from={tmp_path / 'model.gguf'}"
    assert gguf in fails("inspect", f"--config=configs/jsonl.py:files={rows},{init_from}")


def test_every_library_of_an_extra_is_in_setup_py():
    setup = (ROOT / "setup.py").read_text().replace("-", "_")
    for library, extra in checks.EXTRAS.items():
        name = {"sklearn": "scikit_learn"}.get(library, library)
        assert f'"{extra}":' in setup and re.search(rf'"{name}(\[\w+\])?[>=]=', setup)
