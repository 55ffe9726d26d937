"""What a command says while it is waited for."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nca_jax import advice, train
from nca_jax.files import as_path
from nca_jax.infra import progress
from nca_jax.train_step import Frozen, TrainState


@pytest.fixture
def clock(monkeypatch):
    """Sets the clock, which stands."""

    def at(seconds: float) -> None:
        monkeypatch.setattr(progress.time, "perf_counter", lambda: seconds)

    at(0.0)
    return at


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0421, "0.042 s"),
        (9.4, "9.4 s"),
        (9.6, "10 s"),
        (59.6, "1 min 0 s"),
        (260, "4 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_a_duration_is_said_in_the_units_of_a_person(seconds, said):
    assert progress.duration(seconds) == said


def test_a_phase_is_said_before_it_and_its_time_after_it_unless_it_was_short(clock, capsys):
    with progress.phase("loading"):
        assert capsys.readouterr().out == "loading ...\n"
        clock(80.0)
    assert capsys.readouterr().out == "  took 1 min 20 s\n"
    with progress.phase("packing"):
        clock(80.9)
    assert capsys.readouterr().out == "packing ...\n"


def test_only_the_first_call_of_a_program_is_said_to_compile(capsys):
    program = progress.first_call("a step", lambda x, *, more: x + more)
    assert program(1, more=2) == 3
    assert capsys.readouterr().out == "compiling a step, which may take minutes ...\n"
    assert program(2, more=2) == 4 and capsys.readouterr().out == ""


def test_the_time_left_goes_by_the_pace_after_the_first_step(clock):
    left = progress.time_left(10)
    clock(100.0)  # the first step has compiled
    assert left(1) == ""
    clock(104.0)
    assert left(3) == "14 s left"
    assert left(10) == ""


def test_how_far_an_entry_is_encoded_is_said_with_the_time_left(clock, capsys):
    said = progress.pace_of_entries()
    for seconds, records, done in ((10.0, 100, 0.25), (20.0, 200, 0.5), (30.0, 400, 1.0)):
        clock(seconds)
        said("a.jsonl", records, done)
    said("hf:x:train", 50, 0.0)
    assert capsys.readouterr().out.splitlines() == [
        "  100 records of a.jsonl are encoded (25%)",
        "  200 records of a.jsonl are encoded (50%), 20 s left",
        "  400 records of a.jsonl are encoded (100%)",
        "  50 records of hf:x:train are encoded",
    ]


def test_sizes_are_those_on_one_device(capsys):
    mesh = jax.make_mesh((8,), ("fsdp",))
    split = jax.device_put(jnp.zeros((1024, 1024)), NamedSharding(mesh, P("fsdp")))
    half = {"w": jax.device_put(jnp.zeros((1024, 1024), jnp.bfloat16), NamedSharding(mesh, P()))}
    state = TrainState(jnp.int32(0), {"w": split}, (split, split))
    said = train.said_sizes(state, Frozen(reference=half))
    assert said == (
        "1,048,576 parameters; on a device parameters 0.5 MiB, optimizer 1.0 MiB, reference 2.0 MiB"
    )
    assert "reference" not in train.said_sizes(state, Frozen())


def test_the_most_that_a_device_held_is_said_where_it_is_known():
    held = {"peak_bytes_in_use": 3 * 2**29, "bytes_limit": 2**34}
    device = SimpleNamespace(memory_stats=lambda: held, platform="tpu", device_kind="TPU v5e")
    assert progress.peak_memory(device) == "1.50 GiB of 16.00 GiB"
    assert progress.peak_memory(jax.devices("cpu")[0]) == ""


def test_a_run_that_is_done_names_the_commands_that_it_can_go_to():
    lines = advice.what_next(as_path("my runs/a"), can_evaluate=True, can_sample=True)
    assert [line.split()[3] for line in lines] == [
        "nca_jax.evaluate",
        "nca_jax.generate",
        "nca_jax.export",
    ]
    assert all("--workdir='my runs/a'" in line for line in lines)
    (only,) = advice.what_next(as_path("a"), can_evaluate=False, can_sample=False)
    assert "nca_jax.export" in only
