"""Whole conversations as a reward model reads them: what its template writes, up to the last token.

Their ids are those of transformers' `apply_chat_template`, so a template that writes a BOS is given
no second one; without a template they are those of prompt and response as one text, with what the
tokenizer puts around a text. A value is that of the last token which is not padding: transformers
knows padding by its id, so a text that ends in that id is read up to what comes before.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nca_jax.data.conversation import as_messages, read_prompt
from nca_jax.data.group import Group
from nca_jax.data.sources import RecordError
from nca_jax.data.template import render
from nca_jax.data.words import ids_of
from nca_jax.protocols import Tokenizer


def write_whole(
    prompt: Any, responses: Sequence[str], tokenizer: Tokenizer, date: str = ""
) -> list[str]:
    """Returns the text of a conversation with each of the responses.

    Args:
      prompt: text or messages; text where the tokenizer has no chat template.
      date: YYYY-MM-DD, the day that a template may write; empty: today.
    Raises:
      RecordError: the prompt is malformed, or the template refuses it.
    """
    said = read_prompt(prompt)
    if tokenizer.chat_template:
        return render(as_messages(said), responses, tokenizer, date)
    if not isinstance(said, str):
        raise RecordError(
            "the prompt is messages, and the reward model's tokenizer has no chat template; give "
            "prompts of text, or add a chat_template.jinja to its folder",
            reason="prompt",
        )
    return [said + response for response in responses]


def encode_whole(
    prompt: Any,
    responses: Sequence[str],
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    pad_id: int | None,
    date: str = "",
) -> list[np.ndarray]:
    """Returns the ids of each conversation, up to the token that is read, [its length] int32.

    Args:
      prompt, date: as in `write_whole`.
      vocab_size: the model's; every id is below it.
      pad_id: as in `num_read`.
    Raises:
      RecordError: as `write_whole`, or a conversation has less than two tokens or ids that the
        model has not.
    """
    texts = write_whole(prompt, responses, tokenizer, date)
    if tokenizer.chat_template:
        encoded = ids_of(texts, tokenizer)
    else:
        encoded = tokenizer(texts)["input_ids"]
    read = [np.array(ids[: num_read(ids, pad_id)], np.int32) for ids in encoded]
    for text, ids in zip(texts, read, strict=True):
        if len(ids) < 2 or ids.max() >= vocab_size:
            raise RecordError(
                f"a response gives {len(ids)} tokens with ids up to {ids.max(initial=0)} "
                f"({text[-40:]!r}), wanted two or more below {vocab_size}; use the model's own "
                "tokenizer",
                reason="ids",
            )
    return read


def num_read(ids: Sequence[int], pad_id: int | None) -> int:
    """Returns how many ids there are up to the last that is not `pad_id`, one at least."""
    end = len(ids)
    while end > 1 and ids[end - 1] == pad_id:
        end -= 1
    return end


def share_start(conversations: Sequence[np.ndarray]) -> list[Group]:
    """Returns conversations as groups, in order: one, of what all begin with and how each goes on.

    Each goes on by a token at least. Where they begin with different ones each is its own group.
    """
    most = min(map(len, conversations)) - 1
    starts = np.stack([ids[:most] for ids in conversations])
    differ = (starts != starts[0]).any(axis=0)
    shared = int(differ.argmax()) if differ.any() else most
    if shared == 0:
        return [Group(ids[:-1], (ids[-1:],)) for ids in conversations]
    return [Group(conversations[0][:shared], tuple(ids[shared:] for ids in conversations))]
