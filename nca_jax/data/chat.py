"""From text to token ids: one road for training, evaluation and generation.

Formats:  "chat"      the tokenizer's chat template; a prompt is a text (one user turn) or messages.
          "plain"     [bos] + prompt and response + [eos]; bos only if the tokenizer adds one.
          "released"  that of the PyTorch release, see `nca_jax.data.released`.
A message is {"role": str, "content": str}. Prompt and response are tokenised apart, so that all
responses of a prompt share exactly the same prompt ids, and generation starts from them too.
"""

from collections.abc import Sequence
from typing import Any

from nca_jax.checks import UserError
from nca_jax.data import released
from nca_jax.data.sources import RecordError
from nca_jax.protocols import Tokenizer

FORMATS = ("chat", "plain", "released")


def encode_prompt(prompt: str | list[dict], tokenizer: Tokenizer, format: str) -> list[int]:
    """Returns the ids of a prompt, up to where the response begins.

    Raises:
      RecordError: the prompt is not a text or messages, or the template refuses it.
      UserError: the tokenizer has no chat template, or no eos where one is written.
    """
    if format == "chat":
        return _ids(_apply_template(_messages(prompt), tokenizer, generate=True), tokenizer)
    if format == "released":
        messages = _messages(prompt)
        if not any(message["role"] == "user" for message in messages):
            raise RecordError("released format wants a user's message", reason="prompt")
        eos, _ = _eos(tokenizer, format)
        return _ids(released.prompt_text(messages, eos), tokenizer)
    if not isinstance(prompt, str):
        raise RecordError(
            f"plain format wants a prompt of text, got {type(prompt).__name__}; messages want "
            "data.format=chat",
            reason="prompt",
        )
    return _added_bos(tokenizer) + _ids(_text(prompt), tokenizer)


def encode_responses(
    prompt: str | list[dict],
    responses: Sequence[str | list[dict]],
    tokenizer: Tokenizer,
    format: str,
    eos_ids: Sequence[int],
    *,
    finished: Sequence[bool] | None = None,
) -> list[list[int]]:
    """Returns the ids of each response, ended by its end-of-turn token if it ended its turn.

    A sampled response says so in `finished`. One that was cut off goes on from the prompt as it
    stands: its text alone is encoded, which may be no token at all, and no template rewrites it. An
    empty one that ended is its end-of-turn token.

    Args:
      responses: texts, or conversations: of these the last assistant message counts, in released
        format all messages from the first assistant's on.
      eos_ids: ids that end a turn; empty: the tokenizer's eos.
      finished: whether each response ended its turn. None: all did, and none may be empty.
    Raises:
      RecordError: a response is malformed, or empty where it must not be.
      UserError: the tokenizer has no eos, or its template is not prefix-stable.
    """
    texts = [_response_content(response) for response in responses]
    is_ended = [True] * len(texts) if finished is None else finished
    ended = [response for response, yes in zip(responses, is_ended, strict=True) if yes]
    with_end = iter(_encode_ended(prompt, ended, tokenizer, format, eos_ids))
    ids = []
    for k, text in enumerate(texts):
        response = next(with_end) if is_ended[k] else _ids(text, tokenizer)
        if is_ended[k] and (not text or len(response) < 2):
            if finished is None:
                raise RecordError(f"response {k} is empty; leave it out", reason="response")
            response = response[-1:]
        ids.append(response)
    return ids


def _encode_ended(
    prompt: str | list[dict],
    responses: Sequence[str | list[dict]],
    tokenizer: Tokenizer,
    format: str,
    eos_ids: Sequence[int],
) -> list[list[int]]:
    """Returns the ids of responses that end their turn, as the format writes it."""
    texts = [_response_content(response) for response in responses]
    if format == "chat":
        _, rendered = render(prompt, texts, tokenizer, eos_ids)
        return [_ids(text, tokenizer) for text in rendered]
    eos, eos_id = _eos(tokenizer, format)
    if format == "released":
        turns = [_response_turns(response) for response in responses]
        texts = [released.response_text(messages, eos) for messages in turns]
    return [[*_ids(text, tokenizer), eos_id] for text in texts]


def render(
    prompt: str | list[dict], responses: Sequence[str], tokenizer: Tokenizer, eos_ids: Sequence[int]
) -> tuple[str, list[str]]:
    """Returns the prompt's text by the chat template, and what each response adds to it.

    What a template writes after the last end-of-turn token (often a line break) is dropped, as
    generation stops before it; a template that writes no such token gets the eos appended.

    Raises:
      RecordError: the template refuses the messages.
      UserError: no template, or the text with a response does not start with the prompt's text.
    """
    messages = _messages(prompt)
    prompt_text = _apply_template(messages, tokenizer, generate=True)
    ends = _end_texts(tokenizer, eos_ids)
    added = []
    for response in responses:
        turn = {"role": "assistant", "content": response}
        full = _apply_template([*messages, turn], tokenizer, generate=False)
        if not full.startswith(prompt_text):
            raise UserError(
                "The chat template is not prefix-stable: with a response it no longer starts with "
                f"the prompt's text ({prompt_text[-40:]!r}); use another template or "
                "data.format=plain."
            )
        added.append(_cut_after_turn(full[len(prompt_text) :], ends))
    return prompt_text, added


def _cut_after_turn(text: str, ends: list[str]) -> str:
    """Returns the text up to and with its last end-of-turn token, which is appended if absent."""
    stop = max((text.rfind(end) + len(end) for end in ends if end in text), default=0)
    return text[:stop] if stop else text + ends[0]


def _end_texts(tokenizer: Tokenizer, eos_ids: Sequence[int]) -> list[str]:
    """Returns the texts of the end-of-turn tokens, the tokenizer's eos first."""
    texts = [tokenizer.convert_ids_to_tokens(int(i)) for i in eos_ids]
    if tokenizer.eos_token in texts or not texts:
        texts.insert(0, tokenizer.eos_token)
    texts = [text for text in texts if text]
    if not texts:
        raise UserError("The tokenizer has no eos token; give one that has an end-of-turn token.")
    return texts


def _apply_template(messages: list[dict], tokenizer: Tokenizer, *, generate: bool) -> str:
    """Returns the messages as text; with `generate`, up to where the assistant would speak."""
    if not tokenizer.chat_template:
        raise UserError("The tokenizer has no chat template; set data.format=plain.")
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )
    except Exception as error:  # a template is a program, and may fail in every way
        said = str(error) or type(error).__name__
        raise RecordError(f"the chat template refuses it ({said})", reason="template") from None


def _messages(prompt: str | list[dict]) -> list[dict]:
    """Returns the prompt as checked messages."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": _text(prompt)}]
    if not isinstance(prompt, list) or not prompt:
        raise RecordError("wanted a prompt of text or messages", reason="prompt")
    for message in prompt:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RecordError("wanted messages of a role and a content", reason="prompt")
        _text(message.get("content"))
    return prompt


def _response_content(response: str | list[dict]) -> str:
    """Returns the response's text: itself, or its last assistant message."""
    if isinstance(response, list):
        contents = [m["content"] for m in _messages(response) if m["role"] == "assistant"]
        if not contents:
            raise RecordError("a response holds no assistant message", reason="response")
        return contents[-1]
    return _text(response)


def _response_turns(response: str | list[dict]) -> list[dict]:
    """Returns a text as one turn, or the messages from the first assistant's on."""
    if isinstance(response, str):
        return [{"role": "assistant", "content": response}]
    is_prompt = [message["role"] != "assistant" for message in response]
    return response[is_prompt.index(False) :]


def _eos(tokenizer: Tokenizer, format: str) -> tuple[str, int]:
    """Returns the eos token and its id."""
    if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer has no eos token; {format} format needs one to end with.")
    return tokenizer.eos_token, tokenizer.eos_token_id


def _text(text: Any) -> str:
    """Returns the text. Raises RecordError if it is none, or no Unicode (a lone surrogate)."""
    if not isinstance(text, str):
        raise RecordError(f"wanted text, got {type(text).__name__}", reason="text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"text is not Unicode ({error})", reason="text") from None
    return text


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _added_bos(tokenizer: Tokenizer) -> list[int]:
    """Returns [bos] if the tokenizer puts one before a text, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
