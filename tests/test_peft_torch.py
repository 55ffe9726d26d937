"""Beside torch's PEFT: adapters that it made, and what it reads of ours."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("peft")

from families import packed_logits, read_params  # noqa: E402  (torch may not be there)
from helpers import read_all  # noqa: E402
from make_families import load, torch_logits  # noqa: E402
from test_families_torch import made_by_transformers  # noqa: E402
from test_peft import random_adapters  # noqa: E402

from nca_jax.axes import nest_paths  # noqa: E402
from nca_jax.infra.optim import merge_trained  # noqa: E402
from nca_jax.models.formats import hf, peft, pretrained  # noqa: E402
from nca_jax.models.lora import Lora  # noqa: E402

pytestmark = pytest.mark.torch
ALL = ("q", "k", "v", "o", "gate", "up", "down")


def assert_moved(found: np.ndarray, base: Path) -> None:
    assert np.abs(found - torch_logits(load(base))).max() > 0.1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "mistral",
            {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]},
        ),
        ("qwen3", {"r": 2, "lora_alpha": 7, "target_modules": "all-linear"}),
        ("qwen2", {"r": 3, "use_dora": True, "target_modules": r".*\.(k|v|down)_proj"}),
        ("mixtral", {"r": 4, "target_modules": [f"{x}_proj" for x in ALL]}),
    ],
    ids=str,
)
def test_adapters_that_peft_made_give_its_logits_and_come_back(tmp_path, name, told):
    base, out = tmp_path / "base", tmp_path / "adapter"
    model = made_by_transformers(name)
    model.save_pretrained(base)
    adapted = theirs.get_peft_model(load(base), theirs.LoraConfig(task_type="CAUSAL_LM", **told))
    with torch.no_grad():
        for path, parameter in adapted.named_parameters():
            if "lora_A" in path or "lora_B" in path:
                parameter.normal_(0, 0.2)
    adapted.eval().save_pretrained(out)
    logits = torch_logits(adapted)
    assert_moved(logits, base)

    merged = packed_logits(*read_params(out))
    np.testing.assert_allclose(merged, logits, rtol=0, atol=1e-4)
    (config, _), (model, params) = hf.open_hf(base), read_params(base)
    adapter = pretrained.open_adapter(str(out), config)
    params = merge_trained(nest_paths(read_all(adapter.params)), params)
    found = packed_logits(dataclasses.replace(model, lora=adapter.lora), params)
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4)

    peft.write_peft(tmp_path / "ours", config, adapter.lora, adapter.params, base=adapter.base)
    again = theirs.PeftModel.from_pretrained(load(base), tmp_path / "ours").eval()
    np.testing.assert_array_equal(torch_logits(again), logits)
    saved = [json.loads((x / "adapter_config.json").read_text()) for x in (out, tmp_path / "ours")]
    assert all(saved[0].get(key, saved[1][key]) == saved[1][key] for key in ("r", "lora_alpha"))


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_peft_reads_our_adapters_of_experts_and_of_their_router(tmp_path, rslora):
    made_by_transformers("mixtral").save_pretrained(tmp_path / "base")
    config, _ = hf.open_hf(tmp_path / "base")
    lora = Lora(4, 8.0, ("k", "gate", "up", "down", "router"), rslora=rslora)
    params = random_adapters(config, lora, 0.2)
    out = tmp_path / "adapter"
    peft.write_peft(out, config, lora, params, base=str(tmp_path / "base"))
    adapted = theirs.PeftModel.from_pretrained(load(tmp_path / "base"), out).eval()
    logits = torch_logits(adapted)
    assert_moved(logits, tmp_path / "base")
    np.testing.assert_allclose(packed_logits(*read_params(out)), logits, rtol=0, atol=1e-4)
    found = pretrained.open_adapter(str(out), config).lora
    assert found.scale == pytest.approx(lora.scale)
    assert found.targets == lora.targets
