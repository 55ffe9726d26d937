"""Every test runs on CPU with 8 virtual devices, offline, and refuses silent rank promotion.

Programs of tiny models take far longer to compile than to run. So LLVM's expensive passes are off,
and a program that one test has compiled is there for the others, the commands that they start
included: what is tested is the same, since the compiled program is that of the same key.
"""

import importlib
import os
from pathlib import Path

from commands import QUICK

COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "compiled"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import jax  # noqa: E402  (after the flags that it reads)
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def fails(monkeypatch, capsys):
    """Returns a function that runs a command as `python -m` does, and gives its error line."""

    from nca_jax import checks

    def run(name: str, *flags: str) -> str:
        def exit_with(status):
            raise SystemExit(status)

        monkeypatch.setattr("sys.argv", [name, *flags])
        monkeypatch.setattr("os._exit", exit_with)
        monkeypatch.setattr("nca_jax.signals.watch", lambda: None)  # of pytest itself
        monkeypatch.setattr(checks, "_hear_threads", lambda: None)
        with pytest.raises(SystemExit) as stopped:
            checks.run_main(importlib.import_module(f"nca_jax.{name}").main)
        said = capsys.readouterr().err
        error = said.strip().splitlines()[-1]
        assert stopped.value.code == 2 and "Traceback" not in said
        assert error.startswith("error: ")
        return error

    return run


@pytest.fixture
def use_devices(monkeypatch):
    """Returns a function that makes these of the 8 devices, in this order, all there are."""

    from nca_jax import build
    from nca_jax.infra.mesh import make_mesh

    def use(*order: int) -> None:
        chosen = [jax.devices()[i] for i in order]
        monkeypatch.setattr(build, "make_mesh", lambda sizes, _: make_mesh(sizes, chosen))

    return use


@pytest.fixture
def uncached():
    """Without the compile cache: of what comes from it a compiler writes nothing."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
