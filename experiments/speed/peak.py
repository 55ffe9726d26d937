"""The machine's matmul peak, as XLA reaches it: float32 [2048, 2048] x [2048, 2048].

Of an accelerator it is that of bfloat16 [8192, 8192] x [8192, 8192].
"""

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
    is_cpu = jax.default_backend() == "cpu"
    size, dtype = (SIZE, "float32") if is_cpu else (4 * SIZE, "bfloat16")
    a, b = jax.random.normal(jax.random.key(0), (2, size, size)).astype(dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(a, b).block_until_ready()
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        product(a, b).block_until_ready()
        seconds.append(time.perf_counter() - start)
    found = {"flops_per_second": 2 * size**3 / min(seconds), "device": jax.devices()[0].device_kind}
    args.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
