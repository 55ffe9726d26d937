"""What a wrong name most likely means: for messages alone; nothing is read by these names."""

import difflib
from collections.abc import Sequence

# Names that other trainers have, and ours; several where one of theirs is two of ours.
OTHER_NAMES = {
    "algo": "config.loss.name",
    "adam_beta1": "config.optim.b1",
    "adam_beta2": "config.optim.b2",
    "adam_epsilon": "config.optim.eps",
    "base_model": "config.model.init_from",
    "beta1": "config.optim.b1",
    "beta2": "config.optim.b2",
    "bf16": "config.model.dtype",
    "bs": "config.data.batch_size",
    "checkpoint_dir": "workdir",
    "data_path": "config.data.files",
    "dataset": "config.data.files",
    "dataset_name": "config.data.files",
    "eval_dataset": "config.data.eval_files",
    "eval_steps": "config.eval_every",
    "fp16": "config.model.dtype",
    "global_batch_size": "config.data.batch_size",
    "grad_clip": "config.optim.clip_norm",
    "gradient_accumulation_steps": "config.data.rows",
    "gradient_checkpointing": "config.model.remat",
    "k": "config.data.num_responses",
    "learning_rate": "config.optim.lr",
    "logging_steps": "config.log_every",
    "loss_type": "config.loss.name",
    "lr_scheduler": "config.optim.schedule",
    "lr_scheduler_type": "config.optim.schedule",
    "max_completion_length": "config.data.max_response_len",
    "max_grad_norm": "config.optim.clip_norm",
    "max_length": "config.data.max_prompt_len config.data.max_response_len",
    "max_prompt_length": "config.data.max_prompt_len",
    "max_seq_length": "config.data.max_prompt_len config.data.max_response_len",
    "max_steps": "config.steps",
    "max_target_length": "config.data.max_response_len",
    "metric_for_best_model": "config.checkpoint.best_metric",
    "micro_batch_size": "config.data.rows",
    "mixed_precision": "config.model.dtype",
    "model": "config.model.init_from",
    "model_name": "config.model.init_from",
    "model_name_or_path": "config.model.init_from",
    "model_path": "config.model.init_from",
    "num_epochs": "config.epochs",
    "num_generations": "config.generate.num_samples",
    "num_return_sequences": "config.generate.num_samples",
    "num_train_epochs": "config.epochs",
    "num_warmup_steps": "config.optim.warmup_frac",
    "output": "out workdir",
    "output_dir": "out workdir",
    "per_device_eval_batch_size": "config.data.batch_size",
    "per_device_train_batch_size": "config.data.batch_size",
    "precision": "config.model.dtype",
    "precompute_ref_log_probs": "config.reference.kind",
    "ref_model": "config.reference.init_from",
    "report_to": "config.log.wandb_project",
    "resume": "workdir",
    "resume_from_checkpoint": "workdir",
    "save_steps": "config.save_every",
    "save_total_limit": "config.checkpoint.keep_last",
    "seq_len": "config.data.max_prompt_len config.data.max_response_len",
    "tensor_parallel_size": "config.mesh.tensor",
    "tokenizer_name": "config.data.tokenizer",
    "torch_dtype": "config.model.dtype",
    "train_batch_size": "config.data.batch_size",
    "train_file": "config.data.files",
    "truncation_mode": "config.data.prompt_keep",
    "validation_file": "config.data.eval_files",
    "wandb": "config.log.wandb_project",
    "warmup_ratio": "config.optim.warmup_frac",
    "warmup_steps": "config.optim.warmup_frac",
    "wd": "config.optim.weight_decay",
}


def did_you_mean(name: str, known: Sequence[str], *, prefix: str = "") -> str:
    """Returns " Did you mean NAME?" of a wrong name, or "" where no known one is near.

    Args:
      name, known: as in "config.optim.lr" or "workdir".
      prefix: is put before each name that is said.
    """
    near = [prefix + x for x in _nearest(name, known)]
    return f" Did you mean {' and '.join(near)}?" if near else ""


def _nearest(name: str, known: Sequence[str]) -> Sequence[str]:
    """Returns what is nearest: another trainer's name, the same in another section, a slip."""
    section, _, leaf = name.replace("-", "_").rpartition(".")
    others = OTHER_NAMES.get(leaf.lower(), "").split()
    beside = {_leaf(x): x for x in known if x.rpartition(".")[0] == section}
    return (
        [x for x in known if x in others]
        or [x for x in known if _leaf(x) == leaf][:1]
        or [beside[x] for x in difflib.get_close_matches(leaf, beside, n=1)]
        or difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
