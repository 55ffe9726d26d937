"""From text to token ids: one road for training, evaluation and generation.

Formats:  "chat"      the tokenizer's chat template; a prompt is a text (one user turn) or messages.
          "plain"     [bos] + prompt and response + [eos]; bos only if the tokenizer adds one.
          "released"  that of the PyTorch release, see `nca_jax.data.released`.
A message is {"role": str, "content": str}. All responses of a prompt share exactly its ids, from
which generation starts too. They are what follows them in the ids of prompt and response as one
text, where these begin with the prompt's; else, and in released format, the ids of their own text.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from nca_jax.checks import UserError
from nca_jax.data import released
from nca_jax.data.sources import RecordError
from nca_jax.data.template import (
    apply_template,
    check_names_no_end,
    learn_turn,
    special_ids,
    write_responses,
)
from nca_jax.data.words import ids_after, ids_of
from nca_jax.protocols import Tokenizer

FORMATS = ("chat", "plain", "released")
APART = "records whose responses are encoded apart: with them the prompt has other ids"


class Encoded(NamedTuple):
    """The ids of responses, and what is counted and said of them."""

    ids: list[list[int]]
    notes: tuple[str, ...]


def encode_prompt(
    prompt: str | list[dict], tokenizer: Tokenizer, format: str, *, date: str = ""
) -> list[int]:
    """Returns the ids of a prompt, up to where the response begins.

    Args:
      date: YYYY-MM-DD, the day that a template may write; empty: today.
    Raises:
      RecordError: the prompt is not a text or messages, or the template refuses it.
      UserError: the tokenizer has no chat template, or no eos where one is written.
    """
    text = write_prompt(prompt, tokenizer, format, date=date)
    return ids_of_prompt(text, tokenizer, format)


def write_prompt(
    prompt: str | list[dict], tokenizer: Tokenizer, format: str, *, date: str = ""
) -> str:
    """Returns the text of a prompt, without a bos; arguments and errors of `encode_prompt`."""
    if format == "chat":
        return apply_template(_messages(prompt), tokenizer, generate=True, date=date)
    if format == "released":
        messages = _messages(prompt)
        if not any(message["role"] == "user" for message in messages):
            raise RecordError("released format wants a user's message", reason="prompt")
        eos, _ = _eos(tokenizer, format)
        return released.prompt_text(messages, eos)
    return _plain_text(prompt)


def ids_of_prompt(text: str, tokenizer: Tokenizer, format: str) -> list[int]:
    """Returns the ids of what `write_prompt` wrote."""
    (ids,) = ids_of([text], tokenizer)
    return _added_bos(tokenizer) + ids if format == "plain" else ids


def encode_responses(
    prompt: str | list[dict],
    responses: Sequence[str | list[dict]],
    tokenizer: Tokenizer,
    format: str,
    eos_ids: Sequence[int],
    *,
    finished: Sequence[bool] | None = None,
    join: str = "together",
    date: str = "",
    written: str | None = None,
) -> Encoded:
    """Returns the ids of each response, ended by its end-of-turn token if it ended its turn.

    A sampled response says so in `finished`. One that was cut off goes on from the prompt as it
    stands: its text alone is encoded, which may be no token at all, and no template rewrites it. An
    empty one that ended is its end-of-turn token.

    Args:
      responses: texts, or conversations: of these the last assistant message counts, in released
        format all messages from the first assistant's on.
      eos_ids: ids that end a turn; empty: the tokenizer's eos.
      finished: whether each response ended its turn. None: all did, and none may be empty.
      join: "together" with the prompt, as one text, where that is possible, or "apart".
      date: as in `encode_prompt`.
      written: what `write_prompt` made of the prompt, where it is known.
    Raises:
      RecordError: a response is malformed, empty where it must not be, names a token that ends a
        turn, or the template does not write it as it is.
      UserError: the tokenizer has no eos, or no chat template.
    """
    contents = [_response_content(response) for response in responses]
    is_ended = [True] * len(contents) if finished is None else finished
    is_written = [yes and content != "" for yes, content in zip(is_ended, contents, strict=True)]
    if written is None:
        written = write_prompt(prompt, tokenizer, format, date=date)
    texts = _write(prompt, written, responses, is_written, tokenizer, format, eos_ids, date)
    ids, notes = None, texts.notes
    if format != "released":
        _check_names(texts, contents, tokenizer, eos_ids)
        if join == "together":
            ids = ids_after(written, texts.added, tokenizer)
            notes += (APART,) if ids is None else ()
    if ids is None:
        ids = ids_of(texts.added, tokenizer)
    for k, text_ids in enumerate(ids):
        if is_ended[k]:
            ids[k] = text_ids + texts.appended
            if not is_written[k] or len(ids[k]) < 2:
                if finished is None:
                    raise RecordError(f"response {k} is empty; leave it out", reason="response")
                ids[k] = [texts.end_id]
    return Encoded(ids, notes)


class Turns(NamedTuple):
    """A conversation, of which every answer is scored: the ids before the first one, those after
    it, which of the latter are an answer's, and notes."""

    prompt: list[int]
    rest: list[int]
    scored: list[bool]
    notes: tuple[str, ...]


def encode_turns(
    messages: list[dict],
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    *,
    join: str = "together",
    date: str = "",
) -> Turns:
    """Returns the ids of a conversation in "chat" format, up to the end of its last answer.

    Each answer is what `encode_responses` makes of it, with its end-of-turn token; what the
    template writes between two of them is not scored.

    Args:
      messages: turns, the assistant's last; its answer to nothing, at the beginning, is no answer.
      eos_ids, join, date: as in `encode_responses`.
    Raises:
      RecordError: as `encode_responses`, or the template writes a turn otherwise once another
        follows, as those do that drop what was thought.
      UserError: as `encode_responses`.
    """
    pieces, notes, written = [], (), ""
    for i, message in enumerate(messages):
        if i == 0 or message["role"] != "assistant":
            continue
        before = write_prompt(messages[:i], tokenizer, "chat", date=date)
        texts = _write(
            messages[:i], before, [message["content"]], [True], tokenizer, "chat", eos_ids, date
        )
        _check_names(texts, [message["content"]], tokenizer, eos_ids)
        if not before.startswith(written):
            raise RecordError(
                "the chat template writes an answer otherwise once another turn follows; set "
                "data.train_on=last_assistant",
                reason="template",
            )
        pieces += [before[len(written) :], texts.added[0]]
        notes += texts.notes
        written = before + texts.added[0]
    ids = _ids_of_pieces(pieces, tokenizer) if join == "together" else None
    if ids is None:
        notes += (APART,) if join == "together" else ()
        ids = ids_of(pieces, tokenizer)
    scored = [n % 2 == 0 for n, piece in enumerate(ids[1:]) for _ in piece]
    return Turns(ids[0], sum(ids[1:], []), scored, notes)


def _ids_of_pieces(pieces: list[str], tokenizer: Tokenizer) -> list[list[int]] | None:
    """Returns the ids of each piece as it goes on from those before it.

    None where these and it as one do not begin with the ids of these.
    """
    wholes = ids_of(["".join(pieces[: n + 1]) for n in range(len(pieces))], tokenizer)
    pairs = list(zip([[], *wholes], wholes, strict=False))
    if any(whole[: len(start)] != start for start, whole in pairs):
        return None
    return [whole[len(start) :] for start, whole in pairs]


class _Written(NamedTuple):
    """The responses of a prompt as a format writes them."""

    added: list[str]  # what each response adds to the prompt's text
    appended: list[int]  # ids that a response which ended its turn gets beside its text's
    end_id: int
    notes: tuple[str, ...]


def _write(
    prompt: str | list[dict],
    written: str,
    responses: Sequence[str | list[dict]],
    is_written: Sequence[bool],
    tokenizer: Tokenizer,
    format: str,
    eos_ids: Sequence[int],
    date: str,
) -> _Written:
    """Returns texts; those of responses that are not `is_written` are as they came."""
    texts, notes = [_response_content(response) for response in responses], ()
    places = [k for k, yes in enumerate(is_written) if yes]
    if format == "chat":
        messages = _messages(prompt)
        turn = learn_turn(messages, written, tokenizer, eos_ids, date)
        asked = [texts[k] for k in places]
        if asked:
            asked, notes = write_responses(turn, messages, asked, tokenizer, date)
        for k, text in zip(places, asked, strict=True):
            texts[k] = text
        return _Written(texts, [], turn.end_id, notes)
    eos, eos_id = _eos(tokenizer, format)
    if format == "plain":
        return _Written(texts, [eos_id], eos_id, ())
    for k in places:
        texts[k] = released.response_text(_response_turns(responses[k]), eos)
    return _Written(texts, [eos_id], eos_id, ())


def _check_names(
    written: _Written, contents: Sequence[str], tokenizer: Tokenizer, eos_ids: Sequence[int]
) -> None:
    """Raises RecordError if a response names a token that ends a turn."""
    ends = {written.end_id, tokenizer.eos_token_id, *eos_ids}
    names = [name for name, i in special_ids(tokenizer).items() if i in ends]
    for content in contents:
        check_names_no_end(content, names)


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


def _plain_text(prompt: str | list[dict]) -> str:
    """Returns the prompt of plain format."""
    if not isinstance(prompt, str):
        raise RecordError(
            f"plain format wants a prompt of text, got {type(prompt).__name__}; messages want "
            "data.format=chat",
            reason="prompt",
        )
    return _text(prompt)


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


def _added_bos(tokenizer: Tokenizer) -> list[int]:
    """Returns [bos] if the tokenizer puts one before a text, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
