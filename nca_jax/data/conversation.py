"""Prompts and responses that come as texts or as conversations: the one reader of both.

A conversation is a list of messages {"role": text, "content": text or parts}, or {"from", "value"}
with the words of `ROLES`. Parts are [{"type": "text", "text": text}, ..], which are joined. What is
no text (an image, a call of a tool and its result) is refused by name. The other texts of a message
stay, since a template may read them.

A response that is a conversation holds its prompt, all of it or what `prompt` does not say:
    prompt              conversation                        read as
    none                [user a, assistant b]               prompt a, response b
    a                   [user a, assistant b]               the same
    a                   [assistant b]                       the same
    a                   [user a, assistant b, user c, assistant d]   prompt [a, b, c], response d
    [system s, user a]  [user a, assistant b]               prompt [s, a], response b
"""

from collections.abc import Sequence
from typing import Any

from nca_jax.data.sources import RecordError

Messages = list[dict[str, str]]  # {"role", "content"} and other texts

ROLES = {role: role for role in ("system", "user", "assistant")}
ROLES |= {"human": "user", "gpt": "assistant"}
TOOL_ROLES, TOOL_KEYS = ("tool", "function"), ("tool_calls", "function_call")


def read_prompt(prompt: Any) -> str | Messages:
    """Returns a prompt of text as it is, one of messages as `read_messages` does.

    Raises:
      RecordError: it is neither, or it ends in an answer that is begun.
    """
    return prompt if isinstance(prompt, str) else _unanswered(read_messages(prompt, "prompt"))


def read_responses(
    prompt: Any, responses: Sequence[Any], *, released: bool = False
) -> tuple[str | Messages, list[str | Messages]]:
    """Returns the prompt, with all turns before the answers, and the answers.

    A prompt of one user's turn is its text, unless `prompt` has it as a message.

    Args:
      prompt: text or messages; None: the responses, conversations all, say it.
      responses: one or more texts or conversations; the answer of one is its last message.
      released: it is all messages from the first assistant's on.
    Raises:
      RecordError: a part is malformed, the responses are to different prompts or to another one
        than `prompt`, there is none, or a conversation does not end with the assistant.
    """
    given = None if prompt is None else read_prompt(prompt)
    prompts: list[Messages] = []
    answers: list[str | Messages] = []
    for k, response in enumerate(responses):
        if not isinstance(response, list):
            answers.append(read_text(response))
            prompts.append(_prompt_of_text(given, k))
            continue
        turns = read_messages(response, "response")
        if turns[-1]["role"] != "assistant":
            raise RecordError(
                f"the conversation of response {k} does not end with the assistant", reason="role"
            )
        first = _first_answer(turns) if released else len(turns) - 1
        prompts.append(_whole_prompt(given, turns[:first], released=released))
        answers.append(turns[first:] if released else turns[first]["content"])
    if any(_said(other) != _said(prompts[0]) for other in prompts):
        raise RecordError("the responses are to different prompts", reason="prompts differ")
    whole = _unanswered(prompts[0])
    text = canonical(whole)
    return (text if isinstance(text, str) and not isinstance(given, list) else whole), answers


def read_messages(conversation: Any, who: str) -> Messages:
    """Returns a conversation as messages of texts. RecordError, naming `who`, unless it is one."""
    if not isinstance(conversation, list) or not conversation:
        raise RecordError(f"wanted a {who} of text or messages", reason=who)
    return [_message(message) for message in conversation]


def read_text(text: Any) -> str:
    """Returns the text. Raises RecordError if it is none."""
    if not isinstance(text, str):
        raise RecordError(f"wanted text, got {type(text).__name__}", reason="text")
    return text


def as_messages(prompt: str | Messages) -> Messages:
    """Returns a prompt as messages: a text is one turn of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def canonical(prompt: str | Messages) -> str | Messages:
    """Returns what is one for all forms of a prompt: one turn of the user is its text."""
    plain = [{key: turn[key] for key in ("role", "content")} for turn in as_messages(prompt)]
    match plain:
        case [{"role": "user", "content": text}]:
            return text
    return plain


def _prompt_of_text(given: str | Messages | None, k: int) -> Messages:
    """Returns the prompt of response k, which is a text and says none itself."""
    if given is None:
        raise RecordError(
            f"has no 'prompt', and response {k} is a text; give the prompt, or conversations that "
            "begin with it",
            reason="keys",
        )
    return as_messages(given)


def _whole_prompt(given: str | Messages | None, before: Messages, *, released: bool) -> Messages:
    """Returns all turns of the prompt that `given` and the turns before an answer say.

    A system's turn may be in one of them alone. The released prompt ends before the first answer.
    """
    if given is None:
        if not before:
            raise RecordError("a conversation has no turn before its answer", reason="keys")
        return before
    told = as_messages(given)
    if released:
        told = told[: _first_answer(told)]
    if not before or before[0]["role"] == "assistant":  # it goes on where the prompt ends
        return [*told, *before]
    (told_system, told), (system, rest) = _split_system(told), _split_system(before)
    other_system = told_system and system and _said(told_system) != _said(system)
    if other_system or _said(rest[: len(told)]) != _said(told):
        raise RecordError(
            "the conversation of a response does not begin with the 'prompt'",
            reason="prompts differ",
        )
    return [*(system or told_system), *rest]


def _first_answer(turns: Messages) -> int:
    """Returns where the assistant speaks first; the number of turns where it does not."""
    roles = [turn["role"] for turn in turns]
    return roles.index("assistant") if "assistant" in roles else len(roles)


def _split_system(turns: Messages) -> tuple[Messages, Messages]:
    """Returns the system's turn at the beginning, [] where there is none, and the others."""
    first = int(turns[0]["role"] == "system")
    return turns[:first], turns[first:]


def _said(turns: Messages) -> list[tuple[str, str]]:
    """Returns who says what: data sets write a prompt twice with other white space around it."""
    return [(turn["role"], turn["content"].strip()) for turn in turns]


def _unanswered(turns: Messages) -> Messages:
    """Returns a prompt's turns. RecordError if the last is the assistant's: begun, or there."""
    if turns[-1]["role"] == "assistant":
        raise RecordError(
            "the prompt ends with the assistant's turn; end it with the user's, and put what was "
            "begun into the responses",
            reason="begun answer",
        )
    return turns


def _message(message: Any) -> dict[str, str]:
    """Returns one message as texts. Raises RecordError unless it has a role and a content."""
    if not isinstance(message, dict):
        raise RecordError("wanted messages of a role and a content", reason="role")
    role, content = message.get("role"), message.get("content")
    if "role" not in message and "from" in message:
        role, content = _known_role(message["from"]), message.get("value")
    if not isinstance(role, str):
        raise RecordError("wanted messages of a role and a content", reason="role")
    tools = [key for key in TOOL_KEYS if message.get(key)]
    if role in TOOL_ROLES or tools:
        raise RecordError(
            f"a message has {tools[0] if tools else f'the role {role}'!r}; tools are not read, "
            "leave the record out",
            reason="tools",
        )
    others = {
        key: text
        for key, text in message.items()
        if isinstance(text, str) and key not in ("from", "value")
    }
    return others | {"role": role, "content": _content(content)}


def _known_role(name: Any) -> str:
    if not isinstance(name, str) or name not in ROLES:
        raise RecordError(f"has a turn from {name!r:.40}, wanted {', '.join(ROLES)}", reason="role")
    return ROLES[name]


def _content(content: Any) -> str:
    """Returns a text, or the texts of parts joined. RecordError if it is another thing."""
    if not isinstance(content, list):
        return read_text(content)
    texts = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                kind = part.get("type") if isinstance(part, dict) else part
                raise RecordError(
                    f"a message has a part of type {kind!r:.40}; text alone is read",
                    reason="content",
                )
    return "".join(texts)
