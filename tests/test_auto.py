"""What a config leaves open is chosen by the data, the model and the devices, once and for all."""

import dataclasses
import json

import jax
import pytest
from commands import write_records
from ml_collections import ConfigDict

from nca_jax import auto, build
from nca_jax.checks import UserError
from nca_jax.config import flatten
from nca_jax.fields import FIELDS
from nca_jax.flags import parse_flags
from nca_jax.model_config import MODELS
from nca_jax.propose import memory_gib
from nca_jax.saved_config import check_same_run, config_json

OPEN = {name: field.auto for name, field in FIELDS.items() if field.auto is not None}


def jsonl(*flags: str, arg: str = "files=x.jsonl,model=tiny") -> ConfigDict:
    flags = tuple(f"--config.{flag}" for flag in flags)
    return parse_flags(["x", f"--config=configs/jsonl.py:{arg}", *flags])[0]


def chosen(*flags: str, model: str = "tiny", platform: str = "cpu", **known) -> dict:
    known = {"shards": 1, "sizes": [300, 700], "num_training": 640, "num_heldout": 9} | known
    return flatten(auto.choose(jsonl(*flags), MODELS[model], platform=platform, **known))


def test_what_is_open_is_a_value_that_its_field_accepts_and_the_file_of_own_data_leaves_all_open():
    assert all(FIELDS[name].check.accepts(value) for name, value in OPEN.items())
    assert flatten(jsonl()).items() >= OPEN.items()
    others = parse_flags(["x", "--config=configs/ultrafeedback.py:algo=nca"])[0]
    assert not [name for name, value in OPEN.items() if flatten(others)[name] == value]


@pytest.mark.parametrize(
    ("model", "platform", "of_model", "others"),
    [
        ("tiny", "cpu", ("float32", "none", False), (1, 64, 1e-5)),
        ("smollm2_135m", "cpu", ("float32", "dots", True), (1, 64, 1e-5)),
        ("smollm2_135m", "gpu", ("bfloat16", "dots", True), (1, 256, 1e-5)),
        ("mistral_7b", "tpu", ("bfloat16", "full", True), (16, 512, 5e-7)),
    ],
)
def test_precision_recomputation_blocks_and_rate_go_by_model_and_platform(
    model, platform, of_model, others
):
    found = chosen(model=model, platform=platform, shards=8)
    names = ("model.dtype", "model.remat", "model.scan_layers", "data.align", "data.block")
    assert tuple(found[name] for name in (*names, "optim.lr")) == of_model + others
    assert found["data.rows"] == 8 and found["generate.max_new_tokens"] == 512


@pytest.mark.parametrize(
    ("row_len", "align"), [(0, 16), (8192, 16), (16384, 64), (24576, 128), (32768, 128)]
)
def test_on_a_tpu_segments_of_longer_rows_lie_at_larger_multiples(row_len, align):
    assert chosen(f"data.row_len={row_len}", platform="tpu")["data.align"] == align


def test_rows_that_are_too_long_for_splash_attention_are_refused_with_what_to_set():
    flags = ("model.attention=splash", "data.row_len=32768", "data.block=512")
    with pytest.raises(
        UserError, match=r"larger multiples than config.data.align=64: .* 128 up to"
    ):
        build.build_for(jsonl(*flags, "data.align=64"), jax.devices())
    model = build.build_for(jsonl(*flags, "data.align=128"), jax.devices()).model
    assert (model.attention_kernel, model.align) == ("splash", 128)


@pytest.mark.parametrize(
    ("sizes", "flags", "row_len"),
    [
        ([1300, 200], (), 1536),  # the longest, rounded up
        ([80] * 100, (), 1024),  # several short ones
        ([80, 60], ("data.batch_size=2",), 256),  # no more than a step has
        ([1300], ("loss.logits_chunk=100",), 1600),  # what is said divides it
    ],
)
def test_a_row_holds_the_longest_example_and_several_short_ones(sizes, flags, row_len):
    assert chosen(*flags, sizes=sizes)["data.row_len"] == row_len


@pytest.mark.parametrize("vocab_size", [259, 32000, 49152, 151936])
def test_a_chunk_divides_its_row_and_its_logits_are_64_MiB_at_most(vocab_size):
    model = dataclasses.replace(MODELS["tiny"], vocab_size=vocab_size)
    config = auto.choose(jsonl(), model, platform="cpu", shards=1, sizes=[1400])
    chunk = config.loss.logits_chunk
    assert config.data.row_len % chunk == 0 and 64 <= chunk <= 512
    assert chunk * model.padded_vocab * 4 <= 64 * 2**20


def test_a_run_is_evaluated_and_saved_ten_times_at_most_and_a_short_one_saved_less_often():
    def every(steps: int) -> tuple[int, int]:
        found = chosen("epochs=0", f"steps={steps}")
        return found["eval_every"], found["save_every"]

    assert every(400) == (40, 40)
    assert every(16) == (2, 10)
    assert every(7) == (1, 10)


def test_a_run_is_not_evaluated_where_none_is_held_out():
    assert chosen(num_heldout=0)["eval_every"] == 0


def test_what_the_config_says_itself_stays():
    said = {
        "data.row_len": 1920, "data.rows": 3, "data.block": 96, "data.align": 8, "save_every": 7,
        "eval_every": 0, "loss.logits_chunk": 64, "generate.max_new_tokens": 9,
        "model.dtype": "bfloat16", "model.remat": "full", "model.scan_layers": True,
        "optim.lr": 3e-6,
    }  # fmt: skip
    flags = [f"{name}={value}" for name, value in said.items()]
    assert chosen(*flags).items() >= said.items()


def test_before_the_data_is_read_only_what_goes_by_it_is_open():
    config = auto.choose(jsonl(), MODELS["tiny"], platform="cpu", shards=1)
    still = {name for name, value in OPEN.items() if flatten(config)[name] == value}
    assert still == {"data.row_len", "loss.logits_chunk", "eval_every", "save_every"}


def test_a_run_is_opened_with_all_chosen_and_says_what(tmp_path, capsys):
    rows = write_records(tmp_path / "rows.jsonl", num_rows=40)
    flags = ("data.tokenizer=byte", "data.format=plain", "data.eval_fraction=0.2")
    config = jsonl(*flags, arg=f"files={rows},model=tiny")
    run, data = build.read_all(config)
    assert not [name for name, value in OPEN.items() if flatten(run.config)[name] == value]
    assert run.config.data.rows == jax.device_count() and run.config.data.row_len == 256
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("auto: ")]
    assert "data.row_len 256" in line and "model.dtype float32" in line
    assert not auto.chosen(run.config, run.config)


def test_a_compile_without_data_takes_rows_of_full_length():
    run = build.build_for(jsonl(), jax.devices())
    assert run.config.data.row_len == 512 * (1 + 4)


def test_a_resumed_run_is_as_it_was_chosen_and_its_layout_goes_by_the_devices(tmp_path):
    config = auto.choose(
        jsonl(), MODELS["tiny"], platform="cpu", shards=1, sizes=[300], num_training=64
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_json(config)))
    resumed = check_same_run(jsonl(), file)
    assert resumed.data.row_len == config.data.row_len and resumed.model.dtype == "float32"
    assert resumed.data.rows == 0  # chosen anew, by the devices
    again = auto.choose(
        resumed, MODELS["tiny"], platform="tpu", shards=8, sizes=[300], num_training=64
    )
    assert (again.data.row_len, again.data.align, again.data.rows) == (config.data.row_len, 1, 8)
    with pytest.raises(UserError, match="data.row_len: 1024 there, 2048 here"):
        check_same_run(jsonl("data.row_len=2048"), file)


# GiB of a step, from the compiler's total in experiments/pods/table.md, and of a whole process
# on a CPU in experiments/speed/README.md, less what its libraries take, 0.5, and the gradients of a
# micro-batch that those steps had beside their sum, another 0.5
PODS = ("data.row_len=4096", "data.block=512", "loss.logits_chunk=512", "model.scan_layers=True")
CPU = ("data.row_len=2560", "loss.logits_chunk=128", "model.scan_layers=True")


@pytest.mark.parametrize(
    ("model", "devices", "rows", "flags", "gib"),
    [
        ("mistral_7b", 32, 32, ("model.remat=full", "model.dtype=bfloat16"), 6.59),
        ("mistral_7b", 16, 16, ("model.remat=full", "model.dtype=bfloat16"), 9.40),
        ("mistral_7b", 64, 64, ("model.remat=full", "model.dtype=bfloat16"), 4.73),
        ("mistral_7b", 32, 128, ("model.remat=full", "model.dtype=bfloat16"), 12.00),
        ("mistral_7b", 32, 32, ("model.remat=dots", "model.dtype=bfloat16"), 16.93),
        ("mistral_7b", 32, 32, ("model.remat=none", "model.dtype=bfloat16"), 39.99),
        ("smollm2_135m", 1, 1, ("model.remat=dots", "model.dtype=float32"), 4.81 - 1.0),
        ("smollm2_135m", 1, 1, ("model.remat=full", "model.dtype=float32"), 3.53 - 1.0),
    ],
)
def test_memory_is_estimated_to_a_seventh_of_what_was_found(model, devices, rows, flags, gib):
    shape = (*(PODS if model == "mistral_7b" else CPU), f"data.rows={rows}")
    cached = ("reference.kind=cached", "reference.cache=x")
    config = jsonl(*shape, *flags, *cached)
    assert memory_gib(config, MODELS[model], devices) == pytest.approx(gib, rel=1 / 7)
