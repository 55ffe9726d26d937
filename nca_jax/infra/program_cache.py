"""Compiled programs, kept on disk for the next start by JAX's persistent compilation cache.

They are found again by what was compiled, with which compiler and options and for which devices. An
environment variable of JAX's own decides otherwise: JAX_COMPILATION_CACHE_DIR names another place,
on gs:// too, JAX_COMPILATION_CACHE_MAX_SIZE another limit, and JAX_ENABLE_COMPILATION_CACHE=false
keeps none.
"""

import contextlib
import os
import time
from pathlib import Path

import jax

MAX_BYTES = 4 * 2**30  # what was used longest ago goes first
LEAST_SECONDS = 0.2  # a program that compiles faster is not kept
OF_JAX = {  # what is set here, unless the user has
    "jax_compilation_cache_max_size": MAX_BYTES,
    "jax_persistent_cache_min_compile_time_secs": LEAST_SECONDS,
}
HOUR = 3600  # no program takes as long to write


def keep_programs() -> None:
    """Makes JAX keep what it compiles from now on in ~/.cache/nca_jax/compiled, by default.

    Nothing is kept where that folder cannot be written.
    """
    told = jax.config.values
    if told["jax_compilation_cache_dir"] or not told["jax_enable_compilation_cache"]:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nca_jax/compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _drop_unfinished(folder)
        is_ours = os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return
    if is_ours:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        for name, value in OF_JAX.items():
            if name.upper() not in os.environ:
                jax.config.update(name, value)


def _drop_unfinished(folder: Path) -> None:
    """Removes programs whose writer was killed: JAX writes NAME-cache, then NAME-atime beside it.

    It would neither write such a program anew nor make room past it.
    """
    for program in folder.glob("*-cache"):
        is_whole = Path(f"{str(program).removesuffix('-cache')}-atime").exists()
        if not is_whole and time.time() - program.stat().st_mtime > HOUR:
            with contextlib.suppress(FileNotFoundError):  # another start was first
                program.unlink()
