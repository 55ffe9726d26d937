"""From a record to a checked example of token ids; `record` says which forms it may have."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from nca_jax.checks import UserError
from nca_jax.data import chat, released, template, words
from nca_jax.data.conversation import Messages, as_messages, canonical, read_prompt
from nca_jax.data.group import Group
from nca_jax.data.record import Parts, question, read_parts
from nca_jax.data.sources import RecordError
from nca_jax.data.whole import encode_whole, share_start
from nca_jax.protocols import DataSection, Tokenizer

ENCODING = ("format", "join", "max_prompt_len", "max_response_len", "prompt_keep", "too_long")
ENCODING += ("bad_rows", "first_bonus", "train_on")  # fields of the `data` section
NO_TOKEN = "responses left out: cut off before their first token"
TOO_FEW_LEFT = "too few responses with a token"
RENDERED = "prompts hold marks of the chat template: they seem rendered, and are rendered once more"


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt and all responses of its record, encoded and cut to length."""

    where: str  # "path:line", or "tfds:NAME:SPLIT:index"
    group: Group
    scores: np.ndarray  # [n] float32, in the data's unit, data.first_bonus added to the first
    record: dict[str, Any]  # without its responses: its "prompt" if that is not ids, its "answer"
    prompt_hash: float  # in [0, 1), of the whole prompt: what is held out goes by it
    num_tokens: int  # of prompt and responses, before cutting
    num_cut: int  # how many of these were cut off
    is_pair: bool = False  # its scores are 1 and 0 since it has none
    notes: tuple[str, ...] = ()  # what is counted and said of it: see `Parts`, `NO_TOKEN`


class Prompt(NamedTuple):
    """A prompt that is to be answered."""

    where: str
    ids: np.ndarray  # [P] int32, cut to length: what is sampled from
    record: dict[str, Any]  # as in Example
    notes: tuple[str, ...] = ()  # as in Example


@dataclass(frozen=True, eq=False)
class Encoder:
    """How records become ids: the one road of training, evaluation and generation.

    Args:
      tokenizer: None will do where all records are ids.
      config: the `data` section.
      vocab_size: the model's; every id is below it.
      eos_ids: ids that end a turn; empty: the tokenizer's eos.
      least_responses: fewer teach the loss nothing.
      digest: of the tokenizer: ids in a record that has another are not used.
      date: YYYY-MM-DD, the day that a chat template may write; empty: today.
      is_reward: for a reward model: texts are whole conversations, see `data.whole`.
      pad_id: what a reward model does not read at the end of a text; None: it reads all.
    """

    tokenizer: Tokenizer | None
    config: DataSection
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    least_responses: int = 2
    digest: str = "none"
    date: str = ""
    is_reward: bool = False
    pad_id: int | None = None

    def prompt(self, prompt: str | list[dict]) -> np.ndarray:
        """Returns the ids of a prompt, cut to length, [P] int32: what a response is sampled from.

        It leaves room for the longest response that may be: in released format, where the one
        goes by the other, it keeps at most max_prompt_len.

        Raises:
          RecordError: it is malformed, empty, or too long where `config.too_long` refuses it.
          UserError: what is wrong is not the prompt but the tokenizer.
        """
        ids = self._checked(self._encode_prompt(prompt), "the prompt")
        of_prompt, _ = _cuts(len(ids), self.config.max_response_len, self.config)
        return ids[of_prompt].copy()

    def question(self, where: str, record: dict[str, Any]) -> Prompt:
        """Encodes the prompt of a record that is to be answered.

        Raises:
          RecordError: "path:line: what is wrong", as `prompt`, or there is no prompt.
          UserError: as `prompt`.
        """
        try:
            check_prompt(record)
            prompt = read_prompt(record["prompt"])
            more = question(record) | {"prompt": prompt}
            return Prompt(where, self.prompt(prompt), more, self._notes_of(prompt))
        except RecordError as error:
            raise error.at(where) from None

    def record(self, where: str, record: dict[str, Any]) -> Example:
        """Encodes, checks and cuts one record.

        Raises:
          RecordError: "path:line: what is wrong; what to do", also for a record that is too long
            unless `config.too_long` is truncate or drop.
          UserError: what is wrong is not the record but the tokenizer.
        """
        try:
            return self._example(where, record)
        except RecordError as error:
            raise error.at(where) from None

    def identity(self) -> dict[str, Any]:
        """Returns what the ids of a record, and whether it can be used, depend on beside it."""
        return {
            **{name: getattr(self.config, name) for name in ENCODING},
            "tokenizer": self.digest,
            "pipeline": words.pipeline_of(self.tokenizer),
            "vocab_size": self.vocab_size,
            "eos_ids": list(self.eos_ids),
            "least_responses": self.least_responses,
            "date": self.date if template.writes_date(self.tokenizer) else "",
            **({"pad_id": self.pad_id} if self.is_reward else {}),
        }

    def _example(self, where: str, record: dict[str, Any]) -> Example:
        parts = read_parts(
            record,
            digest=self.digest,
            least_responses=self.least_responses,
            released=self.config.format == "released",
        )
        if self.is_reward and parts.texts is not None:
            whole, scores, notes = self._conversations_of(parts), self._scores_of(parts), ()
        elif self.config.train_on == "all_assistant":
            whole, notes = self._turns_of(parts)
            scores = parts.scores
        else:
            # What the tokenizer is asked for once serves prompt and responses.
            written = self._write_prompt(parts.prompt) if parts.prompt_ids is None else None
            prompt = self._prompt_of(parts, written)
            responses, scores, notes = self._responses_of(parts, written)
            whole = Group(prompt, responses)
        group, num_tokens = self._cut(whole), sum(whole.lengths())
        text, record = parts.prompt, question(record)
        return Example(
            where=where,
            group=group,
            scores=scores,
            record=record if text is None else record | {"prompt": text},
            prompt_hash=hash_prompt(whole.prompt.tolist() if text is None else canonical(text)),
            num_tokens=num_tokens,
            num_cut=num_tokens - sum(group.lengths()),
            is_pair=parts.is_pair,
            notes=parts.notes + notes + self._notes_of(text),
        )

    def _prompt_of(self, parts: Parts, written: str | None) -> np.ndarray:
        """Returns the ids of the prompt before cutting."""
        ids = parts.prompt_ids
        if ids is None and written is not None:
            ids = chat.ids_of_prompt(written, self._its_tokenizer(), self.config.format)
        return self._checked(ids, "the prompt")

    def _turns_of(self, parts: Parts) -> tuple[Group, tuple[str, ...]]:
        """Returns a conversation before cutting, with every answer scored, and notes.

        Raises:
          RecordError: the record is of ids or has several responses, or as `chat.encode_turns`.
        """
        if parts.texts is None or len(parts.texts) != 1:
            raise RecordError(
                "data.train_on=all_assistant wants records of messages, or of a prompt and one "
                "response",
                reason="keys",
            )
        answer = {"role": "assistant", "content": parts.texts[0]}
        turns = chat.encode_turns(
            [*as_messages(parts.prompt), answer],
            self._its_tokenizer(),
            self.eos_ids,
            join=self.config.join,
            date=self.date,
        )
        prompt, rest = self._checked(turns.prompt, "the prompt"), self._checked(turns.rest, "it")
        return Group(prompt, (rest,), scored=(np.array(turns.scored),)), turns.notes

    def _conversations_of(self, parts: Parts) -> Group:
        """Returns whole conversations before cutting; their "prompt" is what all begin with.

        Raises:
          RecordError: as `encode_whole`, or they begin differently.
          UserError: the tokenizer has a template and config.format is plain, or the reverse.
        """
        tokenizer, has_template = self._its_tokenizer(), self.config.format == "chat"
        if bool(tokenizer.chat_template) != has_template:
            raise UserError(
                "A reward model reads what its tokenizer's chat template writes, and a plain text "
                f"where there is none: set data.format={'plain' if has_template else 'chat'}."
            )
        conversations = encode_whole(
            parts.prompt,
            parts.texts or [],
            tokenizer,
            vocab_size=self.vocab_size,
            pad_id=self.pad_id,
            date=self.date,
        )
        whole, *others = share_start(conversations)
        if others:
            raise RecordError("the conversations begin with different tokens", reason="template")
        return whole

    def _scores_of(self, parts: Parts) -> np.ndarray:
        """Returns the scores with the bonus of the first. RecordError unless float32 holds it."""
        scores = parts.scores.copy()
        with np.errstate(over="ignore"):  # said next
            scores[0] += self.config.first_bonus
        if not np.isfinite(scores[0]):
            raise RecordError(
                f"the first score is {parts.scores[0]:g}, and float32 does not hold it with "
                f"data.first_bonus={self.config.first_bonus} added; scale the scores",
                reason="scores",
            )
        return scores

    def _responses_of(
        self, parts: Parts, written: str | None
    ) -> tuple[list[np.ndarray], np.ndarray, tuple[str, ...]]:
        """Returns the ids of the responses before cutting, their scores, and notes.

        A response that ended its turn has a token at least, its end-of-turn token. One that did not
        may have none; there is nothing to learn from it, and it is left out.

        Raises:
          RecordError: a response is malformed, or too few are left.
        """
        ids, notes = list(parts.ids), ()
        texts = parts.texts or []
        encoded = [k for k, given in enumerate(ids) if given is None and texts]
        if encoded:
            found, notes = chat.encode_responses(
                parts.prompt,
                [texts[k] for k in encoded],
                self._its_tokenizer(),
                self.config.format,
                self.eos_ids,
                finished=parts.finished and [parts.finished[k] for k in encoded],
                join=self.config.join,
                date=self.date,
                written=written,
            )
            for k, of_text in zip(encoded, found, strict=True):
                ids[k] = of_text
        ended = parts.finished or [True] * len(ids)
        stay = [k for k, is_ended in enumerate(ended) if is_ended or ids[k] != []]
        if len(stay) < self.least_responses:
            raise RecordError(
                f"has {len(stay)} responses of one token or more, wanted {self.least_responses}",
                reason=TOO_FEW_LEFT,
            )
        scores = self._scores_of(parts)
        arrays = [self._checked(ids[k], f"response {k}") for k in stay]
        return arrays, scores[stay], notes + (NO_TOKEN,) * (len(ids) - len(stay))

    def _cut(self, whole: Group) -> Group:
        """Returns the group cut to length, with its keys."""
        longest = max(map(len, whole.responses))
        of_prompt, of_response = _cuts(len(whole.prompt), longest, self.config)
        # Copies, so that what was cut off does not stay in memory.
        prompt = whole.prompt[of_prompt].copy()
        responses = tuple(ids[of_response].copy() for ids in whole.responses)
        scored = whole.scored and tuple(flags[of_response].copy() for flags in whole.scored)
        if self.config.format != "released":
            return Group(prompt, responses, scored=scored)
        off_ids = released.key_off_ids(self.tokenizer, self.eos_ids)
        keys = tuple(released.response_keys(ids, off_ids)[of_response] for ids in whole.responses)
        return Group(prompt, responses, (released.prompt_keys(prompt, off_ids), keys))

    def _notes_of(self, prompt: str | Messages | None) -> tuple[str, ...]:
        """Returns what is said of a prompt that a template seems to have written."""
        if prompt is None or self.config.format != "chat":
            return ()
        text = "\n".join(message["content"] for message in as_messages(prompt))
        return (RENDERED,) if any(marker in text for marker in self._markers) else ()

    @cached_property
    def _markers(self) -> list[str]:
        """What the chat template writes before a turn of the user: <|im_start|>, [INST]."""
        word = "Question"
        try:
            text = self._its_tokenizer().decode(self._encode_prompt(word))
        except RecordError:  # it wants more than a turn of the user
            return []
        return re.findall(r"<[^<>\s]+>|\[[A-Z_]+\]", text.partition(word)[0])

    def _encode_prompt(self, prompt: str | list[dict]) -> list[int]:
        return chat.encode_prompt(prompt, self._its_tokenizer(), self.config.format, date=self.date)

    def _write_prompt(self, prompt: str | list[dict]) -> str:
        return chat.write_prompt(prompt, self._its_tokenizer(), self.config.format, date=self.date)

    def _its_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("There is no tokenizer, and the records hold text; set data.tokenizer.")
        return self.tokenizer

    def _checked(self, ids: Any, who: str) -> np.ndarray:
        """Returns ids as int32. RecordError unless they are one or more ints below vocab_size."""
        if not isinstance(ids, list) or set(map(type, ids)) - {int}:
            raise RecordError(f"{who} is not a list of token ids", reason="ids")
        if not ids:
            raise RecordError(
                f"{who} has no tokens; write something or leave it out", reason="empty"
            )
        low, high = min(ids), max(ids)
        if not 0 <= low <= high < self.vocab_size:
            raise RecordError(
                f"{who} has ids from {low} to {high}, wanted [0, {self.vocab_size}); use "
                "the model's own tokenizer",
                reason="ids",
            )
        return np.asarray(ids, np.int32)


def check_prompt(record: dict[str, Any]) -> None:
    """Raises RecordError unless a record that is to be answered has a prompt, and no empty one."""
    if "prompt" not in record:
        raise RecordError(f"wanted a 'prompt', got the keys {sorted(record)}", reason="keys")
    if record["prompt"] in ("", [], None):
        raise RecordError("the prompt is empty; write something or leave it out", reason="empty")


def hash_prompt(prompt: str | list) -> float:
    """Returns sha256 of a `canonical` prompt's, or of ids', JSON as a number in [0, 1)."""
    text = json.dumps(prompt, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: exact in a float64


def _cuts(prompt_len: int, longest_response: int, config: DataSection) -> tuple[slice, slice]:
    """Returns what is kept of the prompt and of each response.

    A response keeps its first tokens, so a cut one has no end-of-turn token to learn from.

    Raises:
      RecordError: something is too long, and `config.too_long` is skip or stop.
    """
    limits = dict(max_prompt_len=config.max_prompt_len, max_response_len=config.max_response_len)
    longest = dict(max_prompt_len=prompt_len, max_response_len=longest_response)
    if config.format == "released":
        return released.cuts(prompt_len, longest_response, **limits)
    for name, limit in limits.items():
        if longest[name] > limit and config.too_long in ("skip", "stop"):
            raise RecordError(
                f"has {longest[name]} tokens where data.{name} is {limit}; raise it, or set "
                "data.too_long to truncate or skip",
                reason="too_long",
            )
    start = max(0, prompt_len - config.max_prompt_len) if config.prompt_keep == "end" else 0
    return slice(start, start + config.max_prompt_len), slice(config.max_response_len)
