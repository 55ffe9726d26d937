r"""Score sampled responses, so that they can be trained on.

    python -m nca_jax.score --rows=generated.jsonl --out=scored.jsonl --scorer=NAME

--rows    JSON lines with "prompt" and "responses", as nca_jax.generate writes them
--out     the same rows with their "scores", which nca_jax.train reads
--scorer  vader     how positive a text is, in [-1, 1]
          length    words
          answer    1 where a response ends in the row's "answer", else 0
          command:CMD   a command of one's own: it reads a JSON object a response from stdin (the
                    row with its "response") and writes {"score": number} a line to stdout

Generate, score, train, and again with --workdir of the last run: that is learning on-policy.
"""

import numpy as np

from nca_jax.checks import UserError, run_main
from nca_jax.data.sources import JsonlSource, RecordError, write_records
from nca_jax.flags import parse_own_flags
from nca_jax.rewards.scorers import COMMAND, SCORERS, get_scorer, score_records


def main(argv: list[str]) -> int:
    flags = parse_own_flags(argv, rows=None, out=None, scorer=None)
    scorer = get_scorer(flags.scorer)
    if scorer is None:
        raise UserError(f"--scorer is empty; give one of {', '.join(SCORERS)}, {COMMAND}CMD.")
    source = JsonlSource(flags.rows)
    rows = [check_record(*source[i]) for i in range(len(source))]
    scored = score_records(rows, scorer)
    write_records(flags.out, scored)
    scores = [np.array(row["scores"]) for row in scored]
    ties = np.mean([np.ptp(of_row) == 0 for of_row in scores])
    print(
        f"{len(rows)} prompts, {sum(map(len, scores))} responses in {flags.out}: mean score "
        f"{np.mean(np.concatenate(scores)):.4f}, standard deviation within a prompt "
        f"{np.mean([of_row.std() for of_row in scores]):.4f}, all equal in {ties:.0%} of prompts"
    )
    return 0


def check_record(where: str, row: dict) -> dict:
    """Returns the row. Raises RecordError unless it has a prompt and responses of text."""
    responses = row.get("responses")
    if not row.get("prompt") or not isinstance(responses, list) or not responses:
        raise RecordError(
            f"wanted a 'prompt' and a list of 'responses', got the keys {sorted(row)}",
            reason="keys",
            where=where,
        )
    if not all(isinstance(text, str) for text in responses):
        raise RecordError(
            "a response is not text; score those of generate", reason="text", where=where
        )
    return row


if __name__ == "__main__":
    run_main(main)
