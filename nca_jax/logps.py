r"""Write the log-probability of every response: python -m nca_jax.logps --config=... --out=FILE.

--config   a config file or nca_jax:NAME, with its arguments; by default that of --workdir's run
--out      JSON lines, one a record, those to train on before those held out:
               where          "file:line" of the record
               split          "train" or "eval"; "eval/NAME" of a held-out set that has a name
               prompt_hash    equal for equal prompts; what data.eval_fraction goes by
               lengths        tokens of each response that are scored
               scores         of each response, as the losses read them
               logps          of each response under the policy, nats, summed over its tokens; of a
                              reward model its value
               ref_logps      the same under the reference; not there with reference.kind=none
--workdir  of a training run: its latest checkpoint; without it the model of init_from

All responses of a record are there, whatever data.num_responses is. What is made is kept in
OUT.pieces until OUT is whole: after a stop the same command goes on from there.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nca_jax import build, programs
from nca_jax.checks import run_main
from nca_jax.config import flatten
from nca_jax.data import pieces
from nca_jax.data.encode import Example
from nca_jax.data.table import joined
from nca_jax.files import out_file, out_folder
from nca_jax.flags import parse_flags
from nca_jax.infra import distributed, lock
from nca_jax.infra.fingerprint import params_fingerprint, text_fingerprint
from nca_jax.infra.records import date_of, score_unit_of
from nca_jax.params import policy_params
from nca_jax.reference import examples_fingerprint, reference_params

PIECE = 64  # records that a stop can lose


def main(argv: list[str]) -> int:
    config, flags = parse_flags(argv, out=None, workdir="")
    out = out_file(flags.out)
    run, data = build.read_all(
        config, date=date_of(flags.workdir), score_unit=score_unit_of(flags.workdir)
    )
    config = run.config
    splits = {"train": data.training} | data.splits
    examples = joined(list(splits.values()))
    names = [split for split, table in splits.items() for _ in range(len(table))]
    made_from = {
        "config": text_fingerprint(json.dumps(flatten(config))),
        "records": examples_fingerprint(examples),
    }
    distributed.check_same(records=made_from["records"])
    with jax.set_mesh(run.mesh):
        policy = policy_params(run, flags.workdir)
        models = {"logps": policy}
        if (reference := reference_params(run, policy)) is not None:
            models["ref_logps"] = reference
        made_from |= {name: params_fingerprint(params) for name, params in models.items()}
        logps = programs.make_group_logps(run, PIECE * int(examples.entries["count"].max()))
        with lock.held(out_folder(pieces.folder_of(out))):
            records = pieces.begin(out, made_from) if distributed.is_first() else []
            start = int(distributed.from_first(np.array(len(records), np.int32)))
            if start:
                print(f"goes on after {start} of {len(examples)} records")
            for i in range(start, len(examples), PIECE):
                piece = list(zip(names[i : i + PIECE], examples[i : i + PIECE], strict=True))
                groups = [example.group for _, example in piece]
                found = {name: logps(params, groups) for name, params in models.items()}
                if distributed.is_first():
                    pieces.add(out, i, as_records(piece, found))
                    records += as_records(piece, found)
            if distributed.is_first():
                pieces.finish(out, records)
    print(f"{len(examples)} records in {out}: {', '.join(models)} of each of their responses")
    return 0


def as_records(
    examples: Sequence[tuple[str, Example]], found: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Returns what is written of examples.

    Args:
      examples: each with its split.
      found: {name: [responses of all examples] float32 nats}.
    """
    ends = np.cumsum([len(example.scores) for _, example in examples])[:-1]
    parts = {name: np.split(values, ends) for name, values in found.items()}
    return [
        {
            "where": example.where,
            "split": split,
            "prompt_hash": example.prompt_hash,
            "lengths": example.group.lengths()[1:],
            "scores": example.scores.tolist(),
        }
        | {name: of_each[i].tolist() for name, of_each in parts.items()}
        for i, (split, example) in enumerate(examples)
    ]


if __name__ == "__main__":
    run_main(
        distributed.together(main),
        interrupted="what was made is kept in OUT.pieces; the same command goes on from there",
    )
