r"""Score sampled responses, so that they can be trained on.

    python -m nca_jax.score --rows=generated.jsonl --out=scored.jsonl --scorer=NAME

--rows    JSON lines with "prompt" and "responses", as nca_jax.generate writes them
--out     the same records with their "scores", which nca_jax.train reads
--scorer  vader     how positive a text is, in [-1, 1]
          length    words
          answer    1 where a response ends in the record's "answer", else 0
          command:CMD   a command of one's own: it reads a JSON object a response from stdin (the
                    record with its "response") and writes {"score": number} a line to stdout

Generate, score, train, and again with --workdir of the last run: that is learning on-policy.
"""

from typing import Any

import numpy as np

from nca_jax.checks import UserError, run_main
from nca_jax.data.encode import check_prompt
from nca_jax.data.record import question
from nca_jax.data.sources import JsonlSource, RecordError, write_records
from nca_jax.files import out_file
from nca_jax.flags import parse_own_flags
from nca_jax.rewards.scorers import COMMAND, SCORERS, Scorer, get_scorer, score_all


def main(argv: list[str]) -> int:
    flags = parse_own_flags(argv, rows=None, out=None, scorer=None)
    scorer = get_scorer(flags.scorer)
    if scorer is None:
        raise UserError(f"--scorer is empty; give one of {', '.join(SCORERS)}, {COMMAND}CMD.")
    out, source = out_file(flags.out), JsonlSource(flags.rows)
    records = [check_record(*source[i], scorer) for i in range(len(source))]
    responses = [record["responses"] for record in records]
    scores = score_all(scorer, list(map(question, records)), responses)
    scored = [record | {"scores": found} for record, found in zip(records, scores, strict=True)]
    write_records(out, scored)
    print(
        f"{len(records)} prompts, {sum(map(len, scores))} responses in {out}: mean score "
        f"{np.mean(np.concatenate(scores)):.4f}, standard deviation within a prompt "
        f"{np.mean([np.std(found) for found in scores]):.4f}, all equal in "
        f"{np.mean([np.ptp(found) == 0 for found in scores]):.0%} of prompts"
    )
    return 0


def check_record(where: str, record: dict[str, Any], scorer: Scorer) -> dict[str, Any]:
    """Returns the record.

    Raises:
      RecordError: it has no prompt, or no responses of text.
      UserError: it lacks what the scorer wants.
    """
    try:
        check_prompt(record)
        responses = record.get("responses")
        if not isinstance(responses, list) or not responses:
            raise RecordError(
                f"wanted a list of 'responses', got the keys {sorted(record)}", reason="keys"
            )
        if not all(isinstance(text, str) for text in responses):
            raise RecordError("a response is not text; score those of generate", reason="text")
    except RecordError as error:
        raise error.at(where) from None
    scorer.check(where, question(record))
    return record


if __name__ == "__main__":
    run_main(main)
