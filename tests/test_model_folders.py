"""Model folders that say two things, or are not what they seem: right as in transformers, or one
line.
"""

import dataclasses
import json
import random
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from helpers import CONFIGS, DENSE, POINTER, hf_json, read_all, write_hf
from safetensors.numpy import save_file

from nca_jax import build, export
from nca_jax.checks import UserError
from nca_jax.config import default_config
from nca_jax.model_config import MODELS
from nca_jax.models.formats import hf, hf_export, pretrained, untrusted
from nca_jax.params import start_params

# The head


def test_a_head_stored_with_other_values_than_the_embedding_is_the_head(tmp_path, capsys):
    other = np.arange(DENSE.vocab_size * DENSE.width, dtype=np.float32)
    other = other.reshape(DENSE.vocab_size, DENSE.width)
    write_hf(tmp_path, "llama", extra={"lm_head.weight": other})
    config, params = hf.open_hf(tmp_path)
    said = capsys.readouterr().out
    assert "tie_word_embeddings=true, but lm_head.weight is stored with other values" in said
    assert not config.tied_head
    head = read_all(params)["head/kernel"][:, : DENSE.vocab_size]
    np.testing.assert_array_equal(head, other.T)

    hf_export.write_hf(tmp_path / "out", config, params, origin=tmp_path)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert hf.open_hf(tmp_path / "out")[0] == config


def test_the_last_row_of_a_stored_head_is_compared_too(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "COMPARED", 7 * DENSE.width)  # rows in several parts
    embedding = write_hf(tmp_path, "llama")["model.embed_tokens.weight"]
    write_hf(tmp_path, "llama", extra={"lm_head.weight": embedding.astype(np.float16)})
    assert hf.open_hf(tmp_path)[0].tied_head
    other = embedding.copy()
    other[-1, -1] += 1
    write_hf(tmp_path, "llama", extra={"lm_head.weight": other})
    assert not hf.open_hf(tmp_path)[0].tied_head


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path):
    tensors = write_hf(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"] + 1}, tmp_path / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="lm_head.weight is in .*a.safetensors and in .*b.safe"):
        hf.open_hf(tmp_path)


# config.json


def parse(model_type: str = "llama", /, generation: dict | None = None, **change):
    return hf.parse_config(hf_json(model_type, CONFIGS[model_type]) | change, generation or {})


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", {"hidden_size": "64"}, "hidden_size must be a positive integer .*, not '64'"),
        ("llama", {"hidden_size": 64.0}, "hidden_size must be a positive integer"),
        ("llama", {"vocab_size": True}, "vocab_size must be a positive integer .*, not True"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers must be .* at most 1000"),
        ("llama", {"rope_theta": "a"}, "rope_theta must be a number .*, not 'a'"),
        ("llama", {"rope_theta": float("nan")}, "rope_theta must be a number"),
        ("llama", {"rope_theta": 10**400}, "rope_theta must be a number"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps must be a number .*, not None"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps must be a number"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be True or False"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings must be True or False"),
        ("llama", {"layer_types": [1, 2, 3]}, "layer_types must be a list"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types must be a list"),
        ("llama", {"rope_scaling": [1]}, "rope_scaling must be an object, or null"),
        ("llama", {"rope_parameters": {"rope_theta": None}}, "rope_theta must be a number"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads must be a positive integer"),
        ("llama", {"num_key_value_heads": -1}, "num_key_value_heads must be a positive integer"),
        ("llama", {"head_dim": 0}, "head_dim must be a positive even"),
        ("llama", {"head_dim": -6}, "head_dim must be a positive even"),
        ("llama", {"head_dim": 7}, "head_dim must be a positive even"),
        ("llama", {"head_dim": None, "hidden_size": 12}, "head_dim must be a positive even"),
        ("mistral", {"sliding_window": -1}, "sliding_window must be an integer from 0"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings must be a positive"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
        ("llama", {"model_type": ["llama"]}, r"model_type \['llama'\] is not one of"),
        ("mixtral", {"num_experts_per_tok": 4}, "num_experts_per_tok 4 is more than"),
        ("llama", {"eos_token_id": "2"}, "eos_token_id must be a token id or a list"),
        ("llama", {"eos_token_id": [2, "</s>"]}, "eos_token_id must be a token id or a list"),
        ("llama", {"eos_token_id": True}, "eos_token_id must be a token id or a list"),
        ("llama", {"bos_token_id": [1]}, "bos_token_id must be an integer, or null"),
        ("llama", {"generation": {"eos_token_id": {}}}, "eos_token_id of generation_config.json"),
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(model_type, change, message):
    with pytest.raises(UserError, match=message):
        parse(model_type, **change)


STRETCH = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": "8"}, "factor must be a number .*, not '8'"),
        ({"high_freq_factor": None}, "high_freq_factor must be a number"),
        ({"high_freq_factor": 1.0}, "low_freq_factor below its high_freq_factor"),
        ({"original_max_position_embeddings": "8192"}, "original_max_position_embeddings must"),
    ],
)
def test_stretched_frequencies_are_numbers(change, message):
    with pytest.raises(UserError, match=message):
        parse(rope_scaling=STRETCH | change)


def test_any_value_in_any_field_is_a_config_or_one_line():
    rng = random.Random(0)
    junk = [None, True, 0, 1, -1, 7, 2**40, 10**400, 1.5, float("nan"), 1e999, "", "64", "x" * 999,
            [], [1], ["a"], [[]], [None], {}, {"a": {}}, {"rope_type": "llama3"}]  # fmt: skip
    fields = [*hf.FIELDS, "model_type", "original_max_position_embeddings", "partial_rotary_factor"]
    refused = 0
    for _ in range(2000):
        model_type = rng.choice(list(CONFIGS))
        change = {rng.choice(fields): rng.choice(junk) for _ in range(rng.randint(1, 3))}
        try:
            hash(hf.parse_config(hf_json(model_type, CONFIGS[model_type]) | change, {}))
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 300
    assert 1000 < refused < 2000


@pytest.mark.parametrize("ids", [-1, 130, [-1, 2], [2, 99999]])
def test_an_end_id_beyond_the_vocabulary_is_left_out_and_said(tmp_path, capsys, ids):
    raw = hf_json("llama", CONFIGS["llama"]) | {"eos_token_id": ids, "bos_token_id": -1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = hf.read_config(tmp_path)
    assert config.eos_ids == ((2,) if isinstance(ids, list) else ())
    assert config.bos_id is None
    assert "is not in the vocabulary; no turn ends by it" in capsys.readouterr().out


def test_exports_name_every_id_that_the_run_stops_at(tmp_path):
    config = default_config()
    config.data.tokenizer = "byte"  # whose eos is 1
    run = export.host_run(config, dataclasses.replace(DENSE, vocab_size=259))
    assert export.ends(run) == (2, 1)

    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2, "top_p": 0.9}')
    write_hf(tmp_path)
    found, params = hf.open_hf(tmp_path)
    told = dataclasses.replace(found, eos_ids=(2, 1))
    hf_export.write_hf(tmp_path / "out", told, params, origin=tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [2, 1]
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["top_p"] == 0.9


def test_a_reference_that_ends_its_turns_otherwise_is_of_the_same_architecture(tmp_path):
    folders = [tmp_path / "start", tmp_path / "exported"]
    for folder, ends in zip(folders, (2, [2, 5]), strict=True):
        folder.mkdir()
        write_hf(folder, change={"eos_token_id": ends})
    config = default_config()
    config.data.rows, config.data.files = 8, "x.jsonl"
    config.model.init_from, config.data.tokenizer = str(folders[1]), "none"
    run = build.build(config)
    assert start_params(run, str(folders[0]))["norm"]["scale"].shape == (DENSE.width,)


def test_lengths_beyond_the_models_positions_are_said(tmp_path, capsys):
    write_hf(tmp_path)  # made for 64 positions
    config = default_config()
    config.data.rows, config.data.files = 8, "x.jsonl"
    config.model.init_from, config.data.tokenizer = str(tmp_path), "none"
    config.data.max_prompt_len, config.data.max_response_len = 40, 24
    build.build(config)
    assert "positions" not in capsys.readouterr().out
    config.data.max_response_len = 25
    build.build(config)
    said = "max_prompt_len=40 and config.data.max_response_len=25 go beyond the 64 positions"
    assert said in capsys.readouterr().out


# Files that are not what they seem


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path, name):
    write_hf(tmp_path)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is a pointer of Git LFS.*git lfs pull"):
        hf.open_hf(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[" * 100_000, "Cannot read .*recursion"), ("[1]", "does not hold"), ("\xff", "config.json")],
)
def test_json_that_cannot_be_read_is_one_line(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        hf.read_config(tmp_path)


def test_json_larger_than_any_is_not_read(tmp_path, monkeypatch):
    write_hf(tmp_path)
    monkeypatch.setattr(untrusted, "JSON_BYTES", 100)
    with pytest.raises(UserError, match=r"config.json has \d+ bytes; wanted at most 100"):
        hf.open_hf(tmp_path)


@pytest.mark.parametrize("kept", [4, 5000, -1])
def test_a_cut_safetensors_file_is_one_line(tmp_path, kept):
    write_hf(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="Cannot read .*model.safetensors"):
        hf.open_hf(tmp_path)


# Names


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that gives one folder, and what it was asked for."""
    asked, folder = [], tmp_path / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)

    def give(name, *, revision, **_):
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    pretrained._from_hub.cache_clear()
    yield asked
    pretrained._from_hub.cache_clear()


def test_a_name_that_is_no_folder_says_that_it_is_fetched_and_which_commit_it_is(hub, capsys):
    for _ in range(2):
        pretrained.resolve("some/model")
    assert hub == [("some/model", None)]
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "'some/model' is no local folder: it is fetched from the Hugging Face Hub.",
        "'some/model' is commit 0123abcd.",
    ]


def test_a_hub_name_may_carry_a_revision(hub):
    pretrained.resolve("some/model@refs/pr/1")
    pretrained.resolve("model@v1.0")
    assert hub == [("some/model", "refs/pr/1"), ("model", "v1.0")]


@pytest.mark.parametrize("name", ["model.safetensors", "some/config.json"])
def test_a_file_in_place_of_a_folder_never_asks_the_hub(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("{}")
    with pytest.raises(UserError, match="is a file, but no .gguf; give the folder"):
        pretrained.resolve(name)
    assert not hub


def test_the_named_sizes_are_those_of_their_config_json():
    """So that none of them is one that the table of fields would refuse."""
    for config in MODELS.values():
        assert hf.parse_config(hf_export.config_json(config, hf_export.family_of(config)), {})
