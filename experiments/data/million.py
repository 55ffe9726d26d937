"""What a million records cost: to encode, to start again on, and to pack.

    python experiments/data/million.py --rows=alpaca_rewards.jsonl.gz --tokenizer=FOLDER_OR_GGUF \
        --out=FOLDER [--encode=98304] [--records=1000000]

The rows are repeated, each time with other responses, another prompt and a new word in each text.
`--encode` of them are encoded; the parts of their store are repeated to `--records`, for all that
comes after is the same for a record that was seen before. A process of its own then starts on them.
"""

import argparse
import gzip
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from nca_jax import build
from nca_jax.data import store
from nca_jax.data.pipeline import Dataset
from nca_jax.flags import parse_flags

B, K = 1024, 4  # prompts in a step, responses of a prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encode", type=int, default=6 * store.PART)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--start", action="store_true", help="only the second start")
    args = parser.parse_args()
    if args.start:
        start(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "records.jsonl").exists():
        write(args.rows, args.out / "records.jsonl", args.encode)
    run = build.build(config_of(args))
    began, before = time.perf_counter(), cpu_seconds()
    data = build.read_data(run)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - before
    print(
        f"{args.encode} records: {seconds:.0f} s, {cpu:.0f} CPU s, {args.encode / cpu:.0f} a CPU s"
    )
    needed = sum(int(lengths.sum()) for _, lengths, _ in data.training.by_count())
    print(f"{needed / len(data.training):.0f} tokens a record")
    repeat_parts(args.out / "tokens", math.ceil(args.records / args.encode))
    subprocess.run([sys.executable, *sys.argv, "--start"], check=True)


def start(args: argparse.Namespace) -> None:
    """Starts on a store that is there, up to the first batch, and says what that took."""
    began = time.perf_counter()
    run, data = build.read_all(config_of(args))
    dataset = Dataset(data.sources, run.config.data, seed=0)
    dataset.batch_at(0)
    seconds = time.perf_counter() - began + imported_in()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{len(dataset)} records: first batch after {seconds:.1f} s, {cpu_seconds():.1f} CPU s, "
        f"at most {peak:.2f} GiB"
    )
    taken = []
    for step in range(1, 6):
        before = time.process_time()
        dataset.batch_at(step)
        taken.append(time.process_time() - before)
    print(f"a step of {B} prompts: {1e3 * min(taken):.0f} ms to choose, read and pack")


def config_of(args: argparse.Namespace):
    flags = (
        f"--config=configs/jsonl.py:files={args.out / 'records.jsonl'},model=smollm2_135m,k={K}",
        f"--config.data.tokenizer={args.tokenizer}",
        f"--config.data.store={args.out / 'tokens'}",
        f"--config.data.batch_size={B}",
    )
    return parse_flags(["million", *flags])[0]


def write(rows: Path, out: Path, number: int) -> None:
    """Writes so many records, of which no two are the same."""
    records = [json.loads(line) for line in gzip.open(rows)]
    rng = np.random.default_rng(0)
    with out.open("w") as file:
        for i in range(number):
            record = records[i % len(records)]
            chosen = rng.choice(len(record["responses"]), K, replace=False)
            texts = [record["prompt"], *(record["responses"][k] for k in chosen)]
            prompt, *responses = (with_a_word(text, f"w{i}", rng) for text in texts)
            scores = [record["scores"][k] for k in chosen]
            line = {"prompt": prompt, "responses": responses, "scores": scores}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def with_a_word(text: str, word: str, rng: np.random.Generator) -> str:
    words = text.split(" ")
    return " ".join([*words[: (at := rng.integers(len(words)))], word, *words[at:]])


def repeat_parts(tokens: Path, times: int) -> None:
    """Repeats the parts of the only store in a folder."""
    (path,) = tokens.glob("*/" + store.MADE_FROM)
    made_from = json.loads(path.read_text())
    num_parts = made_from["parts"]
    for part in range(num_parts, num_parts * times):
        for end in ("bytes", "index"):
            source = path.parent / f"{part % num_parts:05d}.{end}"
            shutil.copy(source, path.parent / f"{part:05d}.{end}")
    path.write_text(json.dumps(made_from | {"parts": num_parts * times}))


def cpu_seconds() -> float:
    return sum(os.times()[:4])


def imported_in() -> float:
    """Returns the seconds since this process began, as Python's imports come before any clock."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    since_boot = float(Path("/proc/uptime").read_text().split()[0])
    return since_boot - ticks / os.sysconf("SC_CLK_TCK") - (time.perf_counter() - CLOCK)


CLOCK = time.perf_counter()

if __name__ == "__main__":
    main()
