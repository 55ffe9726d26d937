"""The released computation in PyTorch: float32, or matmuls in bfloat16 where the side says bf16.

The preload that lets MKL take its fast road is set by whoever starts the process.
"""

from pathlib import Path

import torch

from experiments.speed.clock import Lap, Side, laps, measure
from experiments.torch_parity import released


def open_side(job: dict, side: str) -> Side:
    settings = released.Settings(
        loss=job["loss"],
        alpha=job["alpha"],
        beta=job["beta"],
        lr=job["lr"],
        steps=10**9,  # the rate stays where it is
        warmup_frac=0.0,
        first_bonus=0.0,
        adapter=Path(job["adapter"]) if job["adapter"] else None,
    )
    rows = released.read_records(job["rows"], job["k"])
    state = released.start(job["model"], settings)
    autocast = side.endswith("bf16")

    def step() -> tuple[float, float, torch.Tensor, torch.Tensor]:
        loss, logps, ref_logps = released.gradients(state, rows, settings, autocast=autocast)
        return loss, released.update(state, settings), logps, ref_logps

    def check() -> dict:
        loss, grad_norm, logps, ref_logps = step()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            after = torch.stack([released.response_logps(state.policy, row, None) for row in rows])
        scores = torch.tensor([row.scores for row in rows])
        rewards = settings.beta * (after - ref_logps)
        loss_after = released.loss_of(rewards, scores, settings)
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "logps": logps.tolist(),
            "loss_after": loss_after.item(),
            "logps_after": after.tolist(),
        }

    def run(steps: int) -> list[Lap]:
        released.gradients(state, rows[:1], settings, autocast=autocast)  # nothing to compile
        return laps(step, steps)

    return Side(check, run, {"reference": "live"})


if __name__ == "__main__":
    measure(open_side)
