"""What is so of records that can all be used, and that their owner may not know."""

from collections import Counter

import numpy as np

from nca_jax.data.table import Table


def facts_of(examples: Table, k: int) -> Counter[str]:
    """Counts repeats, ties, what is cut, and records that do not fill a step's K = `k`.

    Equal responses of different scores are counted where they are read, see `record`.
    """
    entries, num_tied = examples.entries, 0
    for _, _, scores in examples.by_count():
        num_tied += int((np.ptp(scores, axis=1) == 0).sum()) if scores.shape[1] > 1 else 0
    counts = Counter(
        {
            "records with the prompt of an earlier one": len(entries)
            - len(np.unique(entries["prompt_hash"])),
            "records with equal responses of equal scores": int(entries["repeats"].sum()),
            "records whose scores are all equal": num_tied,
            "records cut to data.max_prompt_len and data.max_response_len": int(
                (entries["num_cut"] > 0).sum()
            ),
            f"records with fewer responses than data.num_responses={k}": int(
                (entries["count"] < k).sum()
            ),
        }
    )
    return +counts  # without what is so of none
