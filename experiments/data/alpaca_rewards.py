"""Makes rows of ten scored responses from a checkout of the public alpaca_eval repository.

    git clone --depth=1 https://github.com/tatsu-lab/alpaca_eval
    python experiments/data/alpaca_rewards.py --repo=alpaca_eval --out=alpaca_rewards.jsonl.gz

Each row has a prompt, the ten models' responses and their scores: the probability, in [0, 1], that
GPT-4 Turbo prefers the response to that of gpt4_1106_preview. Rows are sorted by prompt. A quarter
of the prompts, by the hash of their text, is left out: they are for judging models.
"""

import argparse
import gzip
import hashlib
import io
import json
import math
from pathlib import Path

MODELS = (
    "alpaca-7b",
    "vicuna-7b-v1.5",
    "gemma-7b-it",
    "OpenHermes-2.5-Mistral-7B",
    "claude-2.1",
    "FuseChat-Llama-3.1-8B-Instruct",
    "Qwen-14B-Chat",
    "phi-2-sft",
    "falcon-7b-instruct",
    "gpt-3.5-turbo-1106",
)
ANNOTATIONS = "results/{model}/weighted_alpaca_eval_gpt4_turbo/annotations.json"
HELD_BACK = 0.25  # of the prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", type=Path, required=True, help="checkout of alpaca_eval")
    parser.add_argument("--out", type=Path, required=True, help=".jsonl.gz file")
    args = parser.parse_args()
    answers = [read_answers(args.repo / ANNOTATIONS.format(model=model)) for model in MODELS]
    prompts = sorted(set.intersection(*map(set, answers)))
    kept = [prompt for prompt in prompts if hash_fraction(prompt) >= HELD_BACK]
    write_gzip(args.out, [make_row(prompt, answers) for prompt in kept])
    incomplete = len(set.union(*map(set, answers))) - len(prompts)
    print(
        f"{args.out}: {len(kept)} prompts; {len(prompts) - len(kept)} held back, {incomplete} "
        "without a score of every model"
    )


def read_answers(path: Path) -> dict[str, tuple[str, float]]:
    """Returns {prompt: (response, score)} of one model; an answer without a score is left out."""
    if not path.exists():
        raise SystemExit(f"error: no {path}; --repo wants a checkout of tatsu-lab/alpaca_eval")
    answers = {}
    for item in json.loads(path.read_text(encoding="utf-8")):
        preference = item["preference"]  # in [1, 2]: 1 is the baseline's win, 2 this model's
        if preference is not None and math.isfinite(preference):
            score = round(min(max(preference - 1, 0.0), 1.0), 6)
            answers[item["instruction"]] = item["output_2"], score
    return answers


def hash_fraction(prompt: str) -> float:
    """Returns the first 64 bits of the prompt's sha256 as a number in [0, 1]."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64


def make_row(prompt: str, answers: list[dict[str, tuple[str, float]]]) -> dict:
    responses, scores = zip(*(of_model[prompt] for of_model in answers), strict=True)
    return {"prompt": prompt, "responses": responses, "scores": scores, "models": MODELS}


def write_gzip(path: Path, rows: list[dict]) -> None:
    """Writes JSON lines, the same bytes for the same rows."""
    with open(path, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        with io.TextIOWrapper(packed, encoding="utf-8") as text:
            text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()
