r"""Sample responses to prompts.

    python -m nca_jax.generate --workdir=DIR --prompts=FILE --out=FILE [--step=N|best]
        [--format=alpaca_eval|mt_bench|arena_hard|ifeval]

--config   a config file or nca_jax:NAME, with its arguments; by default that of the run in
           --workdir; --help_config lists all fields
--prompts  JSON lines with a "prompt" (text or messages); other keys, an "answer", go along
--out      the same records with "responses", whether each is "finished" or was cut off at
           generate.max_new_tokens, their ids, and "scores" where config.generate.scorer names a
           scorer (see nca_jax.score): nca_jax.train reads them as they were sampled
--format   --prompts is the question file of a judge, and --out the answers as it reads them, one to
           each question; the name of the model is that of --out. MT-bench's questions are asked in
           two turns, at its own temperature for each category. See nca_jax.data.questions
--workdir  of a training run; without it the model of init_from
--step     of a checkpoint that was kept, or best by checkpoint.best_metric; by default the latest

What is sampled is kept in OUT.pieces until OUT is whole: after a stop the same command goes on from
there, and gives the same responses. A prompt is cut, refused or skipped as in training:
data.max_prompt_len, too_long and bad_rows.
"""

import json

import jax
from ml_collections import ConfigDict

from nca_jax import auto, build
from nca_jax.axes import Params
from nca_jax.checks import UserError, run_main
from nca_jax.config import flatten
from nca_jax.data import pieces, questions
from nca_jax.data.load import load_prompts, notes_of
from nca_jax.data.questions import Round
from nca_jax.files import AnyPath, out_file, out_folder
from nca_jax.flags import parse_flags
from nca_jax.infra import distributed, lock
from nca_jax.infra.fingerprint import params_fingerprint, text_fingerprint
from nca_jax.infra.progress import phase
from nca_jax.infra.records import date_of
from nca_jax.params import policy_params
from nca_jax.programs import serving_run
from nca_jax.rewards.scorers import check_scorer
from nca_jax.rollout import Record, check_scorable, open_scorer, rollout_batches, with_scores


def main(argv: list[str]) -> int:
    config, flags = parse_flags(
        argv, sections=("generate",), prompts=None, out=None, workdir="", step="", format=""
    )
    form = questions.get_format(flags.format)
    config = config if form is None else one_answer_each(config)
    check_scorer(config.generate.scorer)
    out = out_file(flags.out)
    run = build.build(config, date=date_of(flags.workdir))
    for line in auto.chosen(config, run.config):
        print(line)
    config = run.config
    scorer = open_scorer(config.generate.scorer, config.mesh, dtype=config.model.dtype)
    if run.tokenizer is None:
        raise UserError("Generation needs a tokenizer: set config.data.tokenizer.")
    temperature, asked, notes = config.generate.temperature, [], []
    with phase("reading and encoding the prompts"):
        if form is None:
            prompts, counts = load_prompts(flags.prompts, run.encoder)
            rounds, notes = [Round(temperature, lambda _: prompts)], notes_of(counts)
        else:
            asked = questions.read_questions(flags.prompts, form, temperature)
            rounds = questions.rounds_of(asked, run.encoder)
            prompts = rounds[0].prompts([])
    for note in notes:
        print(note)
    check_scorable(prompts, scorer)
    whole = [[prompt.ids.tolist(), prompt.record] for prompt in prompts]
    if form is not None:
        whole += [flags.format, [question.record for question in asked]]
    made_from = {
        "config": text_fingerprint(json.dumps(flatten(config))),
        "prompts": text_fingerprint(json.dumps(whole)),
        "tokenizer": run.encoder.digest,
    }
    distributed.check_same(prompts=made_from["prompts"])
    # A model that nothing trains comes to where it samples, in the dtype of its file.
    opened = run if flags.workdir else serving_run(run)
    with jax.set_mesh(opened.mesh):
        params = policy_params(opened, flags.workdir, flags.step, dtype="")
        made_from["parameters"] = params_fingerprint(params)
    with jax.set_mesh(run.mesh):
        with lock.held(out_folder(pieces.folder_of(out))):
            records = pieces.begin(out, made_from) if distributed.is_first() else []
            records = distributed.json_from_first(records)
            records = sample_rounds(run, params, rounds, out, records)
            if form is None:  # a scorer that is a model is run by all
                records = with_scores(prompts, records if distributed.is_first() else [], scorer)
            if not distributed.is_first():
                return 0
            if form is None:
                pieces.finish(out, records)
            else:
                of_each = zip(asked, questions.answers_of(asked, records), strict=True)
                answers = [form.answer(q.record, given, out.stem) for q, given in of_each]
                pieces.finish(out, answers, is_list=form.is_list)
    cut_off = sum(not finished for record in records for finished in record["finished"])
    what, of_them = f"{len(records)} prompts x {config.generate.num_samples} responses", "of them"
    if form is not None:
        what, of_them = f"answers to {len(asked)} questions as {flags.format} reads them", "turns"
    print(
        f"{what} in {out}, {cut_off} {of_them} cut off at "
        f"generate.max_new_tokens={config.generate.max_new_tokens}"
    )
    return 0


def one_answer_each(config: ConfigDict) -> ConfigDict:
    """Returns the config of answers for a judge, who wants one to each question and no scores."""
    changed = ConfigDict(config.to_dict())
    changed.generate.update(num_samples=1, scorer="")
    if flatten(changed) != flatten(config):
        print("one answer to each question, not scored: generate.num_samples=1, scorer=''")
    return changed.lock()


def sample_rounds(
    run: build.Run, params: Params, rounds: list[Round], out: AnyPath, records: list[Record]
) -> list[Record]:
    """Returns the records of all rounds, and keeps each batch of them in pieces.

    Args:
      records: those that a stopped command has left: the first ones.
    """
    first = 0
    for number, round in enumerate(rounds):
        prompts = round.prompts(records)
        start = min(max(len(records) - first, 0), len(prompts))
        first += len(prompts)
        if start:
            print(f"goes on after {start} of {len(prompts)} prompts")
        if start == len(prompts):
            continue
        here = build.with_generate(run, temperature=round.temperature)
        with phase(f"sampling responses to {len(prompts) - start} prompts"):
            for batch in rollout_batches(here, params, prompts, run.config.seed + number, start):
                if distributed.is_first():
                    pieces.add(out, len(records), batch)
                records += batch
        records = distributed.json_from_first(records)  # a later round is asked after them
    return records


if __name__ == "__main__":
    run_main(
        distributed.together(main),
        interrupted="what was sampled is kept in OUT.pieces; the same command goes on from there",
    )
