"""What an import costs: a loss needs jax alone, and the package opens nothing unasked."""

import subprocess
import sys

import pytest

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
    wrong = python(
        "import sys; sys.argv = ['x', 'trane']; from nca_jax.__main__ import main; main()"
    )
    assert wrong.returncode == 2 and "no command 'trane'" in wrong.stderr
