"""Rewards that packages of the field check: the extra eval has them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nca_jax.checks import UserError

Record = dict[str, Any]  # JSON

WANTED = "pip install 'nca_jax[eval]'"


def ifeval(records: Sequence[Record], responses: Sequence[str]) -> np.ndarray:
    """The share of the record's instructions that a response follows, in [0, 1].

    By IFEval's own checks as lm-eval has them, strict (Zhou et al. 2023). Those that count
    sentences want nltk's data punkt_tab.
    """
    try:
        from lm_eval.tasks.ifeval import (  # pyright: ignore[reportMissingImports]
            instructions_registry,
            utils,
        )
    except ImportError:
        raise UserError(f"The scorer 'ifeval' needs: {WANTED}.") from None
    scores = []
    for record, text in zip(records, responses, strict=True):
        names = record["instruction_id_list"]
        if unknown := set(names) - set(instructions_registry.INSTRUCTION_DICT):
            raise UserError(f"IFEval has no instruction {', '.join(sorted(unknown))}.")
        asked = utils.InputExample(0, names, record["prompt"], record["kwargs"])
        followed = utils.test_instruction_following_strict(asked, text).follow_instruction_list
        scores.append(np.mean(followed))
    return np.array(scores, np.float32)


def lacks_instructions(record: Record) -> str:
    """Returns what the scorer "ifeval" misses in a record: a line of IFEval's input_data.jsonl."""
    names, kwargs = record.get("instruction_id_list"), record.get("kwargs")
    is_text = isinstance(record.get("prompt"), str)
    if is_text and isinstance(names, list) and isinstance(kwargs, list):
        if 0 < len(names) == len(kwargs):
            return ""
    return (
        "the scorer ifeval wants a prompt of text, an instruction_id_list and kwargs for each of "
        f"it, got the keys {sorted(record)}"
    )


def math(records: Sequence[Record], responses: Sequence[str]) -> np.ndarray:
    """1 where the mathematical value that a response ends in is that of the record's "answer".

    Values are equal as math-verify compares them: 1/2 is 0.5 and \\frac{1}{2}.
    """
    try:
        from math_verify import parse, verify  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"The scorer 'math' needs: {WANTED}.") from None
    scores = [
        verify(parse(f"${record['answer']}$"), parse(text))
        for record, text in zip(records, responses, strict=True)
    ]
    return np.array(scores, np.float32)
