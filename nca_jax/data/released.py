"""The format of the released PyTorch trainer: its text, its key masks and its truncation.

Facts:  read in thu-ml/Noise-Contrastive-Alignment, the code of arXiv:2402.05369.
Text:   Zephyr turns. A prompt is a system turn, empty where there is none, then the first user
        turn, and no later one; a response is "A</s>\\n", where </s> is the tokenizer's eos.
Ids:    prompt and response are tokenised apart, without BOS, and one more eos id is appended.
Keys:   an eos that the text holds is an input and a label, but no later token attends to it; the
        appended one is a key like any other token.
Length: nothing is cut where the prompt and the longest response fit together; see `cuts`.
"""

from collections.abc import Sequence

import numpy as np

from nca_jax.protocols import Tokenizer

ASSISTANT = "<|assistant|>\n"


def prompt_text(messages: Sequence[dict], eos: str) -> str:
    """Returns the text of a prompt, up to where the assistant speaks.

    Args:
      messages: with a user's among them; of these the first counts, and a system message that
        comes before all others.
      eos: the tokenizer's.
    """
    has_system = messages[0]["role"] == "system"
    system = messages[0] if has_system else {"role": "system", "content": ""}
    user = next(message for message in messages if message["role"] == "user")
    return _turn(system, eos) + _turn(user, eos) + ASSISTANT


def response_text(messages: Sequence[dict], eos: str) -> str:
    """Returns what a response adds to its prompt: its turns, without the first one's heading."""
    return "".join(_turn(message, eos) for message in messages).removeprefix(ASSISTANT)


def key_off_ids(tokenizer: Tokenizer | None, eos_ids: Sequence[int]) -> tuple[int, ...]:
    """Returns the ids that are switched off as keys: the tokenizer's eos.

    `eos_ids` of the model serve where records are ids and there is no tokenizer, or one without.
    """
    eos_id = None if tokenizer is None else tokenizer.eos_token_id
    return tuple(eos_ids) if eos_id is None else (eos_id,)


def prompt_keys(prompt: np.ndarray, off_ids: Sequence[int]) -> np.ndarray:
    """Returns which tokens of a prompt may be attended to, [P] bool."""
    return ~np.isin(prompt, off_ids)


def response_keys(response: np.ndarray, off_ids: Sequence[int]) -> np.ndarray:
    """Returns the same of a whole, uncut response, [its length] bool; its last token is on."""
    on = ~np.isin(response, off_ids)
    on[-1] = True
    return on


def cuts(
    prompt_len: int, longest_response: int, *, max_prompt_len: int, max_response_len: int
) -> tuple[slice, slice]:
    """Returns what is kept of a prompt and of each of its responses.

    The released max_length is max_prompt_len + max_response_len. If prompt and longest response
    are more than that, the prompt keeps its last max_prompt_len tokens; if they still are, every
    response keeps its first max_response_len and a cut one loses its eos. So a prompt may be longer
    than max_prompt_len where responses are short, and the reverse.

    Args:
      prompt_len, longest_response: in tokens, the response's with the appended eos.
    """
    max_len = max_prompt_len + max_response_len
    whole = slice(None)
    if prompt_len + longest_response <= max_len:
        return whole, whole
    prompt = slice(max(0, prompt_len - max_prompt_len), None)
    if min(prompt_len, max_prompt_len) + longest_response <= max_len:
        return prompt, whole
    return prompt, slice(max_response_len)


def _turn(message: dict, eos: str) -> str:
    return f"<|{message['role']}|>\n{message['content']}{eos}\n"
