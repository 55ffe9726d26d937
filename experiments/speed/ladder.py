"""Where the factors come from: our own step, its rows laid out in five ways, one rung at a time.

    python -m experiments.speed.ladder --job=DIR/CELL/job.json --ladder=DIR/CELL/ladder.json

    padded         one response a row with its own copy of the prompt, filled up to the longest of
                   the step; the head at every position, its logits whole; the reference in the step
    cached         the same with the reference's log-probabilities given
    response_only  the head at tokens of responses only, in chunks
    shared         one prompt with all its responses a row, filled up to the longest
    packed         rows hold as many prompts as fit: what nca_jax does

Every rung is the same compiled step of `nca_jax.train_step` over other rows, so each must give the
same gradient; that is checked before it is timed. Steps are timed after one that is not. Rungs that
the file has are not run again.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import NamedTuple

import jax
import numpy as np

from experiments.speed.ours_side import compile_step, config_of, time_steps, train, with_reference
from nca_jax import build, programs
from nca_jax.batch import Batch, Rows
from nca_jax.data import plan
from nca_jax.data.group import Group
from nca_jax.data.pack import RowLayout, pack
from nca_jax.data.pipeline import Dataset
from nca_jax.infra.records import git_commit
from nca_jax.params import open_base, start_params

BLOCK = 64  # attention block, as configs/jsonl.py has it


class Rung(NamedTuple):
    one_response_a_row: bool
    one_prompt_a_row: bool
    whole_logits: bool
    live: bool


RUNGS = {
    "padded": Rung(True, True, True, True),
    "cached": Rung(True, True, True, False),
    "response_only": Rung(True, True, False, False),
    "shared": Rung(False, True, False, False),
    "packed": Rung(False, False, False, False),
}


def lay_out(rows: list[dict], packed: Batch, rung: Rung) -> Batch:
    """Returns the step's batch with its rows laid out as the rung has it.

    A micro-batch holds one prompt: K rows of a response each, or one row of all.
    """
    num_prompts, k = packed.scores.shape
    groups = [groups_of(row, rung) for row in rows]
    longest = max(sum(group.lengths()) for of_prompt in groups for group in of_prompt)
    row_len = -(-longest // BLOCK) * BLOCK
    layout = RowLayout(
        row_len=row_len,
        rows=len(groups[0]),
        block=BLOCK,
        num_pairs=plan.causal_bound(row_len, BLOCK),
        align=1,
    )
    slots = np.arange(num_prompts * k).reshape(num_prompts, len(groups[0]), -1)
    micros = [
        pack(of_prompt, layout, slots=of_groups, num_slots=num_prompts * k)[0]
        for of_prompt, of_groups in zip(groups, slots, strict=True)
    ]
    laid_out = Rows(*map(np.concatenate, zip(*micros, strict=True)))
    micro = np.arange(num_prompts, dtype=np.int32)
    batch = packed._replace(rows=laid_out, num_micro=np.int32(num_prompts), micro_of_prompt=micro)
    return score_everything(batch) if rung.whole_logits else batch


def groups_of(row: dict, rung: Rung) -> list[Group]:
    """Returns a prompt with its responses as one group, or as one group a response."""
    prompt, responses = row["prompt_ids"], row["response_ids"]
    if not rung.one_response_a_row:
        return [Group(prompt, responses)]
    return [Group(prompt, [ids]) for ids in responses]


def score_everything(batch: Batch) -> Batch:
    """Returns the batch with the head at every position: what no response needs goes to no one.

    A prompt more, of which no response is there, collects it; an absent one adds no loss.
    """
    slots = batch.scores.size
    logp_slot = batch.rows.logp_slot  # `slots` stands for none, and now is the first new one
    rows = batch.rows._replace(logp_slot=np.where(logp_slot >= slots, slots, logp_slot))

    def with_absent(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.zeros_like(x[:1])])

    return batch._replace(
        rows=rows,
        micro_of_prompt=np.append(batch.micro_of_prompt, -1).astype(np.int32),
        scores=with_absent(batch.scores),
        mask=with_absent(batch.mask),
        lengths=with_absent(batch.lengths),
        ref_logps=None if batch.ref_logps is None else with_absent(batch.ref_logps),
    )


def run_of(job: dict, batch: Batch, rung: Rung) -> build.Run:
    """Returns the run whose config has the batch's row length and, for whole logits, one chunk."""
    _, num_rows, row_len = batch.rows.tokens.shape
    chunk = max(n * BLOCK for n in (1, 2, 3, 4) if row_len % (n * BLOCK) == 0)
    chunk = row_len if rung.whole_logits else chunk
    flags = [f"--config.data.row_len={row_len}", f"--config.data.rows={num_rows}"]
    flags += [f"--config.loss.logits_chunk={chunk}"]
    return build.build(config_of(job | {"ours_flags": flags}, "fast", live=rung.live))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--ladder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    job = json.loads(args.job.read_text()) | {"ours_flags": []}
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    run = build.build(config_of(job, "fast", live=False))
    host = Dataset(build.read_data(run).sources, run.config.data, seed=0).batch_at(0)
    with jax.set_mesh(run.mesh):
        params = start_params(run, run.config.model.init_from)
        ref_logps = np.asarray(programs.jit_step_logps(run)(params, host.batch))
    del params

    found = json.loads(args.ladder.read_text()) if args.ladder.exists() else {}
    for name, rung in RUNGS.items():
        if name in found:
            continue
        packed = with_reference(host, None if rung.live else ref_logps).batch
        batch = lay_out(rows, packed, rung) if rung.one_prompt_a_row else packed
        laid_out = host._replace(batch=batch)
        run = run_of(job, batch, rung)
        with jax.set_mesh(run.mesh):
            program = compile_step(run, open_base(run), batch, live=rung.live)
            state, metrics = train(program, program.start(), laid_out)  # touches the memory, too
            grad_norm = metrics["grad_norm"]
            first = next(iter(found.values()), {"grad_norm": grad_norm})["grad_norm"]
            if abs(grad_norm / first - 1) > 1e-3:
                raise SystemExit(f"{name}: gradient norm {grad_norm}, of the first rung {first}.")
            seconds = median(
                lap.seconds for lap in time_steps(program, state, laid_out, args.steps)
            )
        slots = int(batch.num_micro) * int(np.prod(batch.rows.tokens.shape[1:]))
        measured = {"seconds": seconds, "slots": slots, "commit": git_commit()}
        found[name] = measured | {"grad_norm": grad_norm}
        args.ladder.write_text(json.dumps(found, indent=2) + "\n")
        print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
