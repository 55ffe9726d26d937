"""Writes data/nf4_folder: a random model that transformers quantised by bitsandbytes, absmax too.

    python tests/make_nf4_folder.py     (wants the torch extra)

Blocks go on from one row to the next: no width is a multiple of 64. digests.json has sha256 of what
bitsandbytes makes of each matrix, in float32.
"""

import copy
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

SIZES = {
    "vocab_size": 64, "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": None,
    "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip


def make(folder: Path, *, double: bool, model_type: str = "mistral"):
    """Writes folder/whole and folder/quantised, and returns the quantised model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "whole")
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "whole", quantization_config=how, device_map="cpu", dtype=torch.float32
    )
    model.save_pretrained(folder / "quantised")
    return model.eval()


def dequantised(model) -> dict[str, torch.Tensor]:
    """Returns {tensor name: its values in float32} of what is quantised."""
    return {
        f"{name}.weight": values(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def values(weight) -> torch.Tensor:
    """Returns what bitsandbytes makes of one matrix, in float32.

    Taken as one long row: with AVX-512 its kernel (0.50.2) starts a block anew at every row, where
    its quantisation, its other kernels and CUDA's let a block go on.
    """
    state = copy.deepcopy(weight.quant_state)
    shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
    return dequantize_4bit(weight.data.reshape(-1, 1), state).float().reshape(shape)


def dense(model, folder: Path):
    """Returns folder/whole with `dequantised` in place: the quantised model in plain products."""
    whole = AutoModelForCausalLM.from_pretrained(folder / "whole", dtype=torch.float32)
    assert not whole.load_state_dict(dequantised(model), strict=False).unexpected_keys
    return whole.eval()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        model = make(Path(folder), double=True)
        out = Path(__file__).parent / "data" / "nf4_folder"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(Path(folder) / "quantised", out)
        digests = {
            name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
            for name, value in dequantised(model).items()
        }
        (out / "digests.json").write_text(json.dumps(digests, indent=1) + "\n")
    print(out)
