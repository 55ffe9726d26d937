r"""Train in rounds: sample responses to prompts, score them, train on them, and again.

    python -m nca_jax.rounds --config=FILE[:args] --prompts=FILE --scorer=NAME --workdir=DIR

--config   a config file or nca_jax:NAME, with its arguments, and a section `rounds`; --help_config
           lists all fields; without it that of the run in --workdir goes on
--prompts  JSON lines with a "prompt" (text or messages); other keys, an "answer", go along. Those
           that are held out by the config's data are left out
--scorer   what responses are rewarded by: see nca_jax.score
--workdir  of the run: a local folder or one on gs://

A round draws `rounds.prompts` prompts in the seed's order, each once before any twice; samples
`rounds.samples` responses to each by the policy of that moment; scores them; and trains on them for
`rounds.steps` steps. The schedule of the learning rate goes over all rounds. Of the config's own
data, which may be none (`data.files` empty), the held-out records alone are used. In DIR, beside
what nca_jax.train writes there:

    rounds/N/rollouts.jsonl  what was sampled in round N with its scores, which nca_jax.train reads
    rounds/N/train.jsonl     what of it is trained on
    rounds/N/round.json      the metrics of the round, also in metrics.jsonl, split "rounds"

Stopped anywhere, the same command goes on and ends with the same parameters, bit for bit.
"""

import contextlib
import json
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from nca_jax import advice, build
from nca_jax.axes import Params
from nca_jax.checks import UserError, run_main
from nca_jax.config import flatten
from nca_jax.config_check import check_config
from nca_jax.data.conversation import canonical
from nca_jax.data.encode import Prompt, hash_prompt
from nca_jax.data.load import load_examples, load_prompts, notes_of
from nca_jax.data.pack import segment_spans
from nca_jax.data.pipeline import Dataset, eval_batches
from nca_jax.files import AnyPath, out_folder, read_json, remove, write_json
from nca_jax.fit import fit
from nca_jax.flags import parse_flags
from nca_jax.infra import checkpoint, distributed, lock, progress
from nca_jax.infra.fingerprint import text_fingerprint, tokenizer_fingerprint
from nca_jax.infra.log import logged
from nca_jax.infra.mesh import rows_here
from nca_jax.infra.preemption import stop_asked
from nca_jax.infra.records import read_run, record_run
from nca_jax.infra.steps import saved_steps
from nca_jax.infra.writer import MetricWriter, SilentWriter
from nca_jax.one_round import TRAINED, Kit, folder_of, make_round, read_round, seed_of
from nca_jax.params import best_is_high, open_base
from nca_jax.programs import build_optimizer, jit_step_logps, jit_train_step, renewed
from nca_jax.reference import examples_fingerprint, make_reference
from nca_jax.rewards.scorers import check_scorer
from nca_jax.rollout import (
    check_scorable,
    draws_policy,
    make_batch_generator,
    make_sample_kl,
    open_scorer,
)
from nca_jax.saved_config import CONFIG, VERSION, check_same_run, config_json, read_saved
from nca_jax.start import make_evaluators, open_state
from nca_jax.train_step import Frozen, TrainState

SPLIT = "rounds"  # of metrics.jsonl
ONE = ConfigDict({"keep_last": 1, "best_metric": "", "on_damage": "stop"})


def main(argv: list[str]) -> int:
    config, flags = parse_flags(
        argv, sections=("rounds", "generate"), workdir=None, prompts=None, scorer=None
    )
    config = whole_run(config)
    if not flags.scorer:
        raise UserError("--scorer is empty; see nca_jax.score for those that there are.")
    check_scorer(flags.scorer)
    workdir = out_folder(flags.workdir, "--workdir")
    with lock.held(workdir) as check_held, logged(workdir, check_held):
        return rounds(config, workdir, flags.prompts, flags.scorer, check_held)


def whole_run(config: ConfigDict) -> ConfigDict:
    """Returns the config with the steps, K and samples that its rounds have.

    Raises:
      UserError: it wants what rounds do not have.
    """
    config = ConfigDict(config.to_dict())
    how, kind = config.rounds, config.reference.kind
    config.steps, config.epochs = how.number * how.steps, 0.0
    config.data.num_responses = config.generate.num_samples = how.samples
    for is_bad, message in (
        (
            kind == "cached",
            "config.reference.kind='cached' knows nothing of samples: set it to live, or with "
            "adapters to base",
        ),
        (
            how.reference == "previous" and kind != "live",
            "config.rounds.reference='previous' is the policy of the round before: set "
            "config.reference.kind='live'",
        ),
        (
            config.data.score_unit != "raw",
            f"config.data.score_unit={config.data.score_unit!r} is of records that are there "
            "before the first step: set it to raw",
        ),
        (
            bool(config.eval_patience),
            "config.eval_patience ends a run early, and rounds have a number: set it to 0",
        ),
        (
            config.generate.max_new_tokens > config.data.max_response_len,
            f"config.generate.max_new_tokens={config.generate.max_new_tokens} is more than is "
            f"trained on: raise config.data.max_response_len={config.data.max_response_len}",
        ),
    ):
        if is_bad:
            raise UserError(f"{message}.")
    check_config(config)
    return config.lock()


def rounds(
    config: ConfigDict,
    workdir: AnyPath,
    prompts_file: str,
    scorer_name: str,
    check_held: lock.CheckHeld,
) -> int:
    """Runs the rounds in a workdir that this process holds, and returns the exit status."""
    started = time.perf_counter()
    # ---- Mesh, model, prompts, held-out records ------------------------------------------------
    began, log_every = None, config.log_every
    if saved_steps(workdir):
        config = check_same_run(config, workdir / CONFIG)
        began, log_every = read_run(workdir), read_saved(workdir / CONFIG).log_every
    run = build.build(config, date=(began or {}).get("date", ""))
    if run.tokenizer is None:
        raise UserError("Rounds sample text, which needs a tokenizer: set config.data.tokenizer.")
    data = build.read_data(run)
    asked, counts = load_prompts(prompts_file, run.encoder)
    held, known = set(data.heldout.entries["prompt_hash"].tolist()), len(asked)
    asked = [prompt for prompt in asked if prompt_hash(prompt) not in held]
    for note in (*data.notes(), *notes_of(counts)):
        print(note)
    if len(asked) < known:
        print(f"{known - len(asked)} prompts are held out: left out of the rounds")
    if len(asked) < config.rounds.prompts:
        raise UserError(
            f"--prompts={prompts_file} has {len(asked)} prompts for config.rounds.prompts="
            f"{config.rounds.prompts}: give more, or lower it."
        )
    scorer = open_scorer(scorer_name, config.mesh, dtype=run.config.model.dtype)
    assert scorer is not None
    check_scorable(asked, scorer)
    longest = [run.config.generate.max_new_tokens] * config.rounds.samples
    lengths = [[len(prompt.ids), *longest] for prompt in asked]
    sizes = [segment_spans(of_row, 0, run.config.data.align)[-1][1] for of_row in lengths]
    run = build.settle(run, data, sizes, config.steps * config.data.batch_size, config)
    config, how = run.config, run.config.rounds
    digest = text_fingerprint(json.dumps([[p.ids.tolist(), p.record] for p in asked]))
    distributed.check_same(prompts=digest)

    with (
        contextlib.ExitStack() as until_saved,
        checkpoint.open_checkpoints(
            workdir, config.checkpoint, best_is_high=best_is_high(config)
        ) as checkpoints,
        jax.set_mesh(run.mesh),
    ):
        if distributed.is_first():
            until_saved.callback(checkpoint.remove_unfinished, workdir)
        # ---- Base, reference, state --------------------------------------------------------------
        base = open_base(run)
        reference = make_reference(run, base)
        now = {
            "reference": reference.fingerprint,
            "tokenizer": tokenizer_fingerprint(run.tokenizer),
            "eos_ids": list(run.eos_ids),
            "date": run.date,
            "records": f"{len(asked)} prompts",
            "prompts": digest,
            "heldout": f"{len(data.heldout)} ({examples_fingerprint(data.heldout)})",
            "scorer": f"{scorer_name} {scorer.digest}".strip(),
            "steps": config.steps,
        }
        for note in record_run(workdir, began, now):
            print(note)
        if distributed.is_first():
            write_json(workdir / CONFIG, config_json(config, VERSION))
        optimizer = build_optimizer(config, config.steps)
        state, restored_step = open_state(run, optimizer, checkpoints, base, reference)
        if restored_step is not None:
            print(f"resumed after step {restored_step} from {workdir}")
        frozen = Frozen(base, reference.params)

        made_from = {
            name: str(now[name]) for name in ("reference", "prompts", "tokenizer", "scorer")
        }
        made_from["config"] = text_fingerprint(json.dumps(flatten(config)))
        begin(workdir, made_from, is_new=restored_step is None)

        # ---- Compile -----------------------------------------------------------------------------
        here = rows_here(run.mesh, config.data.rows)
        heldout = {
            split: eval_batches(examples, config.data, rows_here=here)
            for split, examples in data.splits.items()
        }
        train_step = progress.first_call("a step", jit_train_step(run, optimizer, frozen))
        step_logps = progress.first_call("held-out log-probabilities", jit_step_logps(run))
        has_kl = draws_policy(run) and frozen.reference is not None
        kit = Kit(
            run,
            workdir,
            asked,
            scorer,
            sample=make_batch_generator(run),
            kl=make_sample_kl(run, how.prompts) if has_kl else None,
        )

        # ---- Rounds ------------------------------------------------------------------------------
        stop = until_saved.enter_context(stop_asked())
        was_asked = False

        def asked_to_stop() -> bool:
            nonlocal was_asked
            was_asked = was_asked or stop.asked()
            return was_asked

        writer = (
            MetricWriter(
                workdir,
                config.log,
                restored_step=restored_step,
                num_steps=config.steps,
                log_every=log_every,
                check_held=check_held,
            )
            if distributed.is_first()
            else SilentWriter()
        )
        first, evaluators = 0, None
        with contextlib.closing(writer):
            for number in range(1, how.number + 1):
                folder = folder_of(workdir, number)
                one = read_round(folder)
                if one is not None and one.first < int(state.step) >= one.last:  # it is over
                    first = one.last
                    continue
                if how.reference == "previous":
                    frozen = frozen._replace(reference=start_of_round(run, state, folder, first))
                if evaluators is None or how.reference == "previous":
                    evaluators = make_evaluators(run, step_logps, frozen, heldout)
                one = one or make_round(kit, frozen, state, number, asked_to_stop)
                if one is None:  # it is to stop
                    break
                if int(state.step) == first:
                    writer.write(first + 1, SPLIT, {"round": number} | one.metrics)
                    if number > 1 and how.optimizer == "new":
                        state = renewed(optimizer, state)
                if one.first < one.last:
                    dataset = Dataset(
                        load_examples(str(folder / TRAINED), run.encoder).sources,
                        unmixed(config),
                        seed=seed_of(config, number),
                        rows_here=here,
                        fewer=True,
                    )
                    state = fit(
                        run,
                        state,
                        frozen,
                        dataset.iterate(int(state.step) - first, how.steps),
                        train_step=train_step,
                        steps=one.last,
                        evaluators=evaluators,
                        writer=writer,
                        checkpoints=checkpoints,
                        asked_to_stop=asked_to_stop,
                    )
                if was_asked:
                    break
                if number > 1 and distributed.is_first():  # a later checkpoint is whole
                    remove(folder_of(workdir, number - 1) / "checkpoints")
                first = one.last

    # ---- Close -----------------------------------------------------------------------------------
    step = int(state.step)
    if was_asked:
        print(
            f"{stop.name}: stopped after step {step} of {config.steps}; the same command goes on."
        )
        return 0
    took = progress.duration(time.perf_counter() - started)
    print(f"done: {how.number} rounds, {step} steps in {workdir}, {took} since the start")
    if not step:  # and there is no checkpoint
        print(
            "no round had a signal, so nothing was trained: more rounds.samples, easier prompts or "
            "a scorer that says more than right and wrong give one"
        )
        return 0
    next_ones = advice.what_next(workdir, can_evaluate=bool(len(data.heldout)), can_sample=True)
    print(*next_ones, sep="\n")
    return 0


def begin(workdir: AnyPath, made_from: dict[str, str], is_new: bool) -> None:
    """Removes what an earlier start has sampled in a workdir from something else, and says so.

    A run that has a checkpoint was compared with what it began with.
    """
    folder = workdir / "rounds"
    path = folder / "made_from.json"
    if distributed.is_first():
        if is_new and path.exists() and read_json(path) != made_from:
            print(f"{folder} holds the samples of another start, and is made anew")
            remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, made_from)
    distributed.wait_for_first()


def start_of_round(run: build.Run, state: TrainState, folder: AnyPath, first: int) -> Params:
    """Returns the policy as it was at the start of a round, which is kept while the round lasts."""
    if int(state.step) != first:
        return checkpoint.restore_params(folder, run.model.abstract_trained(), run.mesh)
    if not saved_steps(folder):
        with checkpoint.open_checkpoints(folder, ONE) as kept:
            checkpoint.save(kept, state._replace(step=state.step + 1, opt_state=()), None)
    return jax.tree.map(jnp.copy, state.params)


def prompt_hash(prompt: Prompt) -> float:
    """Returns the hash by which it is held out, as that of an example."""
    return hash_prompt(canonical(prompt.record["prompt"]))


def unmixed(config: ConfigDict) -> ConfigDict:
    """Returns the data section without the weights of its own files."""
    data = config.data.copy_and_resolve_references()
    data.weights = ""
    return data


if __name__ == "__main__":
    run_main(
        distributed.together(main, saves_when_stopped=True),
        interrupted="what was sampled is kept; the same command goes on",
    )
