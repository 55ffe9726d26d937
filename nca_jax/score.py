r"""Score sampled responses, so that they can be trained on.

    python -m nca_jax.score --rows=generated.jsonl --out=scored.jsonl --scorer=NAME

--rows    JSON lines with "prompt" and "responses", as nca_jax.generate writes them
--out     the same records with their "scores", which nca_jax.train reads
--scorer  vader     how positive a text is, in [-1, 1]
          length    words
          answer    1 where a response ends in the record's "answer", else 0
          math      the same of mathematical values, which may be written in several ways
          ifeval    the share of the record's instructions that it follows, as IFEval checks them
          command:CMD   a command of one's own: it reads a JSON object a response from stdin (the
                    record with its "response") and writes {"score": number} a line to stdout
          reward_model:DIR   a reward model as transformers has them (a Hugging Face folder or hub
                    id of a ForSequenceClassification), with the tokenizer and chat template there;
                    of one with several labels reward_model:DIR:label=I
Of a reward model alone:
--dtype    of its activations: float32, or bfloat16, which is faster on a TPU or GPU
--row_len  tokens of a row, in which conversations are packed; by default as the texts want
--config   a config file or nca_jax:NAME, whose mesh it is split over (config.mesh); by default all
           devices of this host

What is scored is kept in OUT.pieces until OUT is whole: after a stop the same command goes on.
Generate, score, train, and again with --workdir of the last run: that is learning on-policy.
"""

import contextlib
import itertools
import json
import shlex
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from nca_jax.checks import UserError, run_main
from nca_jax.data import pieces
from nca_jax.data.encode import check_prompt
from nca_jax.data.record import question
from nca_jax.data.sources import JsonlSource, RecordError
from nca_jax.fields import DTYPES
from nca_jax.files import is_file, out_file, out_folder
from nca_jax.flags import parse_flags
from nca_jax.infra import distributed, lock
from nca_jax.infra.fingerprint import files_fingerprint, text_fingerprint
from nca_jax.infra.progress import phase
from nca_jax.rewards.scorers import COMMAND, KNOWN, Scorer, score_each
from nca_jax.rollout import open_scorer

PIECE = 64  # records that a stop can lose


def main(argv: list[str]) -> int:
    config, flags = parse_flags(
        argv, needs_config=False, rows=None, out=None, scorer=None, dtype="", row_len=0
    )
    if flags.dtype not in ("", *DTYPES):
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}; it is {flags.dtype!r}.")
    out, source = out_file(flags.out), JsonlSource(flags.rows)
    scorer = open_scorer(
        flags.scorer, config.mesh, dtype=flags.dtype or "float32", row_len=flags.row_len
    )
    if scorer is None:
        raise UserError(f"--scorer is empty; give one of {KNOWN}.")
    if not scorer.digest and ("config" in flags or flags.dtype or flags.row_len):
        raise UserError("--config, --dtype and --row_len are of a reward model: leave them out.")
    records = [check_record(*source[i], scorer) for i in range(len(source))]
    made_from = {
        "records": text_fingerprint(json.dumps(records)),
        "scorer": text_fingerprint(
            flags.scorer + files_fingerprint(files_of(flags.scorer)) + scorer.digest
        ),
    }
    is_alone = not jax.distributed.is_initialized()  # asks no device, which a command may want
    is_first = is_alone or distributed.is_first()
    if not is_alone:
        distributed.check_same(records=made_from["records"])
    with lock.held(out_folder(pieces.folder_of(out))):
        scored = pieces.begin(out, made_from) if is_first else []
        start = len(scored)
        if not is_alone:
            start = int(distributed.from_first(np.array(start, np.int32)))
        if start:
            print(f"goes on after {start} of {len(records)} prompts")
        left = records[start:] if is_first or scorer.digest else []
        new = score_records(scorer, left)
        with phase(f"scoring the responses to {len(records) - start} prompts"):
            while piece := list(itertools.islice(new, PIECE)):
                if is_first:
                    pieces.add(out, len(scored), piece)
                scored += piece
        if not is_first:
            return 0
        pieces.finish(out, scored)
    scores = [record["scores"] for record in scored]
    print(
        f"{len(records)} prompts, {sum(map(len, scores))} responses in {out}: mean score "
        f"{np.mean(np.concatenate(scores)):.4f}, standard deviation within a prompt "
        f"{np.mean([np.std(found) for found in scores]):.4f}, all equal in "
        f"{np.mean([np.ptp(found) == 0 for found in scores]):.0%} of prompts"
    )
    return 0


def score_records(scorer: Scorer, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the records with their scores, as they are known."""
    asked, responses = map(question, records), [record["responses"] for record in records]
    for found, record in zip(score_each(scorer, list(asked), responses), records, strict=True):
        yield record | {"scores": found}


def files_of(scorer: str) -> list[str]:
    """Returns the files that a scorer's command names, its program among them."""
    with contextlib.suppress(ValueError):  # an open quote, as will be said
        return [word for word in shlex.split(scorer.removeprefix(COMMAND)) if is_file(word)]
    return []


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
    run_main(
        distributed.together(main),
        interrupted="what was scored is kept in OUT.pieces; the same command goes on from there",
    )
