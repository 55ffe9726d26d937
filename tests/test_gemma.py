"""What Gemma and Granite have that other families have not, and Gemma's text half."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from families import FAMILIES as TINY
from families import SIZES, packed_logits, packed_rows, read_params, write_family
from safetensors.numpy import load_file, save_file

from nca_jax.checks import UserError
from nca_jax.model_config import MODELS, LayerKind, Linear, Rope
from nca_jax.models.decoder import Model
from nca_jax.models.families import FAMILIES
from nca_jax.models.formats import hf, hf_export

PUBLISHED = {"": "language_model."}
RESAVED = {"model.": "model.language_model."}


def write_whole(folder, names: dict[str, str]):
    """Writes a folder of which the gemma3 model of `families` is the text half."""
    write_family(folder, "gemma3")
    tensors = load_file(folder / "model.safetensors")
    for old, new in names.items():
        tensors = {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor
            for name, tensor in tensors.items()
        }
    tensors["vision_tower.patches.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.multi_modal_projector.weight"] = np.zeros(3, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    whole = {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {key: x for key, x in text.items() if key != "eos_token_id"},
        "vision_config": {"hidden_size": 8}, "eos_token_id": [1, 9],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(whole))


@pytest.mark.parametrize("names", [PUBLISHED, RESAVED], ids=str)
def test_of_a_model_of_text_and_images_the_text_half_is_read_and_exported(tmp_path, names):
    text, whole, out = (tmp_path / name for name in ("text", "whole", "out"))
    text.mkdir()
    whole.mkdir()
    write_family(text, "gemma3")
    write_whole(whole, names)
    config, params = hf.open_hf(whole)
    alone, wanted = hf.open_hf(text)
    assert config == dataclasses.replace(alone, eos_ids=(1, 9))
    hf_export.write_hf(out, config, params, origin=whole)
    for found in (params, hf.open_hf(out)[1]):
        assert found.keys() == wanted.keys()
        for path, param in found.items():
            whole_of = (slice(None),) * len(param.shape)
            np.testing.assert_array_equal(param.read(whole_of), wanted[path].read(whole_of))
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]


def parse(model_type: str, **change):
    return hf.parse_config({"model_type": model_type} | change, {})


def test_a_config_json_that_says_nothing_is_of_the_sizes_that_transformers_has():
    from transformers import CONFIG_MAPPING

    for model_type in ("gemma2", "gemma3_text"):
        ours, theirs = parse(model_type), CONFIG_MAPPING[model_type]()
        assert (ours.vocab_size, ours.width, ours.mlp_width) == (
            theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size
        )  # fmt: skip
        assert (ours.num_layers, ours.num_heads, ours.num_kv_heads, ours.head_dim) == (
            theirs.num_hidden_layers, theirs.num_attention_heads, theirs.num_key_value_heads,
            theirs.head_dim,
        )  # fmt: skip
        assert ours.attn_scale == theirs.query_pre_attn_scalar**-0.5
        assert (ours.attn_cap, ours.logit_cap) == tuple(
            x or 0 for x in (theirs.attn_logit_softcapping, theirs.final_logit_softcapping)
        )
        sliding = [kind == "sliding_attention" for kind in theirs.layer_types]
        assert [kind.window > 0 for kind in ours.layer_kinds] == sliding
        assert max(ours.windows) == theirs.sliding_window


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 5e3},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            }
        },
    ],
    ids=["old", "new"],
)
def test_layers_with_a_window_have_a_theta_of_their_own(change):
    config = parse("gemma3_text", num_hidden_layers=12, sliding_window=9, **change)
    local = LayerKind(9, Rope(5e3))
    assert config.kinds == (*[local] * 5, LayerKind(rope=Rope(1e6, Linear(8.0))))


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types are 1, and"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a number above 0"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping 5.0"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta in rope_parameters"),
        ("granite", {"attention_bias": True}, "attention_bias True"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(model_type, change, message):
    sizes = dict.fromkeys(hf.SIZES, 64) if model_type == "granite" else {}
    with pytest.raises(UserError, match=message):
        parse(model_type, **sizes | change)


@pytest.mark.parametrize("name", [x for x in MODELS if x.startswith(("gemma", "granite"))])
def test_a_named_size_is_what_its_own_family_writes(name):
    family = hf_export.family_of(MODELS[name])
    assert family in (FAMILIES["gemma2"], FAMILIES["gemma3_text"], FAMILIES["granite"])


@pytest.mark.slow
def test_a_feature_that_is_off_costs_no_operation():
    model = Model(MODELS["tiny"])
    rows = jax.tree.map(jax.numpy.asarray, packed_rows())

    def program(**changes) -> str:
        changed = Model(dataclasses.replace(model.config, **changes))
        return str(
            jax.make_jaxpr(lambda p: changed.logits(p, changed.rows(p, rows, block=16)))(
                changed.abstract_params()
            )
        )

    plain = program()
    for changes in (
        dict(norm_offset=True), dict(norms="both"), dict(qk_norm="width"), dict(attn_cap=2.0),
        dict(activation="gelu_tanh"), dict(embed_scale=2.0), dict(residual_scale=0.5),
        dict(logit_divisor=2.0), dict(logit_cap=3.0),
    ):  # fmt: skip
        assert len(program(**changes).split("\n")) > len(plain.split("\n")), changes


@pytest.mark.torch
def test_the_text_half_of_what_transformers_saved_gives_its_logits(tmp_path):
    torch = pytest.importorskip("torch")
    from make_families import torch_logits
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=SIZES | TINY["gemma3"], vision_config=vision,
        mm_tokens_per_image=4, image_token_index=60,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)
    found = packed_logits(*read_params(tmp_path))
    np.testing.assert_allclose(found, torch_logits(theirs), rtol=0, atol=1e-4)
