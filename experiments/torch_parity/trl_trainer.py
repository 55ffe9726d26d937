"""TRL's DPOTrainer on rows of token ids, in file order: the trainer as it is, but for its input.

Its loss types `sigmoid` and `nca_pair` are our dpo and pairwise_nca. It attends to every token, so
rows with an eos inside a response are not the released computation to it.
"""

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer

LOSS_TYPES = {"dpo": "sigmoid", "pairwise_nca": "nca_pair"}


class OnTokenIds(DPOTrainer):
    """DPOTrainer that takes rows as ids and in their order, and keeps each micro-batch's loss."""

    def __init__(self, *args, **kwargs):
        self.losses: list[float] = []
        self.ref_seconds = 0.0  # what precomputing the reference took
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def _precompute_ref_logps(self, *args, **kwargs):
        start = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        self.ref_seconds = time.perf_counter() - start
        return dataset

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def dataset_of(rows: Sequence) -> Dataset:
    """Returns the pairs as the trainer has them once it has tokenised."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": list(row.prompt_ids),
                "chosen_ids": list(row.response_ids[0]),
                "rejected_ids": list(row.response_ids[1]),
            }
            for row in rows
        ]
    )


def make_trainer(model_dir: Path, rows: Sequence, settings, out: Path, **args) -> OnTokenIds:
    """Returns the trainer, ready to `train()`.

    Args:
      rows: have prompt_ids and response_ids, the chosen one first; after the last one the trainer
        begins again.
      settings: as `released.Settings`.
      out: the trainer's own folder.
      **args: more fields of DPOConfig.
    """
    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ref_model = None if args.get("precompute_ref_log_probs") else copy.deepcopy(policy)
    if settings.adapter:  # the trainer keeps a copy of the adapters as its reference
        import peft

        policy, ref_model = (
            peft.PeftModel.from_pretrained(policy, settings.adapter, is_trainable=True),
            None,
        )
    config = {
        "output_dir": str(out),
        "loss_type": [LOSS_TYPES[settings.loss]],
        "beta": settings.beta,
        "learning_rate": settings.lr,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "warmup_steps": math.ceil(settings.warmup_frac * settings.steps),
        "lr_scheduler_type": "cosine",
        "max_grad_norm": settings.clip_norm,
        "max_length": None,
        "optim": "adamw_torch",
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = OnTokenIds(
        policy,
        ref_model=ref_model,
        args=DPOConfig(**config | args),
        train_dataset=dataset_of(rows),
        processing_class=ByT5Tokenizer(extra_ids=0),  # reads no text here; it names a pad id
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def pair_logps(trainer: OnTokenIds, rows: Sequence) -> list[list[float]]:
    """Returns log pi(y|x) of chosen and rejected, [B, 2], as the trainer computes them."""
    batch = trainer.data_collator(list(dataset_of(rows)))
    # The function is the reference's: where there is no other model, it turns adapters off.
    reference, trainer.ref_model = trainer.ref_model, trainer.model
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    trainer.ref_model = reference
    return torch.stack([chosen, rejected], dim=-1).tolist()


def train(model_dir: Path, rows: Sequence, settings, out: Path) -> dict:
    """Runs the trainer; returns what `released.train` returns."""
    size = settings.batch_size
    taken = [rows[i % len(rows)] for i in range(size * settings.steps)]
    trainer = make_trainer(model_dir, taken, settings, out)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    log = [
        {
            "step": step,
            "loss": loss,
            "grad_norm": entry["grad_norm"],
            "accuracy": entry["rewards/accuracies"],
            "logps/0": entry["logps/chosen"],
            "logps/1": entry["logps/rejected"],
            "rewards/0": entry["rewards/chosen"],
            "rewards/1": entry["rewards/rejected"],
        }
        for step, (entry, loss) in enumerate(zip(entries, trainer.losses, strict=True), start=1)
    ]
    return {"log": log, "final_logps": pair_logps(trainer, taken[-size:])}
