"""Beside transformers: scores of its reward models, and its scores of one that was exported."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from families import FAMILIES, SIZES  # noqa: E402  (torch may not be there)
from test_readme import CHATML, IM_END, chat_tokenizer  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from nca_jax import score  # noqa: E402
from nca_jax.models.formats.hf import open_hf  # noqa: E402
from nca_jax.models.formats.hf_export import write_hf  # noqa: E402

pytestmark = pytest.mark.torch
NO_BREAK = CHATML.replace("<|im_end|>\n", "<|im_end|>")
RECORDS = [
    {"prompt": "What is 2 + 2?", "responses": ["4", "It is 4, as 2 and 2 are.", "5"]},
    {
        "prompt": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Name a colour, and say why.\n"},
        ],
        "responses": ["Red", "  Blue, like\n\nthe sky\n"],
    },
    {"prompt": "x", "responses": [""]},
]


class Trap:
    """A tokenizer and what its template does; `pad` is config.json's pad_token_id."""

    def __init__(self, template: str | None, pad: str | None = None, adds_bos: bool = False):
        self.template, self.pad, self.adds_bos = template, pad, adds_bos

    def tokenizer(self):
        made = chat_tokenizer(self.template)
        if self.adds_bos:
            made.add_special_tokens({"bos_token": "<s>"})
            made.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
            )
        return made


TRAPS = {
    "a line break after the end of turn": Trap(CHATML, pad="<unk>"),
    "pad = eos, after which is a line break": Trap(CHATML, pad=IM_END),
    "pad = eos, which ends the text": Trap(NO_BREAK, pad=IM_END),
    "a BOS in the template, and one by the tokenizer": Trap("<s>" + CHATML, "<unk>", adds_bos=True),
    "no padding": Trap(NO_BREAK),
    "no template, a BOS by the tokenizer": Trap(None, adds_bos=True),
}
CASES = [  # every trap, and every kind of family
    ("llama 3", 1, "a line break after the end of turn"),
    ("qwen2", 1, "pad = eos, after which is a line break"),
    ("qwen3", 5, "pad = eos, which ends the text"),
    ("mistral with a window", 1, "a BOS in the template, and one by the tokenizer"),
    ("mixtral", 2, "no padding"),
    ("smollm2", 1, "no template, a BOS by the tokenizer"),
]


def write_reward_model(folder: Path, family: str, labels: int, trap: Trap) -> None:
    """Writes what transformers makes: random weights, norms and biases too, and a tokenizer."""
    tokenizer = trap.tokenizer()
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer) + 1, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(**sizes | FAMILIES[family], initializer_range=0.25)
    config.num_labels = labels
    config.pad_token_id = trap.pad and tokenizer.convert_tokens_to_ids(trap.pad)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def their_scores(folder: Path, records: list[dict]) -> list[np.ndarray]:
    """Returns the scores of transformers, one conversation at a time, [responses, labels] each."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for record in records:
        scores = []
        for response in record["responses"]:
            said = record["prompt"]
            if tokenizer.chat_template:
                said = [{"role": "user", "content": said}] if isinstance(said, str) else said
                said = [*said, {"role": "assistant", "content": response}]
                ids = tokenizer.apply_chat_template(said, return_tensors="pt", return_dict=True)
            else:
                ids = tokenizer(said + response, return_tensors="pt")
            scores.append(model.eval()(input_ids=ids["input_ids"]).logits[0].numpy())
        found.append(np.stack(scores))
    return found


def our_scores(tmp_path: Path, scorer: str, records: list[dict], *flags: str) -> list[list[float]]:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    score.main(["score", f"--rows={rows}", f"--out={out}", f"--scorer={scorer}", *flags])
    return [json.loads(line)["scores"] for line in out.read_text().splitlines()]


@pytest.mark.parametrize(
    ("family", "labels", "trap"),
    [pytest.param(*case, id=case[-1]) for case in CASES]
    + [
        pytest.param(family, 1, "pad = eos, which ends the text", id=family, marks=pytest.mark.long)
        for family in ("gemma2", "gemma3", "olmo3", "phi3", "smollm3")
    ],
)
def test_scores_are_those_of_transformers_whatever_the_template(tmp_path, family, labels, trap):
    write_reward_model(tmp_path / "rm", family, labels, TRAPS[trap])
    is_text = TRAPS[trap].template is None
    records = [x for x in RECORDS if isinstance(x["prompt"], str)] if is_text else RECORDS
    theirs = their_scores(tmp_path / "rm", records)
    assert np.ptp(np.concatenate(theirs)[:, -1]) > 0.1
    which = f":label={labels - 1}" if labels > 1 else ""
    ours = our_scores(tmp_path, f"reward_model:{tmp_path / 'rm'}{which}", records, "--row_len=256")
    apart = np.concatenate(ours) - np.concatenate(theirs)[:, -1]
    print(f"{family}, {trap}: scores differ by {np.abs(apart).max():.1e}")
    np.testing.assert_allclose(apart, 0, atol=1e-4)

    # With the first config.json kept, and with ours alone.
    for origin in (tmp_path / "rm", None):
        out = tmp_path / f"ours, origin {origin is not None}"
        write_hf(out, *open_hf(tmp_path / "rm"), origin=origin)
        TRAPS[trap].tokenizer().save_pretrained(out)
        for again, before in zip(their_scores(out, records), theirs, strict=True):
            np.testing.assert_allclose(again, before, rtol=0, atol=1e-6)
