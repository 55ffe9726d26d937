"""Writes sums for a model to answer, each with its answer: prompts of `nca_jax.rounds`.

python experiments/rounds/sums.py --out=sums.jsonl
"""

import argparse
import itertools
import json
import random


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    pairs = list(itertools.product(range(2, 30), range(2, 10)))
    random.Random(0).shuffle(pairs)
    with open(args.out, "w") as file:
        for a, b in pairs:
            record = {"prompt": f"What is {a} plus {b}? Answer briefly.", "answer": a + b}
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
