"""What is exported is what vLLM and its TPU build read: their rules, on files of every family."""

import dataclasses
import json

import pytest
from helpers import CONFIGS
from safetensors import safe_open
from test_export import random_params
from test_export_adapters import lora_config
from test_peft import LORA, random_adapters

from nca_jax import export
from nca_jax.models.formats import hf_export, peft

# Of vLLM's registry; on TPUs those of Llama and Qwen are JAX's own, others vLLM's by torchax.
NAMES = ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "SmolLM3", "Olmo2", "Olmo3")
NAMES += ("Phi3", "Granite", "Gemma2", "Gemma3")
ARCHITECTURES = {f"{name}ForCausalLM" for name in NAMES}
# What vLLM puts adapters on, by the last word of a module's name; experts by all after "experts".
LINEAR = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
ATTENTION = ("q", "k", "v", "o")


def tensors_of(file) -> dict:
    """Returns {name: (dtype, shape)} of a .safetensors file."""
    with safe_open(file, "np") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}
        return {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_has_the_names_and_the_one_dtype_that_its_config_says(tmp_path, name, dtype):
    hf_export.write_hf(tmp_path, CONFIGS[name], random_params(CONFIGS[name]), dtype=dtype)
    config = json.loads((tmp_path / "config.json").read_text())
    (weights,) = tmp_path.glob("*.safetensors")  # vLLM reads all that are there
    found = tensors_of(weights)
    assert set(config["architectures"]) <= ARCHITECTURES and "auto_map" not in config
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert {kind for kind, _ in found.values()} == {hf_export.DTYPES[dtype][1]}
    assert all(x.startswith("model.") or x == "lm_head.weight" for x in found)
    assert ("lm_head.weight" in found) != config["tie_word_embeddings"]
    assert found["model.embed_tokens.weight"][1] == (config["vocab_size"], config["hidden_size"])


@pytest.mark.parametrize(
    "name", sorted(CONFIGS.keys() - {"phi3"})
)  # whose are refused: fused tensors
def test_adapters_have_the_names_and_fields_that_vllm_parses(tmp_path, name):
    config, lora = CONFIGS[name], LORA
    if config.num_experts:  # as the release's recipe
        lora = dataclasses.replace(LORA, targets=ATTENTION)
    peft.write_peft(tmp_path, config, lora, random_adapters(config, lora), base="some/model")
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["r"] == lora.rank and said["lora_alpha"] == lora.alpha
    assert said["bias"] == "none" and not said["use_dora"] and not said.get("modules_to_save")
    assert set(said["target_modules"]) <= LINEAR
    found, parts = tensors_of(tmp_path / "adapter_model.safetensors"), {}
    for tensor, (kind, shape) in found.items():
        module, part = tensor.removesuffix(".weight").rsplit(".", 1)
        assert tensor.endswith(".weight") and module.startswith("base_model.model.model.layers.")
        assert module.rsplit(".", 1)[-1] in LINEAR and kind == "F32"
        parts.setdefault(module, {})[part] = shape
    for both in parts.values():
        assert both.keys() == {"lora_A", "lora_B"}
        assert both["lora_A"][0] == both["lora_B"][1] == lora.rank


def test_the_card_says_how_vllm_serves_what_was_written_and_that_it_serves_no_dora():
    config = lora_config("some/model", rank=9)
    assert "`vllm serve FOLDER`" in export._serving(config, "dequantised")
    said = export._serving(config, "none")
    assert "`vllm serve some/model --enable-lora --max-lora-rank 16 --lora-modules policy" in said
    dora = lora_config("some/model", dora=True)
    assert "--merge=dequantised" in export._serving(dora, "none")
    assert "vLLM serves no DoRA" in export.said(dora, "none")
    assert export.said(config, "none") == ", adapters alone"
