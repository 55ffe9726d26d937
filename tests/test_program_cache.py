"""Compiled programs are kept for the next start, where the user does not say otherwise."""

import os

import jax
import pytest

from nca_jax.infra.program_cache import HOUR, MAX_BYTES, OF_JAX, keep_programs

DIR = "jax_compilation_cache_dir"


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch, tmp_path):
    before = {name: jax.config.values[name] for name in (DIR, *OF_JAX)}
    for name in before:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update(DIR, None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache_up_to_a_limit(tmp_path):
    keep_programs()
    assert jax.config.values[DIR] == str(tmp_path / "nca_jax/compiled")
    assert jax.config.values["jax_compilation_cache_max_size"] == MAX_BYTES


def test_what_the_user_tells_jax_stays(monkeypatch):
    jax.config.update(DIR, "/elsewhere")
    keep_programs()
    assert jax.config.values[DIR] == "/elsewhere"

    jax.config.update(DIR, None)
    jax.config.update("jax_compilation_cache_max_size", 7)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "7")
    keep_programs()
    assert jax.config.values["jax_compilation_cache_max_size"] == 7


def test_without_a_place_to_write_nothing_is_kept(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_programs()
    assert jax.config.values[DIR] is None


def test_a_program_whose_writer_was_killed_is_removed(tmp_path):
    folder = tmp_path / "nca_jax/compiled"
    folder.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "killed-cache", "being_written-cache"):
        (folder / name).touch()
    for name in ("whole-cache", "killed-cache"):
        os.utime(folder / name, (0, os.stat(folder).st_mtime - HOUR - 1))
    keep_programs()
    assert {path.name for path in folder.iterdir()} == {
        "whole-cache", "whole-atime", "being_written-cache",
    }  # fmt: skip
