"""Export to a Hugging Face folder: reading it back is the identity, bit for bit."""

import dataclasses
import json
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from commands import write_records
from helpers import CONFIGS, DENSE, hf_json, read_all, write_hf
from safetensors.numpy import load_file

from nca_jax import export, train
from nca_jax.checks import UserError
from nca_jax.infra.checkpoint import restore_params
from nca_jax.infra.mesh import host_mesh
from nca_jax.model_config import MODELS, LayerKind, ModelConfig, Rope, RopeScaling, alike
from nca_jax.models.decoder import Model
from nca_jax.models.formats import hf, hf_export, names
from nca_jax.models.formats.pretrained import load_tokenizer

STRETCHED = RopeScaling(8.0, 1.0, 4.0, 32)
EXPORTED = CONFIGS | {
    "llama3": dataclasses.replace(DENSE, kinds=(LayerKind(rope=Rope(5e5, STRETCHED)),)),
    "qwen2 with a window": dataclasses.replace(CONFIGS["qwen2"], kinds=alike(window=5)),
    "mixtral with a window": dataclasses.replace(CONFIGS["mixtral"], kinds=alike(window=5)),
    "two ends, no bos": dataclasses.replace(DENSE, eos_ids=(2, 5), bos_id=None),
    "no end": dataclasses.replace(DENSE, eos_ids=()),
    "a reward model": dataclasses.replace(DENSE, num_labels=3, pad_id=2),
}


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, names.Param]:
    """float32 values of all 24 bits, padded columns too."""
    rng = np.random.default_rng(seed)

    def param(shape):
        return names.Param(shape, rng.normal(size=shape).astype(np.float32).__getitem__)

    return {path: param(shape) for path, shape in names.param_shapes(config).items()}


def assert_same_params(found: dict, expected: dict, config: ModelConfig) -> None:
    """Bit for bit, but for the padding of the vocabulary, which is 0 after reading."""
    found, expected = read_all(found), read_all(expected)
    assert list(found) == list(expected)
    for path, value in expected.items():
        value = value.copy()
        if path == "embed/table":
            value[config.vocab_size :] = 0
        if path == "head/kernel":
            value[:, config.vocab_size :] = 0
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("shard_bytes", [hf_export.SHARD_BYTES, 20_000])
def test_export_then_load_is_the_identity(tmp_path, name, shard_bytes):
    config, params = EXPORTED[name], random_params(EXPORTED[name])
    hf_export.write_hf(tmp_path, config, params, shard_bytes=shard_bytes)
    found_config, found = hf.open_hf(tmp_path)
    assert found_config == config
    assert_same_params(found, params, config)


@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_has_a_config_json(tmp_path, name):
    (tmp_path / "config.json").write_text(
        json.dumps(hf_export.config_json(MODELS[name], hf_export.family_of(MODELS[name])))
    )
    assert hf.read_config(tmp_path) == MODELS[name]


def test_shards_hold_each_tensor_once_and_no_more_bytes_than_allowed(tmp_path):
    config, limit = CONFIGS["mixtral"], 20_000
    hf_export.write_hf(tmp_path, config, random_params(config), shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    shards = [load_file(file) for file in files]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert all(size <= limit or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
    assert index["metadata"]["total_size"] == sum(sizes)
    stored = [
        (name, file.name) for file, shard in zip(files, shards, strict=True) for name in shard
    ]
    assert sorted(stored) == sorted(index["weight_map"].items())


def test_what_is_read_at_a_time_is_one_layer():
    asked = []

    def read(path, shape, index):
        asked.append((path, index))
        return np.zeros([len(range(n)[s]) for n, s in zip(shape, index, strict=True)], np.float32)

    config = CONFIGS["mixtral"]
    for held in names.places(config, hf.tensor_names("mixtral")).values():
        (entry, _), shape = held[0], held[0].entry.shape(config)
        param = names.Param(shape, lambda index, p=entry.path, s=shape: read(p, s, index))
        names.read_tensor(config, {entry.path: param}, held)
    for path, index in asked:
        entry = next(entry for entry in names.entries(config) if entry.path == path)
        stacked = len(entry.stacked)
        assert all(s.stop - s.start == 1 for s in index[:stacked]), path


def test_the_file_is_safetensors_in_torchs_format_with_aligned_tensors(tmp_path):
    hf_export.write_hf(tmp_path, DENSE, random_params(DENSE), dtype="bfloat16")
    raw = (tmp_path / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert len(raw) == 8 + size + max(tensor["data_offsets"][1] for tensor in header.values())


def test_bfloat16_rounds_to_the_nearest(tmp_path):
    params = random_params(DENSE)
    hf_export.write_hf(tmp_path, DENSE, params, dtype="bfloat16")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    path = "layers/mlp/up/kernel"
    expected = read_all(params)[path].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(read_all(hf.open_hf(tmp_path)[1])[path], expected)


def test_a_tied_head_is_not_stored(tmp_path):
    hf_export.write_hf(tmp_path, CONFIGS["llama"], random_params(CONFIGS["llama"]))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_fields_of_the_origin_that_we_do_not_know_survive(tmp_path):
    origin, out = tmp_path / "origin", tmp_path / "out"
    origin.mkdir()
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    kept = {"rope_parameters": rope, "initializer_range": 0.01, "pad_token_id": 7}
    write_hf(origin, "mistral", change=kept | {"auto_map": {"AutoModel": "code.Model"}})
    generation = {"eos_token_id": [2, 9], "temperature": 0.6}
    (origin / "generation_config.json").write_text(json.dumps(generation))

    config, params = hf.open_hf(origin)
    hf_export.write_hf(out, config, params, origin=origin)
    written = json.loads((out / "config.json").read_text())
    said = hf_json("mistral", CONFIGS["mistral"]) | kept
    assert written.items() >= (said | {"eos_token_id": [2, 9]}).items()  # both files say all
    assert "auto_map" not in written
    assert json.loads((out / "generation_config.json").read_text()) == generation
    found_config, found = hf.open_hf(out)
    assert found_config == config
    assert_same_params(found, params, config)


def test_an_origin_of_another_config_is_refused(tmp_path):
    write_hf(tmp_path, "qwen3")
    with pytest.raises(UserError, match="another config"):
        hf_export.write_hf(tmp_path / "out", DENSE, random_params(DENSE), origin=tmp_path)


@pytest.mark.parametrize(
    "changes", [{"qk_norm": "head"}, {"num_experts": 4, "experts_per_token": 2}], ids=str
)
def test_a_config_that_no_architecture_computes_is_refused(changes):
    config = dataclasses.replace(CONFIGS["qwen2"], **changes)
    with pytest.raises(UserError, match="cannot be exported"):
        hf_export.family_of(config)


# The command

TINY_MISTRAL = Path(__file__).parent / "data" / "tiny_mistral"


def trained(tmp_path, arg: str, *flags: str) -> Path:
    """Trains two steps on 8 devices with a checkpoint of each; returns the workdir."""
    rows = write_records(tmp_path / "rows.jsonl", num_rows=8)
    train.main(
        ["train", f"--config=configs/jsonl.py:files={rows},{arg}", f"--workdir={tmp_path / 'run'}"]
        + ["--config.steps=2", "--config.save_every=1", "--config.eval_every=0"]
        + ["--config.data.rows=4", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
        + ["--config.mesh.data=2", "--config.epochs=0.0", "--config.data.batch_size=4"]
        + ["--config.data.tokenizer=byte", "--config.log.tensorboard=False", *flags]
    )
    return tmp_path / "run"


@pytest.mark.slow
def test_a_trained_policy_is_exported_bit_for_bit_with_its_card_and_tokenizer(tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "out"
    trained(tmp_path, "smoke", "--config.optim.lr=1e-2", "--config.optim.warmup_from=zero")
    out.mkdir()  # an empty folder is fine
    export.main(["export", f"--workdir={workdir}", f"--out={out}"])
    config, found = hf.open_hf(out)
    assert config == MODELS["tiny"]
    params = restore_params(workdir, Model(config).abstract_params(), host_mesh())
    assert_same_params(found, {path: export.opened(config, params)[path] for path in found}, config)

    card = (out / "README.md").read_text()
    assert json.loads((workdir / "run.json").read_text())["commit"] in card
    assert "| train | 2 | loss |" in card and '"optim.lr": 0.01' in card
    assert (out / "tokenizer_config.json").exists()
    assert not list(tmp_path.glob("*.partial"))

    # An earlier step by its number: the rate of the first update is 0, so this is the start.
    first = tmp_path / "first"
    export.main(["export", f"--workdir={workdir}", f"--out={first}", "--step=1"])
    start = export.opened(config, jax.jit(Model(config).init)(jax.random.key(0)))
    at_first, at_end = read_all(hf.open_hf(first)[1]), read_all(found)
    assert_same_params(hf.open_hf(first)[1], {path: start[path] for path in found}, config)
    assert all((at_first[path] != at_end[path]).any() for path in at_end)


@pytest.mark.slow
def test_an_exported_policy_of_a_folder_keeps_its_json(tmp_path):
    start = f"init_from={TINY_MISTRAL}"
    fits = ("--config.data.format=plain", "--config.data.row_len=512")
    vocab = ("--config.data.tokenizer=none",)  # 257 ids are fewer than those of bytes
    ids = tmp_path / "ids.jsonl"
    row = {"prompt_ids": [5, 6], "response_ids": [[7, 8], [9], [10, 2]], "scores": [1, 2, 3]}
    ids.write_text("".join(json.dumps(row | {"prompt_ids": [5, i]}) + "\n" for i in range(8)))
    flags = (*fits, *vocab, f"--config.data.files={ids}", "--config.data.num_responses=3")
    workdir = trained(tmp_path, start, *flags)
    out = tmp_path / "out"
    export.main(["export", f"--workdir={workdir}", f"--out={out}"])
    before, after = (json.loads((x / "config.json").read_text()) for x in (TINY_MISTRAL, out))
    assert after == before | {"dtype": "float32", "torch_dtype": "float32"}
    assert not list(out.glob("tokenizer*"))


def test_a_tokenizer_with_files_is_copied_as_it_is(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from nca_jax.models.formats.pretrained import save_tokenizer

    origin, out = tmp_path / "origin", tmp_path / "out"
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template="x").save_pretrained(origin)
    (origin / "tokenizer.model").write_bytes(b"pieces")
    out.mkdir()
    save_tokenizer(str(origin), out)
    assert {x.name: x.read_bytes() for x in origin.iterdir()} == {
        x.name: x.read_bytes() for x in out.iterdir()
    }
    assert load_tokenizer(str(out))("b").input_ids == [1]
