"""Makes data/families.npz by PyTorch: python tests/make_families.py (wants the torch extra)."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from families import FAMILIES, GOLDEN, NEW_TOKENS, pieces, write_family
from transformers import AutoModelForCausalLM


def load(folder: Path, dtype: torch.dtype = torch.float32):
    """Returns the model of a folder as transformers computes it; all its tensors must fit."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def torch_logits(model) -> np.ndarray:
    """Returns the logits that predict the response tokens of `pieces`, a row for each response."""
    found = []
    for prompt, responses, *_ in pieces():
        for response in responses:
            logits = model(torch.tensor([[*prompt, *response]])).logits[0]
            found.append(logits[len(prompt) - 1 : -1].float().numpy())
    return np.concatenate(found)


@torch.no_grad()
def torch_greedy(model) -> np.ndarray:
    """Returns the most likely tokens after each prompt, [prompts, NEW_TOKENS]."""
    ends_never = dict(eos_token_id=-1, pad_token_id=0)
    return np.stack(
        [
            model.generate(
                torch.tensor([group.prompt]),
                attention_mask=torch.ones(1, len(group.prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                **ends_never,
            )[0, len(group.prompt) :].numpy()
            for group in pieces()
        ]
    )


if __name__ == "__main__":
    golden = {}
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            model = load(write_family(Path(folder), name))
            golden[f"{name}/logits"] = torch_logits(model)
            golden[f"{name}/greedy"] = torch_greedy(model)
    np.savez_compressed(GOLDEN, **golden)
