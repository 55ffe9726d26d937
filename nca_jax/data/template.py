"""What a chat template writes: a prompt's text, and what it makes of a response that follows.

It is learned from the template, which renders a marker in the response's place, and not guessed
from the eos: the turns of many base models end in another token.
"""

import datetime
import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nca_jax.checks import UserError
from nca_jax.data.sources import RecordError
from nca_jax.protocols import Tokenizer

MARKER = "RESPONSE"  # of letters, which a template that trims or splits leaves alone
ASKS_DAY = "strftime_now"
SPACES_CHANGED = "responses whose white space the chat template changes"


class Turn(NamedTuple):
    """What a template writes after a prompt: `prefix`, a response, `closing`, `end`."""

    prompt: str  # the prompt's text, up to where the response begins
    prefill: str  # how the prompt's text begins the response itself ("<think>\n"); mostly ""
    prefix: str
    closing: str  # what it says before the end-of-turn token; mostly ""
    end: str  # that token: its first after a response, or the eos where it writes none
    end_id: int
    tail: str  # all that it writes after a response, often a line break more


def learn_turn(
    messages: list[dict], prompt: str, tokenizer: Tokenizer, eos_ids: Sequence[int], date: str
) -> Turn:
    """Returns what the template writes around a response to these messages.

    What follows the end-of-turn token is no part of it, as generation stops before it.

    Args:
      prompt: the messages as the template writes them, up to where the response begins.
      eos_ids: ids that end a turn; empty: the tokenizer's eos.
      date: YYYY-MM-DD, the day that a template may write; empty: today.
    Raises:
      RecordError: the template refuses a response, leaves it out, or writes another prompt where
        there is one.
      UserError: there is no template, or no eos where one is wanted.
    """
    marker = MARKER
    while marker in prompt:
        marker += MARKER[-1]
    (whole,) = render(messages, [marker], tokenizer, date)
    head, found, tail = whole.partition(marker)
    if not found:
        raise RecordError("the chat template leaves the response out", reason="template")
    goes_on = head.startswith(prompt) or (
        prompt.startswith(head)  # which may begin the response itself
        and head.startswith(apply_template(messages, tokenizer, generate=False, date=date))
    )
    if not goes_on:
        raise RecordError(
            "the chat template is not prefix-stable: with a response it no longer starts with the "
            f"prompt's text ({prompt[-40:]!r}); use another template or data.format=plain",
            reason="template",
        )
    named = {name: i for name, i in special_ids(tokenizer).items() if name in tail}
    end = min(named, key=lambda name: (tail.index(name), -len(name)), default=None)
    if end is None:
        closing, (end, end_id) = tail.rstrip(), _eos(tokenizer, eos_ids)
    else:
        closing, end_id = tail[: tail.index(end)], named[end]
    return Turn(prompt, prompt[len(head) :], head[len(prompt) :], closing, end, end_id, tail)


def usual_turn(tokenizer: Tokenizer | None, eos_ids: Sequence[int]) -> Turn | None:
    """Returns what the template writes around a response to a plain question.

    None where there is no template, or it takes no such question: records will say so.
    """
    if tokenizer is None or not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "Why?"}]
    try:
        prompt = apply_template(messages, tokenizer, generate=True, date="")
        return learn_turn(messages, prompt, tokenizer, eos_ids, "")
    except UserError:
        return None


def write_responses(
    turn: Turn, messages: list[dict], responses: Sequence[str], tokenizer: Tokenizer, date: str
) -> tuple[list[str], tuple[str, ...]]:
    """Returns what each response adds to the prompt's text, and notes.

    It is what the template renders, which must hold the response as it is, white space aside. A
    template that begins the response in the prompt, and would drop what was begun, is not asked.

    Raises:
      RecordError: the template refuses a response, drops or rewrites some of it, or begins it
        otherwise.
    """
    if turn.prefill:
        return [_prefilled(turn, response) for response in responses], ()
    wholes = render(messages, responses, tokenizer, date)
    texts, notes = [], ()
    for response, whole in zip(responses, wholes, strict=True):
        written = whole.removesuffix(turn.tail)
        is_there = whole.startswith(turn.prompt) and whole.endswith(turn.tail)
        as_it_is = written.endswith(response)
        if not is_there or not (as_it_is or _squeezed(written).endswith(_squeezed(response))):
            raise RecordError(
                f"the chat template does not write a response as it is ({response[:40]!r} became "
                f"{whole.removeprefix(turn.prompt)[:80]!r}); use another template or "
                "data.format=plain",
                reason="template",
            )
        texts.append(written[len(turn.prompt) :] + turn.closing + turn.end)
        notes += () if as_it_is else (SPACES_CHANGED,)
    return texts, notes


def _prefilled(turn: Turn, response: str) -> str:
    """Returns what a response adds to a prompt that begins it. RecordError unless it begins so."""
    if not response.startswith(turn.prefill):
        raise RecordError(
            f"the chat template begins a response with {turn.prefill!r}, and this one begins "
            f"with {response[:40]!r}; write it with that beginning, or set data.format=plain",
            reason="template",
        )
    return response.removeprefix(turn.prefill) + turn.closing + turn.end


def apply_template(
    messages: list[dict],
    tokenizer: Tokenizer,
    *,
    generate: bool,
    date: str,
    goes_on: bool = False,
) -> str:
    """Returns the messages as text; with `generate`, up to where the assistant would speak.

    Args:
      goes_on: the last message is not at its end: nothing is written after it.
    Raises:
      RecordError: the template refuses the messages.
      UserError: the tokenizer has no chat template.
    """
    (text,) = _apply([messages], tokenizer, generate=generate, date=date, goes_on=goes_on)
    return text


def _apply(
    conversations: list[list[dict]],
    tokenizer: Tokenizer,
    *,
    generate: bool,
    date: str,
    goes_on: bool = False,
) -> list[str]:
    if not tokenizer.chat_template:
        raise UserError("The tokenizer has no chat template; set data.format=plain.")
    try:
        return tokenizer.apply_chat_template(
            conversations,
            chat_template=_dated(tokenizer.get_chat_template(), date),
            tokenize=False,
            add_generation_prompt=generate,
            continue_final_message=goes_on,
        )
    except Exception as error:  # a template is a program, and may fail in every way
        said = str(error) or type(error).__name__
        raise RecordError(f"the chat template refuses it ({said})", reason="template") from None


@functools.lru_cache(maxsize=2)  # asked for of every record
def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the tokens that a text can name: those added to the vocabulary, and the eos.

    Some vocabularies have runs of spaces among them, which mean nothing.
    """
    names = {name: i for name, i in tokenizer.get_added_vocab().items() if name.strip()}
    if tokenizer.eos_token is not None and tokenizer.eos_token_id is not None:
        names[tokenizer.eos_token] = tokenizer.eos_token_id
    return names


def check_names_no_end(text: str, ends: Iterable[str]) -> None:
    """Raises RecordError if a response names a token that would end its turn in mid-answer."""
    named = [end for end in ends if end in text]
    if named:
        raise RecordError(
            f"a response names {named[0]!r}, which ends a turn, in its text ({text[:40]!r}); write "
            "it otherwise or leave the response out",
            reason="special",
        )


def render(
    messages: list[dict], responses: Iterable[str], tokenizer: Tokenizer, date: str
) -> list[str]:
    """Returns the conversation with each of the responses as text; raises as `apply_template`."""
    turns = [{"role": "assistant", "content": response} for response in responses]
    return _apply([[*messages, turn] for turn in turns], tokenizer, generate=False, date=date)


def writes_date(tokenizer: Tokenizer | None) -> bool:
    """Whether a chat template asks for the day."""
    if tokenizer is None or not tokenizer.chat_template:
        return False
    return ASKS_DAY in tokenizer.get_chat_template()


def _dated(template: str, date: str) -> str:
    """Returns a template that writes one day, whatever the clock says.

    transformers gives a template its own clock and takes no function from its caller. So the
    template gets a macro of that name, whose line break is not written.
    """
    if not date or ASKS_DAY not in template:
        return template
    day = datetime.datetime.fromisoformat(date)
    codes = sorted(set(re.findall(r"%-?[a-zA-Z]|%%", template)), reverse=True)  # "%%" is the last
    parts = "".join(f"|replace({code!r}, {day.strftime(code)!r})" for code in codes)
    return f"{{% macro {ASKS_DAY}(format) %}}{{{{ format{parts} }}}}{{% endmacro %}}\n{template}"


def _eos(tokenizer: Tokenizer, eos_ids: Sequence[int]) -> tuple[str, int]:
    """Returns the tokenizer's eos and its id, or else the first of `eos_ids` that it knows."""
    if tokenizer.eos_token is not None and tokenizer.eos_token_id is not None:
        return tokenizer.eos_token, tokenizer.eos_token_id
    for eos_id in eos_ids:
        name = tokenizer.convert_ids_to_tokens(eos_id) if 0 <= eos_id < len(tokenizer) else None
        if name:
            return name, eos_id
    raise UserError("The tokenizer has no eos token; give one that has an end-of-turn token.")


def _squeezed(text: str) -> str:
    """Returns the text without white space."""
    return "".join(text.split())
