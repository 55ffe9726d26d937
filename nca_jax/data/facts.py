"""What is so of records that can all be used, and that their owner may not know."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from nca_jax.data.encode import Example


def facts_of(examples: Sequence[Example], k: int) -> Counter[str]:
    """Counts repeats, ties, what is cut, and records that do not fill a step's K = `k`.

    Equal responses of different scores are counted where they are read, see `record`.
    """
    counts = Counter(
        {
            "records with the prompt of an earlier one": len(examples)
            - len({example.prompt_hash for example in examples}),
            "records with equal responses of equal scores": sum(map(_repeats, examples)),
            "records whose scores are all equal": sum(map(_is_tied, examples)),
            "records cut to data.max_prompt_len and data.max_response_len": sum(
                example.num_cut > 0 for example in examples
            ),
            f"records with fewer responses than data.num_responses={k}": sum(
                len(example.scores) < k for example in examples
            ),
        }
    )
    return +counts  # without what is so of none


def _repeats(example: Example) -> bool:
    said = [ids.tobytes() for ids in example.group.responses]
    return len(set(zip(said, example.scores.tolist(), strict=True))) < len(said)


def _is_tied(example: Example) -> bool:
    return len(example.scores) > 1 and not np.ptp(example.scores)
