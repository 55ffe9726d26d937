"""The released computation in PyTorch: float32, or matmuls in bfloat16 where the side says bf16.

Adapters' base is then bfloat16 throughout. On a GPU a step is waited for.
The preload that lets MKL take its fast road is set by whoever starts the process.
"""

from pathlib import Path

import torch

from experiments.speed.clock import Lap, Side, laps, measure
from experiments.torch_parity import released


def open_side(job: dict, side: str) -> Side:
    autocast = side.endswith("bf16")
    settings = released.Settings(
        loss=job["loss"],
        alpha=job["alpha"],
        beta=job["beta"],
        lr=job["lr"],
        steps=10**9,  # the rate stays where it is
        warmup_frac=0.0,
        first_bonus=0.0,
        adapter=Path(job["adapter"]) if job["adapter"] else None,
        device=job["device"],
        dtype="bfloat16" if autocast and job["adapter"] else "float32",
    )
    rows = released.read_records(job["rows"], job["k"])
    state = released.start(job["model"], settings)
    facts: dict[str, float | str] = {"reference": "live"}

    def step() -> tuple[float, float, torch.Tensor, torch.Tensor]:
        loss, logps, ref_logps = released.gradients(state, rows, settings, autocast=autocast)
        return loss, released.update(state, settings), logps, ref_logps

    def waited() -> None:
        step()
        if job["device"] == "cuda":
            torch.cuda.synchronize()

    def check() -> dict:
        loss, grad_norm, logps, ref_logps = step()
        with torch.no_grad(), torch.autocast(job["device"], dtype=torch.bfloat16, enabled=autocast):
            after = torch.stack([released.response_logps(state.policy, row, None) for row in rows])
        scores = torch.tensor([row.scores for row in rows], device=after.device)
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
        found = laps(waited, steps)
        if job["device"] == "cuda":
            facts["peak_bytes"] = torch.cuda.max_memory_allocated()
        return found

    return Side(check, run, facts)


if __name__ == "__main__":
    measure(open_side)
