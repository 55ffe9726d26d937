"""The machine's float32 matmul peak, as XLA reaches it: [2048, 2048] x [2048, 2048]."""

import argparse
import json
import time
from pathlib import Path

import jax

SIZE, TIMES = 2048, 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    a, b = jax.random.normal(jax.random.key(0), (2, SIZE, SIZE))
    product = jax.jit(lambda a, b: a @ b)
    product(a, b).block_until_ready()
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        product(a, b).block_until_ready()
        seconds.append(time.perf_counter() - start)
    args.out.write_text(json.dumps({"flops_per_second": 2 * SIZE**3 / min(seconds)}) + "\n")


if __name__ == "__main__":
    main()
