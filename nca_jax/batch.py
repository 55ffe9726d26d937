"""The row layout: what one training step is made of, and the legend of axis letters.

Axes:   B prompts in a step, K responses a prompt, M micro-batches, R rows in a micro-batch,
        T tokens in a row, P pairs of attention blocks in a row, V vocabulary.

One row holds prompts, each followed by all its responses: a prompt is computed once, not K times.

    tokens      [ prompt a ..... | response 1 . | response 2 ... | prompt b .. | response 1 | pad ]
    positions     0 ...... n-1     n ..           n ...            0 ...         m ...        0
    prompt_ids    1 ...... 1       1 ..           1 ...            2 ...         2 ...        0
    segments      1 ...... 1       2 ..           3 ...            1 ...         2 ...        0

Token q attends to token k when k <= q in the row, their prompt ids agree, k's segment is 1 (the
prompt) or q's own, and k's key is on; a layer with a window hides what is further back by position.
What is padding is known from lengths, never from token ids; it may also lie before a segment.
The same pytrees hold numpy arrays on the host and jax ones on the device, and the shapes or the
shardings of either: Rows[np.ndarray], Rows[jax.Array], Rows[jax.ShapeDtypeStruct],
Rows[NamedSharding]; a plain Rows is of any.
"""

from typing import Generic, NamedTuple, TypeVar

A = TypeVar("A")  # an array, or what stands for it

PROMPT_SEGMENT = 1  # responses are 2, 3, ...; 0 is padding


class Rows(NamedTuple, Generic[A]):
    """Packed rows, int32 but key_on. Leading axes are [R] in a micro-batch, [M, R] in a step."""

    tokens: A  # [.., T]
    positions: A  # [.., T] place within prompt + response, which RoPE and windows go by
    prompt_ids: A  # [.., T] 1, 2, ... within the row; 0: padding
    segments: A  # [.., T] 1: prompt, 2, 3, ...: its responses; 0: padding
    key_on: A  # [.., T] bool; False: an input and a label, but nothing attends to it
    pairs: A  # [.., P, 2] live (query block, key block), sorted; (-1, -1) fills up
    logp_at: A  # [.., T] which hidden state predicts; the scored tokens come first
    logp_token: A  # [.., T] the token that it predicts
    logp_slot: A  # [.., T] b * K + k: whose log-probability it is part of; B * K: of none


class Batch(NamedTuple, Generic[A]):
    """One step: exactly B prompts, packed in micro-batches of one shape [R, T]."""

    rows: Rows[A]  # leading axes [M, R]
    num_micro: A  # [] int32: how many of the M micro-batches hold something
    micro_of_prompt: A  # [B] int32: the micro-batch that holds prompt b and all its responses
    scores: A  # [B, K] float32, in the data's own unit; 0 where the mask is off
    mask: A  # [B, K] bool: the response is there; a prompt slot without any is empty
    lengths: A  # [B, K] int32: scored tokens of each response; 0 where the mask is off
    ref_logps: A | None  # [B, K] float32 nats of a cache; None: the step has them, or none
