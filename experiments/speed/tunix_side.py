"""Tunix's DPOTrainer (K = 2) with its Llama 3 class, batches of 2 pairs, a live reference.

Run by a Python of its own that has google-tunix. The trainer's own `train` does a step as here:
`_prepare_inputs`, which runs the reference, then the jitted `_train_step`.
"""

import functools
import json
import time
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.sft.dpo import dpo_trainer

from experiments.speed.clock import Lap, Side, laps, measure

MICRO_BATCH = 2  # pairs; a gradient of 8 pairs of real rows at once wanted 59 GiB
ROPE = llama3.apply_rope


def load_model(folder: str) -> nnx.Module:
    """Returns Tunix's Llama 3 with the weights of a Hugging Face folder, float32."""
    found = json.loads((Path(folder) / "config.json").read_text())
    # The class of 0.1.7 does not read its config's rope_theta; without this the numbers differ.
    llama3.apply_rope = functools.partial(ROPE, rope_theta=found["rope_theta"])
    config = llama3.ModelConfig(
        num_layers=found["num_hidden_layers"],
        vocab_size=found["vocab_size"],
        embed_dim=found["hidden_size"],
        hidden_dim=found["intermediate_size"],
        num_heads=found["num_attention_heads"],
        head_dim=found["head_dim"],
        num_kv_heads=found["num_key_value_heads"],
        rope_theta=found["rope_theta"],
        norm_eps=found["rms_norm_eps"],
        weight_tying=found["tie_word_embeddings"],
    )
    return llama3_params.create_model_from_safe_tensors(folder, config, dtype=jax.numpy.float32)


def read_batches(path: str) -> list[dpo_trainer.TrainingInput]:
    """Returns micro-batches of one shape, which is compiled once: the longest of all rows."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    prompts = padded([row["prompt_ids"] for row in rows], at_left=True)
    length = max(len(ids) for row in rows for ids in row["response_ids"])
    chosen = padded([row["response_ids"][0] for row in rows], length)
    rejected = padded([row["response_ids"][1] for row in rows], length)
    size = min(MICRO_BATCH, len(rows))
    arrays = (*prompts, *chosen, *rejected)
    return [
        dpo_trainer.TrainingInput(*(x[at : at + size] for x in arrays))
        for at in range(0, len(rows), size)
    ]


def padded(
    ids: list[list[int]], length: int = 0, *, at_left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids, mask), both [rows, length] int32; a length of 0 is the longest's."""
    length = length or max(map(len, ids))
    tokens, mask = np.zeros((2, len(ids), length), np.int32)
    for i, row in enumerate(ids):
        at = slice(length - len(row), length) if at_left else slice(len(row))
        tokens[i, at], mask[i, at] = row, 1
    return tokens, mask


def open_side(job: dict, side: str) -> Side:
    batches = read_batches(job["rows"])
    policy, reference = load_model(job["model"]), load_model(job["model"])
    trainer = dpo_trainer.DPOTrainer(
        policy,
        reference,
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(job["lr"], b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0),
        ),
        dpo_trainer.DPOTrainingConfig(
            eval_every_n_steps=10**9, gradient_accumulation_steps=len(batches), beta=job["beta"]
        ),
    )
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)  # as `train` has it
    facts = {"reference": "live"}

    def step() -> None:
        for batch in batches:
            loss, *_ = train_step(trainer._prepare_inputs(batch))
            jax.block_until_ready(loss)
        jax.block_until_ready(nnx.state(policy))

    def pair_logps() -> np.ndarray:
        found = []
        for batch in batches:
            x = trainer._prepare_inputs(batch)
            inputs = (x.input_ids, x.positions, x.attention_mask, x.logits_to_keep)
            logps = dpo_trainer.compute_logps(policy, *inputs, x.completion_mask)
            found.append(np.stack(logps, axis=-1))
        return np.concatenate(found)

    @nnx.jit
    def loss_and_grads(model: nnx.Module, batch: object) -> tuple[jax.Array, nnx.State]:
        def loss(model):
            return dpo_trainer.dpo_loss_fn(model, batch, beta=job["beta"])[0]

        return nnx.value_and_grad(loss)(model)

    def check() -> dict:
        loss, grads = 0.0, None
        for batch in batches:
            of_batch, more = loss_and_grads(policy, trainer._prepare_inputs(batch))
            loss += of_batch / len(batches)
            grads = more if grads is None else jax.tree.map(jax.numpy.add, grads, more)
        grad_norm = optax.global_norm(nnx.to_pure_dict(grads)) / len(batches)
        del grads
        logps = pair_logps()
        step()
        after = pair_logps()
        apart = job["beta"] * np.diff(after - logps)[:, 0]  # rejected - chosen
        return {
            "loss": float(loss),
            "grad_norm": float(grad_norm),
            "logps": logps.tolist(),
            "loss_after": float(np.logaddexp(0, apart).mean()),
            "logps_after": after.tolist(),
        }

    def run(steps: int) -> list[Lap]:
        began = time.perf_counter()
        step()  # compiles
        first = time.perf_counter() - began
        timed = laps(step, steps)
        facts["compile_seconds"] = max(0.0, first - timed[0].seconds)
        return timed

    return Side(check, run, facts)


if __name__ == "__main__":
    measure(open_side)
