"""TRL's DPOTrainer (K = 2), in its own training loop, in batches of 4 pairs.

`cached` precomputes the reference, as the trainer does when it is made; `live` runs it in the step.
"""

import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from experiments.speed.clock import Lap, Side, measure
from experiments.torch_parity import released, trl_trainer

MICRO_BATCH = 4  # pairs


class Stopwatch(TrainerCallback):
    """Keeps a lap for each step of the trainer."""

    def __init__(self):
        self.laps: list[Lap] = []
        self._start = Lap(0.0, 0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = Lap(time.perf_counter(), time.process_time())

    def on_step_end(self, args, state, control, **kwargs):
        start = self._start
        now = Lap(time.perf_counter() - start.seconds, time.process_time() - start.cpu_seconds)
        self.laps.append(now)


def open_side(job: dict, side: str) -> Side:
    rows = released.read_records(job["rows"], job["k"])
    micro = min(MICRO_BATCH, len(rows))

    def trainer_of(steps: int, folder: str) -> trl_trainer.OnTokenIds:
        return trl_trainer.make_trainer(
            job["model"],
            rows,
            settings_of(job)._replace(steps=steps, batch_size=micro),
            folder,
            gradient_accumulation_steps=len(rows) // micro,
            lr_scheduler_type="constant",
            precompute_ref_log_probs="cached" in side,
        )

    def check() -> dict:
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(1, folder)
            logps = torch.tensor(trl_trainer.pair_logps(trainer, rows))
            trainer.train()
            after = torch.tensor(trl_trainer.pair_logps(trainer, rows))
        rewards = job["beta"] * (after - logps)
        return {
            "loss": sum(trainer.losses) / len(trainer.losses),
            "grad_norm": trainer.state.log_history[0]["grad_norm"],
            "logps": logps.tolist(),
            "loss_after": released.PAIR_LOSSES[job["loss"]](*rewards.unbind(-1)).item(),
            "logps_after": after.tolist(),
            "ref_seconds": trainer.ref_seconds,
        }

    def run(steps: int) -> list[Lap]:
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(steps, folder)
            trainer.add_callback(watch)
            trainer.train()
        return watch.laps

    return Side(check, run, {"reference": "cached" if "cached" in side else "live"})


def settings_of(job: dict) -> released.Settings:
    return released.Settings(
        loss=job["loss"],
        beta=job["beta"],
        lr=job["lr"],
        warmup_frac=0.0,
        adapter=Path(job["adapter"]) if job["adapter"] else None,
    )


if __name__ == "__main__":
    measure(open_side)
