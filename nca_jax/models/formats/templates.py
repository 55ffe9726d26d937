"""The chat template of a tokenizer: which of several, and whether it comes to an end."""

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from nca_jax.checks import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0  # in which a template renders two short messages; it takes milliseconds
TRIED = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]


def choose_template(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Makes the template of this name the tokenizer's only one; "" leaves it as it is.

    Raises:
      UserError: it has none of this name.
    """
    if not name:
        return
    templates = tokenizer.chat_template
    named = templates if isinstance(templates, dict) else {"default": templates}
    if not named.get(name):
        raise UserError(
            f"The tokenizer has no chat template {name!r}; config.data.chat_template must be "
            f"{_names(named)}, or empty for the default."
        )
    tokenizer.chat_template = named[name]


def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Tries the template on a short conversation; what it refuses is a matter of the records.

    Raises:
      UserError: there are several and no default, it is no text, or it comes to no end.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict) and template:
        if "default" not in template:
            raise UserError(
                "None of the tokenizer's chat templates is its default; set "
                f"config.data.chat_template to {_names(template)}."
            )
        template = template["default"]
    if not template:
        return
    if not isinstance(template, str):
        raise UserError(
            f"The tokenizer's chat template must be a text, not {type(template).__name__}."
        )
    try:
        with contextlib.suppress(Exception), _time_limit(SECONDS):
            for messages in (TRIED[:1], TRIED):
                tokenizer.apply_chat_template(
                    [messages], tokenize=False, add_generation_prompt=messages is not TRIED
                )
    except _OverTimeError:
        raise UserError(
            f"The tokenizer's chat template came to no end in {SECONDS:g} seconds with one short "
            "message; use another (config.data.chat_template), or data.format=plain."
        ) from None


def _names(templates: Iterable[str]) -> str:
    return " or ".join(sorted(map(repr, templates)))


class _OverTimeError(BaseException):
    """No Exception: jinja2 handles those of a template itself."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises _OverTimeError in the body after some seconds; in a thread, without signals, never."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _OverTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
