"""Damaged checkpoints: what is read is what was saved, or the damage is named."""

import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from nca_jax.checks import UserError
from nca_jax.infra import checkpoint
from nca_jax.infra.checkpoint import RECORD
from nca_jax.infra.fingerprint import array_digests, params_fingerprint
from nca_jax.infra.mesh import host_mesh
from nca_jax.train_step import TrainState

SECTION = ConfigDict({"keep_last": 3, "best_metric": "margin"})


def state_of(step: int) -> TrainState:
    """A state of several dtypes; its numbers do not compress, so that most of a file is numbers."""
    noise = jax.random.normal(jax.random.key(step), (64, 32))
    params = {
        "embed": {"table": noise},
        "norm": {"scale": jnp.ones(4096)},
        "head": {"kernel": noise[:5] * 1e-3},
    }
    return TrainState(jnp.int32(step), params, (noise.astype(jnp.bfloat16), jnp.int32(step)))


def shardings() -> TrainState:
    return jax.tree.map(lambda _: NamedSharding(host_mesh(), P()), state_of(0))


def opened(workdir: Path):
    return checkpoint.open_checkpoints(workdir, SECTION)


def latest(workdir: Path, on_damage: str = "previous") -> TrainState | None:
    with opened(workdir) as manager:
        return checkpoint.restore_latest(manager, state_of(0), shardings(), on_damage=on_damage)


def assert_is(state: TrainState | None, step: int) -> None:
    assert state is not None
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with checkpoints of the steps 1, 2 and 3; of 2 and 3 there are metrics."""
    workdir = tmp_path_factory.mktemp("saved")
    with opened(workdir) as manager:
        for step in (1, 2, 3):
            checkpoint.save(manager, state_of(step), {"margin": 1.0 / step} if step > 1 else None)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def files_of(workdir: Path, step: int) -> list[Path]:
    folder = workdir / "checkpoints" / str(step)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, rng: random.Random) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


# Digests


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8, jnp.uint8])
def test_every_flipped_bit_gives_another_digest(dtype):
    x = np.asarray(jax.random.normal(jax.random.key(0), 7) * 9).astype(dtype)
    found = {array_digests({"x": x})["x"]}
    for byte in range(x.nbytes):
        for bit in range(8):
            other = bytearray(x.tobytes())
            other[byte] ^= 1 << bit
            found.add(array_digests({"x": np.frombuffer(other, dtype)})["x"])
    assert len(found) == 1 + 8 * x.nbytes


def test_changes_do_not_cancel_in_a_digest():
    x = np.ones(4096, np.float32)
    signs, page = x.copy(), x.copy()
    signs[[3, 700]] *= -1
    page[1024:2048] = 0
    swapped = np.arange(4096, dtype=np.float32)
    swapped[[1, 2]] = swapped[[2, 1]]
    found = [array_digests(x)[""] for x in (x, signs, page, np.arange(4096.0), swapped)]
    assert len(set(found)) == 5


def test_a_digest_is_of_values_and_not_of_their_mesh():
    state = state_of(1)
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.device_put(state.params, NamedSharding(mesh, P()))
    split["embed"] = jax.device_put(state.params["embed"], NamedSharding(mesh, P("x")))
    assert array_digests(split) == array_digests(state.params)
    assert params_fingerprint(split) == params_fingerprint(state.params)


# Damage


SEEDS = [seed if seed < 10 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(30)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_flipped_bit_is_never_read_back_as_another_number(workdir, seed):
    rng = random.Random(seed)
    files = files_of(workdir, 3)
    sizes = [path.stat().st_size for path in files]
    flip(rng.choices(files, sizes)[0], rng)
    state = latest(workdir)
    assert_is(state, int(state.step))
    assert (int(state.step) == 3) != (workdir / "damaged" / "3").exists()


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path: path.write_bytes(b'{"a": [\xff' * 20),
    "other JSON": lambda path: path.write_text("[1]"),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_happens_to_a_file_an_earlier_whole_checkpoint_is_taken(saved, tmp_path, damage):
    for number, file in enumerate(files_of(saved, 3)):
        workdir = shutil.copytree(saved, tmp_path / str(number))
        DAMAGES[damage](workdir / file.relative_to(saved))
        state = latest(workdir)
        assert_is(state, int(state.step))
        assert int(state.step) in (2, 3), file


def test_a_damaged_checkpoint_is_said_and_its_step_can_be_saved_again(workdir, capsys):
    (workdir / "checkpoints/3" / RECORD).write_bytes(b"\0" * 9)
    assert_is(latest(workdir), 2)
    said = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert len(said) == 1 and f"3/{RECORD} is damaged" in said[0]
    assert said[0].endswith(f"It is now in {workdir / 'damaged/3'}.")
    with opened(workdir) as manager:
        assert manager.latest_step() == 2
        checkpoint.save(manager, state_of(3), None)
    assert_is(latest(workdir), 3)
    assert "is damaged" not in capsys.readouterr().out


def test_the_array_that_changed_is_named(workdir):
    record = workdir / "checkpoints/3" / RECORD
    content = json.loads(record.read_text())
    digest = content["custom_metadata"]["digests"]["params/head/kernel"]
    content["custom_metadata"]["digests"]["params/head/kernel"] = digest[:-1] + "x"
    record.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"checkpoints/3 is damaged: params/head/kernel changed since.*copy"
    ):
        latest(workdir, on_damage="stop")
    assert (workdir / "checkpoints/3").exists()
    with pytest.raises(
        UserError, match=r"checkpoints/3 is damaged: params/head/kernel changed since"
    ):
        checkpoint.restore_params(workdir, state_of(0).params, host_mesh())


def test_where_no_checkpoint_is_whole_all_are_named_and_stay(workdir):
    for step in (1, 2, 3):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "default")
    for _ in range(2):  # a second start does not begin anew either
        with pytest.raises(UserError, match="No checkpoint is whole: .*3/def.*2/def.*1/def"):
            latest(workdir)
    assert len(list((workdir / "checkpoints").iterdir())) == 3


def test_the_best_is_still_known_beside_an_older_checkpoint_whose_metrics_are_damaged(workdir):
    config = ConfigDict({"keep_last": 1, "best_metric": "margin"})
    (workdir / "checkpoints/3/metrics/metrics").write_text('{"margin": 9.0}')
    with checkpoint.open_checkpoints(workdir, config) as manager:
        state = checkpoint.restore_latest(manager, state_of(0), shardings(), on_damage="previous")
        assert_is(state, 2)
        checkpoint.save(manager, state_of(4), {"margin": 0.1})
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2", "4"}


def test_parameters_that_are_not_finite_are_not_opened(workdir):
    state = state_of(4)
    state.params["head"]["kernel"] = state.params["head"]["kernel"].at[0, 0].set(jnp.inf)
    with opened(workdir) as manager:
        checkpoint.save(manager, state, None)
    with pytest.raises(UserError, match="checkpoints/4: params/head/kernel hold NaN or infinity"):
        checkpoint.restore_params(workdir, state_of(0).params, host_mesh())
    with pytest.raises(UserError, match="checkpoints/4: params/head/kernel hold NaN or infinity"):
        latest(workdir)
