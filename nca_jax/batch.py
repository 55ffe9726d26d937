"""The row layout: what one training step is made of, and the legend of axis letters.

Axes:   B prompts in a step, K responses a prompt, M micro-batches, R rows in a micro-batch,
        T tokens in a row, P pairs of attention blocks in a row, V vocabulary.

One row holds prompts, each followed by all its responses: a prompt is computed once, not K times.

    tokens      [ prompt a ..... | response 1 . | response 2 ... | prompt b .. | response 1 | pad ]
    positions     0 ...... n-1     n ..           n ...            0 ...         m ...        0
    prompt_ids    1 ...... 1       1 ..           1 ...            2 ...         2 ...        0
    segments      1 ...... 1       2 ..           3 ...            1 ...         2 ...        0

Token q attends to token k when k <= q in the row, their prompt ids agree, k's segment is 1 (the
prompt) or q's own, and k's key is on. What is padding is known from lengths, never from token ids.
Arrays are numpy on the host and jax on the device; both are the same pytrees.
"""

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:  # what packs rows imports numpy alone, what reads them jax
    import jax
    import numpy as np

Array: TypeAlias = "np.ndarray | jax.Array"  # on the host, on the device

PROMPT_SEGMENT = 1  # responses are 2, 3, ...; 0 is padding


class Rows(NamedTuple):
    """Packed rows, int32 but key_on. Leading axes are [R] in a micro-batch, [M, R] in a step."""

    tokens: Array  # [.., T]
    positions: Array  # [.., T] place within prompt + response, which RoPE and windows go by
    prompt_ids: Array  # [.., T] 1, 2, ... within the row; 0: padding
    segments: Array  # [.., T] 1: prompt, 2, 3, ...: its responses; 0: padding
    key_on: Array  # [.., T] bool; False: an input and a label, but nothing attends to it
    pairs: Array  # [.., P, 2] live (query block, key block), sorted; (-1, -1) fills up
    logp_at: Array  # [.., T] which hidden state predicts; the scored tokens come first
    logp_token: Array  # [.., T] the token that it predicts
    logp_slot: Array  # [.., T] b * K + k: whose log-probability it is part of; B * K: of none


class Batch(NamedTuple):
    """One step: exactly B prompts, packed in micro-batches of one shape [R, T]."""

    rows: Rows  # leading axes [M, R]
    num_micro: Array  # [] int32: how many of the M micro-batches hold something
    micro_of_prompt: Array  # [B] int32: the micro-batch that holds prompt b and all its responses
    scores: Array  # [B, K] float32, in the data's own unit; 0 where the mask is off
    mask: Array  # [B, K] bool: the response is there; a prompt slot without any is empty
    lengths: Array  # [B, K] int32: scored tokens of each response; 0 where the mask is off
    ref_logps: "Array | None"  # [B, K] float32 nats of a cache; None: the step has them, or none
