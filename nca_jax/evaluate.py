r"""Evaluate a policy on held-out prompts.

    python -m nca_jax.evaluate --workdir=DIR [--step=N|best] [--config.section.field=value ...]

Prints, and writes to --out (by default DIR/evaluation.json): the held-out metrics of training, KL
to the reference on the policy's own samples, and a scorer's mean reward on samples of policy and
reference, with their length and repetition: a reward may be bought by breaking the language. Each
mean over prompts has its standard error, and on the screen an interval of 95%, which for what both
have is that of the differences at each prompt; the file has the values at each prompt too. Of a
held-out set with a name (data.eval_files=NAME=FILE) a metric is NAME/metric.
Without --workdir it evaluates the model of init_from. Of a reward model there are the held-out
metrics alone.

    --config       a config file or nca_jax:NAME, with its arguments; by default that of the run in
                   --workdir; --help_config lists all fields
    --workdir      of a training run
    --step         of a checkpoint that was kept, or best by checkpoint.best_metric; by default the
                   latest
    --reference    a model to compare with, as init_from takes it, or start: what the run began
                   from; by default the reference of the run, which may have none
    --num_prompts  held-out prompts to sample responses for; 0: none, so no KL and no rewards
    --out          a file; by default evaluation.json in --workdir
    --judge        a second scorer (see nca_jax.score), which was not trained on; one that is a
                   reward model has the run's mesh and dtype, as that of generate.scorer
    --judge_command  a command that says which of two responses is better: how often the policy wins
                   against the reference. It reads {"prompt", "a", "b"} a line and writes
                   {"winner": "a", "b" or "tie"}; each pair is asked in both orders. Both this and
                   --subset also give the share at equal lengths, and want the extra eval
    --subset       a key of the records, such as subset: also the accuracy of each of its values
    --text         a file of plain text, paragraphs apart by empty lines: the perplexity of both
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from nca_jax import build, programs
from nca_jax.axes import Params
from nca_jax.checks import UserError, run_main
from nca_jax.comparison import REFERENCE, comparison, table
from nca_jax.data.encode import Example, Prompt
from nca_jax.data.group import Group
from nca_jax.data.pipeline import EVAL, eval_batches
from nca_jax.evaluators import (
    errors_of,
    fill_reference,
    heldout_responses,
    length,
    metrics_of,
    repetition,
    text_perplexity,
    values_of,
)
from nca_jax.files import as_path, out_file, write_json
from nca_jax.flags import parse_flags
from nca_jax.infra import distributed
from nca_jax.infra.finite import bad_metrics
from nca_jax.infra.mesh import rows_here
from nca_jax.infra.progress import first_call, phase
from nca_jax.infra.records import date_of, score_unit_of
from nca_jax.params import policy_params
from nca_jax.reference import reference_params
from nca_jax.rewards.scorers import Scorer, check_scorer, score_all
from nca_jax.rollout import (
    Samples,
    check_scorable,
    draws_policy,
    make_generator,
    make_records,
    make_sample_kl,
    open_scorer,
)
from nca_jax.wins import accuracy_by_subset, check_subset, judged

START = "start"  # of --reference: the model that the run began from
OF_WHOM = {"policy": "", "reference": REFERENCE}  # how metrics are named


def main(argv: list[str]) -> int:
    config, flags = parse_flags(
        argv,
        sections=("generate",),
        workdir="",
        step="",
        out="",
        num_prompts=64,
        reference="",
        judge="",
        judge_command="",
        subset="",
        text="",
    )
    for name in (config.generate.scorer, flags.judge):
        check_scorer(name)
    if flags.reference:
        config = with_reference(config, flags.reference)
    beside = as_path(flags.workdir or ".") / "evaluation.json"
    is_missing = not flags.out and not beside.parent.exists()  # the workdir, as will be said
    out = beside if is_missing else out_file(flags.out or beside)
    if flags.judge_command or flags.subset:
        import sklearn  # noqa: F401  # pyright: ignore[reportMissingImports]  # before all the work
    run, data = build.read_all(
        config, date=date_of(flags.workdir), score_unit=score_unit_of(flags.workdir)
    )
    config = run.config
    is_reward = config.model.head == "reward"
    if is_reward:
        print("no samples: config.model.head='reward'")
        if flags.text or flags.judge or flags.judge_command or flags.reference:
            raise UserError(
                "--text, --judge, --judge_command and --reference are of policies, and this is a "
                "reward model."
            )
    how = {"mesh": config.mesh, "dtype": config.model.dtype}
    scorers = {
        "reward": None if is_reward else open_scorer(config.generate.scorer, **how),
        "judge": open_scorer(flags.judge, **how),
    }
    texts = read_texts(run, flags.text) if flags.text else []
    if not len(data.heldout):
        raise UserError("No records are held out: set data.eval_fraction or data.eval_files.")
    heldout = data.heldout[: 0 if is_reward else flags.num_prompts]
    for examples in data.splits.values() if flags.subset else ():
        check_subset(flags.subset, examples)
    for scorer in scorers.values():
        check_scorable([as_prompt(run, example) for example in heldout], scorer)
    with jax.set_mesh(run.mesh):
        policy = policy_params(run, flags.workdir, flags.step)
        reference = reference_params(run, policy)
        if flags.judge_command and reference is None:
            raise UserError(
                "--judge_command compares with the reference, and config.reference.kind='none': "
                f"give --reference={START}, or a model."
            )
        step_logps = first_call("the held-out metrics", programs.jit_step_logps(run))
        here = rows_here(run.mesh, config.data.rows)
        trained, by_prompt, shown, sampled, samples = {}, {}, [], {}, {}
        for split, examples in data.splits.items():
            batches = eval_batches(examples, config.data, rows_here=here)
            batches = fill_reference(step_logps, reference, batches)
            responses = heldout_responses(step_logps, policy, batches)
            values = values_of(responses, config)
            found, sizes = metrics_of(responses, config) | errors_of(values), {}
            if flags.subset:
                by_subset, sizes = accuracy_by_subset(flags.subset, examples, responses, config)
                found |= by_subset
            name = split.removeprefix(EVAL).removeprefix("/")
            of_set = f"{name}/" if name else ""
            found = {of_set + x: value for x, value in found.items()}
            sizes = {of_set + x: count for x, count in sizes.items()}
            trained |= found
            by_prompt |= {of_set + x: at_prompts for x, at_prompts in values.items()}
            shown += [f"\nthe responses in the data to {len(examples)} held-out prompts"]
            shown += table(found, len(examples), sizes)
        if len(heldout):
            sampled, values, samples = sample_metrics(run, policy, reference, heldout, scorers)
            by_prompt |= values
            if flags.judge_command and samples:
                with phase("asking the judge"):
                    sampled |= judged(flags.judge_command, samples)
        if texts:
            sampled |= perplexities(run, policy, reference, texts)
    metrics = {"n_heldout": len(data.heldout), "n": len(heldout)} | trained | sampled
    if bad := bad_metrics(metrics):
        raise UserError(f"{bad}: the parameters are too large for these numbers to be finite.")
    if distributed.is_first():
        of_prompts = {name: values.tolist() for name, values in by_prompt.items()}
        write_json(out, {"metrics": metrics, "by_prompt": of_prompts, "samples": samples})
    print(*shown, sep="\n")
    if sampled:
        print(f"\nsampled responses to {len(heldout)} held-out prompts")
        print(*table(sampled, len(heldout)), sep="\n")
    print(f"written to {out}")
    return 0


def with_reference(config: ConfigDict, reference: str) -> ConfigDict:
    """Returns the config with a live reference: START, or a model, as init_from takes it."""
    config = config.copy_and_resolve_references()
    init_from = "" if reference == START else reference
    config.reference.update(kind="live", init_from=init_from, cache="")
    return config


def sample_metrics(
    run: build.Run,
    policy: Params,
    reference: Params | None,
    heldout: Sequence[Example],
    scorers: dict[str, Scorer | None],
) -> tuple[dict[str, float], dict[str, np.ndarray], list[dict[str, Any]]]:
    """Samples responses of policy and reference to held-out prompts, with the same random keys.

    Args:
      scorers: {metric: scorer or None}.
    Returns:
      `comparison` of "kl" nats a response, "length" tokens, "repetition" and each scorer; the
      values at each prompt that these are means of; and
      [{"prompt", "policy", "policy_scores", ...}], the texts with their rewards.
    """
    generate = make_generator(run)
    ids = [example.group.prompt for example in heldout]
    drawn = {"policy": generate(policy, ids, run.config.seed)}
    if reference is not None:
        drawn["reference"] = generate(reference, ids, run.config.seed)
    kl = {}
    if reference is None:
        print(f"no KL: config.reference.kind='none'; --reference={START} has one")
    elif draws_policy(run):
        kl = {"policy": kl_of_prompts(run, policy, reference, heldout, drawn["policy"])}
    else:
        print("no KL: its samples want generate.temperature=1, top_p=1, top_k=0 and min_p=0")
    prompts = [as_prompt(run, example) for example in heldout]
    told = [{"prompt": prompt.record.get("prompt")} for prompt in prompts]
    values = {name: {} for name in (*scorers, "length", "repetition")}  # {who: [prompts]} of each
    for who, samples in drawn.items():
        responses = [[ids.tolist() for ids in of_prompt] for of_prompt in samples]
        values["length"][who] = np.array([length(of_prompt) for of_prompt in responses])
        values["repetition"][who] = np.array([repetition(of_prompt) for of_prompt in responses])
        if run.tokenizer is None:
            continue
        records = make_records(run, prompts, samples, None)
        texts = [record["responses"] for record in records]
        for one, of_prompt in zip(told, texts, strict=True):
            one[who] = of_prompt
        for name, scorer in scorers.items():
            if scorer is None or not (scorer.digest or distributed.is_first()):
                continue
            with phase(f"scoring the {who}'s responses"):
                scores = score_all(scorer, [prompt.record for prompt in prompts], texts)
            values[name][who] = np.array([np.mean(of_prompt) for of_prompt in scores])
            if name == "reward":
                for one, of_prompt in zip(told, scores, strict=True):
                    one[f"{who}_scores"] = of_prompt
    metrics, by_prompt = {}, {}
    for name, by_who in (values | {"kl": kl}).items():
        if by_who:
            metrics |= comparison(name, **by_who)
            by_prompt |= {name + OF_WHOM[who]: x for who, x in by_who.items()}
    is_told = run.tokenizer is not None and distributed.is_first()
    return metrics, by_prompt, told if is_told else []


def as_prompt(run: build.Run, example: Example) -> Prompt:
    """Returns the prompt of an example; of one that was ids the text is what they decode to."""
    record = example.record
    if "prompt" not in record and run.tokenizer is not None:
        record = {"prompt": run.tokenizer.decode(example.group.prompt)} | record
    return Prompt(example.where, example.group.prompt, record)


def kl_of_prompts(
    run: build.Run,
    policy: Params,
    reference: Params,
    heldout: Sequence[Example],
    drawn: Samples,
) -> np.ndarray:
    """Returns KL(policy || reference), nats a response, on each prompt's own samples, [prompts]."""
    groups = [sampled_group(*pair) for pair in zip(heldout, drawn, strict=True)]
    values = make_sample_kl(run, len(heldout))(policy, reference, groups)
    return values.reshape(len(heldout), -1).mean(axis=1)


def read_texts(run: build.Run, file: str) -> list[list[int]]:
    """Returns the paragraphs of a file of plain text as token ids.

    Raises:
      UserError: there is no such file, no tokenizer, or a paragraph of one token or none.
    """
    if run.tokenizer is None:
        raise UserError("--text needs a tokenizer: set config.data.tokenizer.")
    path = as_path(file)
    if not path.exists():
        raise UserError(f"--text={file} is not there; give a file of plain text.")
    paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf-8").strip())
    texts = [
        run.tokenizer.encode(" ".join(paragraph.split()), add_special_tokens=False)
        for paragraph in paragraphs
    ]
    if min(map(len, texts)) < 2:
        raise UserError(f"--text={file} has a paragraph of less than two tokens; give longer ones.")
    return texts


def perplexities(
    run: build.Run, policy: Params, reference: Params | None, texts: list[list[int]]
) -> dict[str, float]:
    """Returns {"text_perplexity", "text_perplexity_reference"} of plain text."""
    logps = programs.make_group_logps(run, len(texts))
    groups = [Group(ids[:1], [ids[1:]]) for ids in (np.array(text, np.int32) for text in texts)]
    found = {}
    of_whom = {"text_perplexity": policy, "text_perplexity_reference": reference}
    for name, params in of_whom.items():
        if params is None:
            continue
        found[name] = text_perplexity(logps(params, groups), texts)
    return found


def sampled_group(example: Example, responses: list[np.ndarray]) -> Group:
    """Returns the example's prompt with sampled responses; an eos ends them, so all keys are on."""
    prompt, _, key_on, _ = example.group
    on = key_on and (key_on[0], [np.ones(len(ids), bool) for ids in responses])
    return Group(prompt, responses, on)


if __name__ == "__main__":
    run_main(distributed.together(main))
