r"""Sample responses: python -m nca_jax.generate --config=FILE[:args] --prompts=FILE --out=FILE.

--prompts  JSON lines with a "prompt" (text or messages); other keys, an "answer", go along
--out      the same rows with "responses", and "scores" where config.generate.scorer names a scorer
           (see nca_jax.score): rows that nca_jax.train reads as they are
--workdir  of a training run: its latest checkpoint; without it the model of init_from
"""

import jax

from nca_jax import build
from nca_jax.checks import UserError, run_main
from nca_jax.data.chat import encode_prompt
from nca_jax.data.sources import JsonlSource, write_records
from nca_jax.flags import parse_flags
from nca_jax.infra import distributed
from nca_jax.params import policy_params
from nca_jax.rewards.scorers import get_scorer, score_records
from nca_jax.rollout import make_generator, to_text

ANSWERS = ("responses", "scores", "chosen", "rejected")  # of a row that had been answered before


def main(argv: list[str]) -> int:
    config, flags = parse_flags(argv, sections=("generate",), prompts=None, out=None, workdir="")
    scorer = get_scorer(config.generate.scorer)
    run = build.build(config)
    if run.tokenizer is None:
        raise UserError("Generation needs a tokenizer: set config.data.tokenizer.")
    source = JsonlSource(flags.prompts)
    rows = [source[i] for i in range(len(source))]
    for where, row in rows:
        if not row.get("prompt"):
            raise UserError(f"{where}: wanted a 'prompt', got the keys {sorted(row)}.")
    prompts = [row["prompt"] for _, row in rows]

    with jax.set_mesh(run.mesh):
        params = policy_params(run, flags.workdir)
        encoded = [encode_prompt(prompt, run.tokenizer, config.data.format) for prompt in prompts]
        samples = make_generator(run)(params, encoded, config.seed)
    if not distributed.is_first():
        return 0
    texts = [[to_text(run, ids) for ids in of_prompt] for of_prompt in samples]

    answered = [
        {key: x for key, x in row.items() if key not in ANSWERS} | {"responses": responses}
        for (_, row), responses in zip(rows, texts, strict=True)
    ]
    write_records(flags.out, score_records(answered, scorer) if scorer else answered)
    print(f"{len(prompts)} prompts x {config.generate.num_samples} responses in {flags.out}")
    return 0


if __name__ == "__main__":
    run_main(distributed.together(main))
