"""What an import costs, and how the commands are found and explain themselves."""

import ast
import importlib
import inspect
import re
import subprocess
import sys

import pytest

from nca_jax import __main__
from nca_jax.checks import run_main
from nca_jax.infra.distributed import together

BLOCKED = (
    "tensorflow_datasets",
    "grain",
    "orbax",
    "transformers",
    "absl",
    "ml_collections",
    "flax",
    "optax",
    "safetensors",
    "tqdm",
)
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed", name=name)

sys.meta_path.insert(0, Blocked())
"""
COMMAND = (sys.executable, "-m", "nca_jax")
USE_A_LOSS = """
import jax.numpy as jnp
import nca_jax
losses = nca_jax.losses
r, p = jnp.zeros((1, 4)), jnp.full((1, 4), 0.25)
assert abs(float(losses.nca(r, p)[0]) - 2 * 0.6931472) < 1e-6
ones = jnp.ones((1, 4))
given = losses.Responses(ones, ones, ones, ones, ones > 0)
assert float(losses.LOSSES["infonca"].per_prompt(given, {"alpha": 1.0, "beta": 0.1})[0]) > 0
assert nca_jax.metrics.alignment_metrics
"""


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_a_loss_needs_none_of_the_libraries_that_training_needs():
    done = python(BLOCK + USE_A_LOSS)
    assert done.returncode == 0, done.stderr


def test_the_package_itself_imports_neither_jax_nor_anything_heavy():
    heavy = ("jax", *BLOCKED)
    code = f"import sys, nca_jax; print([x for x in {heavy!r} if x in sys.modules], dir(nca_jax))"
    said = python(code).stdout
    assert said.startswith("[]")
    assert all(name in said for name in ("losses", "metrics", "Model", "fit", "rollout"))


def test_a_name_that_is_not_there_is_an_attribute_error():
    import nca_jax

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        nca_jax.nothing  # noqa: B018


def test_the_commands_are_listed_each_with_a_line():
    done = subprocess.run([*COMMAND], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "Train a policy" in done.stdout


def nca_jax(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr("sys.argv", ["nca-jax", *argv])
    __main__.main()


def test_a_command_that_there_is_not_is_one_line_with_the_nearest(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        nca_jax(monkeypatch, "trane")
    said = capsys.readouterr()
    wanted = "error: there is no command 'trane'; did you mean train?\n"
    assert (stopped.value.code, said.out, said.err) == (2, "", wanted)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_the_help_of_a_command_is_its_docstring(monkeypatch, capsys, name, flag):
    module = importlib.import_module(f"nca_jax.{name}")
    monkeypatch.setattr("sys.argv", [name, "--workdir=x", flag])
    run_main(together(module.main))
    assert capsys.readouterr().out == module.__doc__.rstrip() + "\n"


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_the_help_of_a_command_has_every_flag_that_it_reads(name):
    """Those of calls of parse_flags and parse_own_flags, by name; with a config --config too."""
    module = importlib.import_module(f"nca_jax.{name}")
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(module.main)))]
    reads = [x for x in calls if isinstance(x, ast.Call) and "parse" in ast.unparse(x.func)]
    (call,) = [x for x in reads if ast.unparse(x.func) in ("parse_flags", "parse_own_flags")]
    flags = {word.arg for word in call.keywords} - {"sections", "needs_config"}
    flags |= {"config"} if ast.unparse(call.func) == "parse_flags" else set()
    explained = set(re.findall(r"^ *--(\w+) +\S", module.__doc__, re.MULTILINE))
    assert flags <= explained
