"""Trains by PyTorch and by nca_jax on the same weights and rows, and compares step by step.

    python experiments/torch_parity/run.py [--model=HF_DIR] [--rows=ROWS.jsonl] [--steps=30]
        [--out=runs/torch_parity] [--cases=nca,infonca,dpo,pairwise_nca,biased_nca,nca-lora,...]

NCA and InfoNCA with K = 4, the losses of pairs with K = 2 (the first responses of each row); the
released computation beside ours, and TRL's DPOTrainer beside ours where TRL is installed and has
the loss. The cases -lora and -rslora train adapters that PEFT makes, on PEFT and here, at ten times
the rate. Writes OUT/table.md and OUT/differences.json, the largest differences by quantity;
OUT/results.json, every step of every trainer; OUT/parity.png. Wants the extras `torch` and `demo`.

ROWS: {"prompt_ids": [int, ...], "response_ids": [[int, ...], ...], "scores": [number, ...]} a line,
best response first; without it, ragged rows of random ids are made.
"""

import argparse
import importlib.util
import json
import random
from pathlib import Path

import ours
import released
from report import write_report

ROOT = Path(__file__).parents[2]
FULL = {"nca": 4, "infonca": 4, "dpo": 2, "pairwise_nca": 2, "biased_nca": 2}  # K of a loss
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
SOME = {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {"nca-lora": LORA, "infonca-lora": LORA, "dpo-lora": LORA, "nca-rslora": SOME}
CASES = (*FULL, *ADAPTERS)
# Hard targets for NCA, as released; soft ones for InfoNCA, whose scores are 0 to 5 here.
ALPHAS = {"nca": 1e-4, "infonca": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "tests/data/tiny_mistral")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/torch_parity")
    parser.add_argument("--cases", default=",".join(CASES))
    args = parser.parse_args()
    args.model, args.out = args.model.resolve(), args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    model_config = json.loads((args.model / "config.json").read_text())
    if args.rows is None:
        args.rows = args.out / "rows.jsonl"
        write_records(args.rows, model_config["vocab_size"], model_config["eos_token_id"])
    eos_id = model_config["eos_token_id"]
    results = {case: run_case(case, args, eos_id) for case in args.cases.split(",")}
    write_report(args.out, results)


def run_case(case: str, args: argparse.Namespace, eos_id: int) -> dict[str, dict | None]:
    """Returns {trainer: {"log", "final_logps"}}, None where a trainer is not there."""
    loss = case.partition("-")[0]
    k, told = FULL[loss], ADAPTERS.get(case)
    rows = released.read_records(args.rows, k)
    rows_file = args.out / f"rows_k{k}.jsonl"
    rows_file.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows))
    settings = released.Settings(
        loss=loss,
        alpha=ALPHAS.get(loss, 0.0),
        beta=args.beta,
        lr=10 * args.lr if told else args.lr,
        steps=args.steps,
        batch_size=args.batch_size,
        eos_id=eos_id,
        adapter=make_adapter(args.model, args.out / f"adapter-{case}", told) if told else None,
    )
    return {
        "released": released.train(args.model, rows, settings),
        "trl": train_by_trl(args.model, rows, settings, args.out / "trl"),
        "ours": ours.train(args.model, rows_file, settings, k, args.out / case),
    }


def train_by_trl(model: Path, rows: list, settings, out: Path) -> dict | None:
    """Returns what TRL's trainer computes; None where it is not installed or has no such loss."""
    if importlib.util.find_spec("trl") is None:
        return None
    import trl_trainer

    if settings.loss not in trl_trainer.LOSS_TYPES or settings.adapter:
        return None
    return trl_trainer.train(model, rows, settings, out)


def make_adapter(model: Path, out: Path, told: dict) -> Path:
    """Writes an adapter as PEFT begins it; returns its folder."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **told)
    peft.get_peft_model(base, config).save_pretrained(out)
    return out


def write_records(path: Path, vocab_size: int, eos_id: int) -> None:
    """Writes 24 rows of random ids with K = 4: ragged, with ties and with an eos inside some.

    It is inside responses 2 and 3 only, for TRL attends to it where the released code does not.
    """
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(eos_id + 1, vocab_size) for _ in range(rng.randint(low, high))]

    with open(path, "w") as file:
        for i in range(24):
            responses = [ids(2, 48) for _ in range(4)]
            if i % 3 == 0:
                for response in responses[2:]:
                    response.insert(len(response) // 2, eos_id)
            row = {
                "prompt_ids": ids(1, 32),
                "response_ids": [[*response, eos_id] for response in responses],
                "scores": sorted((rng.randrange(11) / 2 for _ in range(4)), reverse=True),
            }
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
