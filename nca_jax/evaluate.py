r"""Evaluate a policy on held-out prompts: python -m nca_jax.evaluate --config=... --workdir=DIR.

Prints, and writes to --out (by default DIR/evaluation.json): the held-out metrics of training, KL
to the reference on the policy's own samples, and a scorer's mean reward on samples of policy and
reference. Without --workdir it evaluates the model of init_from.

    --num_prompts  held-out prompts to sample responses for; 0: none, so no KL and no rewards
"""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nca_jax import build, checkpoint, distributed
from nca_jax.checks import UserError, run_main
from nca_jax.config import parse_flags
from nca_jax.data.encode import Example
from nca_jax.data.fit import row_layout
from nca_jax.data.pipeline import eval_batches
from nca_jax.decode import make_generator, to_text
from nca_jax.evaluators import Piece, fill_reference, heldout_metrics, make_kl, score_responses
from nca_jax.files import as_path
from nca_jax.mesh import compiler_options, rows_here
from nca_jax.rewards.scorers import get_scorer


def main(argv: list[str]) -> int:
    config, flags = parse_flags(argv, workdir="", out="", num_prompts=64)
    out = as_path(flags.out or as_path(flags.workdir or ".") / "evaluation.json")
    run = build.build(config)
    data = build.read_data(run)
    if not data.heldout:
        raise UserError("No rows are held out: set data.eval_fraction or data.eval_files.")
    with jax.set_mesh(run.mesh):
        policy = build.policy_params(run, flags.workdir)
        reference = build.start_params(run, build.reference_init_from(config))
        step_logps = build.jit_step_logps(run)
        here = rows_here(run.mesh, config.data.rows)
        batches = eval_batches(data.heldout, config.data, rows_here=here)
        batches = fill_reference(step_logps, reference, batches)
        metrics = heldout_metrics(step_logps, policy, batches, config)
        heldout = data.heldout[: flags.num_prompts]
        samples = {}
        if heldout:
            sampled, samples = sample_metrics(run, policy, reference, heldout)
            metrics |= sampled
    if distributed.is_first():
        checkpoint.write_json(out, {"metrics": metrics, "samples": samples})
    for name, value in metrics.items():
        print(f"{name:20s} {value:.4f}")
    print(f"written to {out}")
    return 0


def sample_metrics(run: build.Run, policy: dict, reference: dict, heldout) -> tuple[dict, list]:
    """Samples responses of policy and reference to held-out prompts, with the same random keys.

    Returns:
      {"kl" nats a response, "reward", "reward_reference"} (rewards where a scorer is configured),
      and [{"prompt", "policy", "reference"}], the texts.
    """
    config = run.config
    generate = make_generator(run)
    prompts = [example.prompt for example in heldout]
    drawn = {
        "policy": generate(policy, prompts, config.seed),
        "reference": generate(reference, prompts, config.seed),
    }
    metrics = {}
    if config.generate.temperature == 1 and config.generate.top_p == 1:
        num_slots = len(prompts) * config.generate.num_samples
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
            [sampled_piece(*pair) for pair in zip(heldout, drawn["policy"], strict=True)],
            row_layout(config.data),
            num_slots=num_slots,
            mesh=run.mesh,
        )
        metrics["kl"] = float(np.mean(values))
    else:
        print("no KL: it is estimated on samples of generate.temperature=1 and top_p=1")
    if run.tokenizer is None or not distributed.is_first():
        return metrics, []

    texts = {
        who: [[to_text(run, ids) for ids in responses] for responses in samples]
        for who, samples in drawn.items()
    }
    scorer = get_scorer(config.generate.scorer)
    rows = [{"prompt": str(example.prompt_text)} for example in heldout]
    for who, name in (("policy", "reward"), ("reference", "reward_reference")):
        for row, responses in zip(rows, texts[who], strict=True):
            row[who] = responses
            if scorer:
                scores = scorer([{"prompt": row["prompt"]}] * len(responses), responses)
                row[f"{who}_scores"] = [float(score) for score in scores]
        if scorer:
            metrics[name] = float(np.mean([row[f"{who}_scores"] for row in rows]))
    return metrics, rows


def sampled_piece(example: Example, responses: list[np.ndarray]) -> Piece:
    """Returns the example's prompt with sampled responses; an eos ends them, so all keys are on."""
    on = example.key_on and (example.key_on[0], [np.ones(len(ids), bool) for ids in responses])
    return Piece(example.prompt, responses, on)


if __name__ == "__main__":
    run_main(distributed.together(main))
