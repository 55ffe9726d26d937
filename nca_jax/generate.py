r"""Sample responses to prompts.

    python -m nca_jax.generate --workdir=DIR --prompts=FILE --out=FILE [--step=N|best]

--config   a config file or nca_jax:NAME, with its arguments; by default that of the run in
           --workdir; --help_config lists all fields
--prompts  JSON lines with a "prompt" (text or messages); other keys, an "answer", go along
--out      the same records with "responses", whether each is "finished" or was cut off at
           generate.max_new_tokens, their ids, and "scores" where config.generate.scorer names a
           scorer (see nca_jax.score): nca_jax.train reads them as they were sampled
--workdir  of a training run; without it the model of init_from
--step     of a checkpoint that was kept, or best by checkpoint.best_metric; by default the latest

What is sampled is kept in OUT.pieces until OUT is whole: after a stop the same command goes on from
there, and gives the same responses. A prompt is cut, refused or skipped as in training:
data.max_prompt_len, too_long and bad_rows.
"""

import json

import jax
import numpy as np

from nca_jax import auto, build
from nca_jax.checks import UserError, run_main
from nca_jax.config import flatten
from nca_jax.data import pieces
from nca_jax.data.load import load_prompts, notes_of
from nca_jax.files import out_file, out_folder
from nca_jax.flags import parse_flags
from nca_jax.infra import distributed, lock
from nca_jax.infra.fingerprint import params_fingerprint, text_fingerprint
from nca_jax.infra.progress import phase
from nca_jax.infra.records import date_of
from nca_jax.params import policy_params
from nca_jax.rollout import check_scorable, open_scorer, rollout_batches, with_scores


def main(argv: list[str]) -> int:
    config, flags = parse_flags(
        argv, sections=("generate",), prompts=None, out=None, workdir="", step=""
    )
    out = out_file(flags.out)
    run = build.build(config, date=date_of(flags.workdir))
    for line in auto.chosen(config, run.config):
        print(line)
    config = run.config
    scorer = open_scorer(config.generate.scorer, config.mesh, dtype=config.model.dtype)
    if run.tokenizer is None:
        raise UserError("Generation needs a tokenizer: set config.data.tokenizer.")
    with phase("reading and encoding the prompts"):
        prompts, counts = load_prompts(flags.prompts, run.encoder)
    for note in notes_of(counts):
        print(note)
    check_scorable(prompts, scorer)
    asked = [[prompt.ids.tolist(), prompt.record] for prompt in prompts]
    made_from = {
        "config": text_fingerprint(json.dumps(flatten(config))),
        "prompts": text_fingerprint(json.dumps(asked)),
        "tokenizer": run.encoder.digest,
    }
    distributed.check_same(prompts=made_from["prompts"])
    with jax.set_mesh(run.mesh):
        params = policy_params(run, flags.workdir, flags.step)
        made_from["parameters"] = params_fingerprint(params)
        with lock.held(out_folder(pieces.folder_of(out))):
            records = pieces.begin(out, made_from) if distributed.is_first() else []
            start = int(distributed.from_first(np.array(len(records), np.int32)))
            if start:
                print(f"goes on after {start} of {len(prompts)} prompts")
            with phase(f"sampling responses to {len(prompts) - start} prompts"):
                for batch in rollout_batches(run, params, prompts, config.seed, start):
                    if distributed.is_first():
                        pieces.add(out, len(records), batch)
                    records += batch
            records = with_scores(prompts, records, scorer)
            if not distributed.is_first():
                return 0
            pieces.finish(out, records)
    cut_off = sum(not finished for record in records for finished in record["finished"])
    print(
        f"{len(records)} prompts x {config.generate.num_samples} responses in {out}, {cut_off} of "
        f"them cut off at generate.max_new_tokens={config.generate.max_new_tokens}"
    )
    return 0


if __name__ == "__main__":
    run_main(
        distributed.together(main),
        interrupted="what was sampled is kept in OUT.pieces; the same command goes on from there",
    )
