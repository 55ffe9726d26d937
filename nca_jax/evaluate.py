r"""Evaluate a policy on held-out prompts: python -m nca_jax.evaluate --config=... --workdir=DIR.

Prints, and writes to --out (by default DIR/evaluation.json): the held-out metrics of training, KL
to the reference on the policy's own samples, and a scorer's mean reward on samples of policy and
reference, with their length and repetition: a reward may be bought by breaking the language.
Without --workdir it evaluates the model of init_from.

    --num_prompts  held-out prompts to sample responses for; 0: none, so no KL and no rewards
    --judge        a second scorer (see nca_jax.score), which was not trained on
    --text         a file of plain text, paragraphs apart by empty lines: the perplexity of both
"""

import re

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nca_jax import build, programs
from nca_jax.checks import UserError, run_main
from nca_jax.data.encode import Example
from nca_jax.data.pipeline import eval_batches
from nca_jax.data.room import row_layout
from nca_jax.evaluators import (
    Piece,
    fill_reference,
    heldout_metrics,
    length,
    make_kl,
    repetition,
    score_responses,
    text_perplexity,
)
from nca_jax.files import as_path
from nca_jax.flags import parse_flags
from nca_jax.infra import checkpoint, distributed
from nca_jax.infra.mesh import compiler_options, rows_here
from nca_jax.params import policy_params, reference_init_from, start_params
from nca_jax.rewards.scorers import get_scorer
from nca_jax.rollout import make_generator, to_text


def main(argv: list[str]) -> int:
    config, flags = parse_flags(
        argv, sections=("generate",), workdir="", out="", num_prompts=64, judge="", text=""
    )
    out = as_path(flags.out or as_path(flags.workdir or ".") / "evaluation.json")
    scorers = {"reward": get_scorer(config.generate.scorer), "judge": get_scorer(flags.judge)}
    run = build.build(config)
    texts = read_texts(run, flags.text) if flags.text else []
    data = build.read_data(run)
    if not data.heldout:
        raise UserError("No rows are held out: set data.eval_fraction or data.eval_files.")
    with jax.set_mesh(run.mesh):
        policy = policy_params(run, flags.workdir)
        reference = start_params(run, reference_init_from(config))
        step_logps = programs.jit_step_logps(run)
        here = rows_here(run.mesh, config.data.rows)
        batches = eval_batches(data.heldout, config.data, rows_here=here)
        batches = fill_reference(step_logps, reference, batches)
        metrics = heldout_metrics(step_logps, policy, batches, config)
        heldout = data.heldout[: flags.num_prompts]
        samples = {}
        if heldout:
            sampled, samples = sample_metrics(run, policy, reference, heldout, scorers)
            metrics |= sampled
        if texts:
            metrics |= perplexities(run, policy, reference, texts)
    if distributed.is_first():
        checkpoint.write_json(out, {"metrics": metrics, "samples": samples})
    for name, value in metrics.items():
        print(f"{name:20s} {value:.4f}")
    print(f"written to {out}")
    return 0


def sample_metrics(
    run: build.Run, policy: dict, reference: dict, heldout, scorers: dict
) -> tuple[dict, list]:
    """Samples responses of policy and reference to held-out prompts, with the same random keys.

    Args:
      scorers: {metric: scorer or None}.
    Returns:
      {"kl" nats a response, "length" tokens, "repetition", and the mean of each scorer}, those of
      the reference as "NAME_reference"; and [{"prompt", "policy", "policy_scores", ...}], the texts
      with their rewards.
    """
    generate = make_generator(run)
    prompts = [example.prompt for example in heldout]
    drawn = {
        "policy": generate(policy, prompts, run.config.seed),
        "reference": generate(reference, prompts, run.config.seed),
    }
    metrics = {}
    if run.config.generate.temperature == 1 and run.config.generate.top_p == 1:
        metrics["kl"] = mean_kl(run, policy, reference, heldout, drawn["policy"])
    else:
        print("no KL: it is estimated on samples of generate.temperature=1 and top_p=1")
    rows = [{"prompt": str(example.prompt_text)} for example in heldout]
    for who, samples in drawn.items():
        suffix = "" if who == "policy" else f"_{who}"
        responses = [ids.tolist() for of_prompt in samples for ids in of_prompt]
        metrics[f"length{suffix}"] = length(responses)
        metrics[f"repetition{suffix}"] = repetition(responses)
        if run.tokenizer is None or not distributed.is_first():
            continue
        texts = [to_text(run, np.array(ids)) for ids in responses]
        asked = [{"prompt": row["prompt"]} for row in rows for _ in range(len(samples[0]))]
        scores = {name: scorer(asked, texts) for name, scorer in scorers.items() if scorer}
        metrics |= {f"{name}{suffix}": float(np.mean(x)) for name, x in scores.items()}
        for i, row in enumerate(rows):
            of_row = slice(i * len(samples[0]), (i + 1) * len(samples[0]))
            row[who] = texts[of_row]
            if "reward" in scores:
                row[f"{who}_scores"] = scores["reward"][of_row].tolist()
    return metrics, rows if run.tokenizer is not None and distributed.is_first() else []


def mean_kl(run: build.Run, policy: dict, reference: dict, heldout, drawn) -> float:
    """Returns KL(policy || reference), nats a response, on the policy's own samples."""
    config = run.config
    num_slots = len(heldout) * config.generate.num_samples
    kl = jax.jit(
        make_kl(
            run.model,
            num_slots=num_slots,
            block=config.data.block,
            chunk=config.loss.logits_chunk,
        ),
        out_shardings=NamedSharding(run.mesh, P()),
        compiler_options=compiler_options(run.mesh),
    )
    values = score_responses(
        lambda rows: kl(policy, reference, rows),
        [sampled_piece(*pair) for pair in zip(heldout, drawn, strict=True)],
        row_layout(config.data),
        num_slots=num_slots,
        mesh=run.mesh,
    )
    return float(np.mean(values))


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


def perplexities(run: build.Run, policy: dict, reference: dict, texts: list) -> dict[str, float]:
    """Returns {"text_perplexity", "text_perplexity_reference"} of plain text."""
    logps = programs.jit_rows_logps(run, len(texts))
    pieces = [Piece(ids[:1], [ids[1:]]) for ids in texts]
    found = {}
    for name, params in (("text_perplexity", policy), ("text_perplexity_reference", reference)):
        values = score_responses(
            lambda rows, params=params: np.asarray(logps(params, rows))[0],
            pieces,
            row_layout(run.config.data),
            num_slots=len(texts),
            mesh=run.mesh,
        )
        found[name] = text_perplexity(values, texts)
    return found


def sampled_piece(example: Example, responses: list[np.ndarray]) -> Piece:
    """Returns the example's prompt with sampled responses; an eos ends them, so all keys are on."""
    on = example.key_on and (example.key_on[0], [np.ones(len(ids), bool) for ids in responses])
    return Piece(example.prompt, responses, on)


if __name__ == "__main__":
    run_main(distributed.together(main))
