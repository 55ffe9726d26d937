"""Texts to token ids by the words that they share: most of a text has been encoded before.

A text is cut at spaces, and a word keeps the space before it. That gives the ids of the whole text
where no token of the vocabulary goes on from a word into the space after it, which `_cut_of` looks
up, and where what comes before BPE (normalisers, regular expressions) does not look across such a
space. The first texts are encoded both ways, and one difference ends the cutting: what is returned
is always what the tokenizer says of whole texts.
"""

import functools
import hashlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from nca_jax.protocols import Tokenizer

Encode = Callable[[list[str]], list[list[int]]]
EncodeAfter = Callable[[str, list[str]], list[list[int]]]  # (what all texts begin with, the rest)

PRINTED = {chr(code) for code in range(ord("!"), ord("~") + 1)}
SPACE_AFTER = re.compile("[!-~][ Ġ▁]")  # a space as it is, in BPE of bytes, in SentencePiece
BEFORE = "a"  # what a word is encoded after: at the start of a text it may have other ids
MOST_WORDS = 2**18  # that are kept, of some 150 bytes
LONGEST = 64  # characters of a word that is kept: a longer one is hardly seen again
FIRST = "\0"  # a mark of the word that a text begins with, which has no space before it
COMPARED = 256  # texts that are encoded both ways


def ids_of(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the ids of one or more texts, without special tokens around them."""
    return _words_of(tokenizer)("", texts)


def ids_after(start: str, texts: list[str], tokenizer: Tokenizer) -> list[list[int]] | None:
    """Returns the ids of each text as it goes on from `start`.

    None where start and text as one do not begin with the ids of `start`.
    """
    of_start, *wholes = _words_of(tokenizer)(start, ["", *texts])
    if any(whole[: len(of_start)] != of_start for whole in wholes):
        return None
    return [whole[len(of_start) :] for whole in wholes]


def pipeline_of(tokenizer: Tokenizer | None) -> str:
    """Returns a digest of how a tokenizer makes ids of a text, beside its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = type(tokenizer).__name__ if backend is None else backend.to_str()
    return hashlib.sha256(said.encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=2)
def _words_of(tokenizer: Tokenizer) -> EncodeAfter:
    """Returns `encode(start, texts)` of a tokenizer, whose vocabulary does not change any more."""

    def whole(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    def after(start: str, texts: list[str]) -> list[list[int]]:
        return whole([start + text for text in texts])

    cut = _cut_of(tokenizer)
    if cut is None:
        return after
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # all that are cut have one

    def parts(texts: list[str]) -> list[list[int]]:
        return [x.ids for x in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return _Words(whole, parts, cut)


class _Known(dict[str, bytes | bytearray]):
    """The ids of words, as bytes of int32.

    What is looked up in vain gets an empty place in `lacking`, to be filled before it is read.
    """

    def __init__(self):
        super().__init__()
        self.lacking: dict[str, bytearray] = {}

    def __missing__(self, word: str) -> bytearray:
        return self.lacking.setdefault(word, bytearray())


class _Words:
    """A memory of the ids of words.

    Args:
      whole: encodes whole texts.
      parts: the same, without what transformers does beside it, which takes longer than a word.
      cut: where texts are cut; the space that it finds belongs to the word after it.
    """

    def __init__(self, whole: Encode, parts: Encode, cut: re.Pattern[str]):
        self._whole, self._parts, self._cut = whole, parts, cut
        self._before = len(whole([BEFORE])[0])
        self._known = _Known()
        self._num_compared = 0

    def __call__(self, start: str, texts: list[str]) -> list[list[int]]:
        if self._num_compared < 0:  # a difference was found
            return self._whole([start + text for text in texts])
        found = self._by_words(start, texts)
        if self._num_compared < COMPARED:
            self._num_compared += len(texts)
            if found != (wholes := self._whole([start + text for text in texts])):
                self._num_compared = -1
                return wholes
        return found

    def _by_words(self, start: str, texts: list[str]) -> list[list[int]]:
        if len(self._known) > MOST_WORDS:
            self._known = _Known()
        known = self._known
        # A cut goes by what is next to its space, so those of `start` are those of every text.
        *shared, last = self._cut.split(start)
        parts = [self._cut.split(last + text) for text in texts]
        if shared:
            shared[0] = FIRST + shared[0]
        else:
            for words in parts:
                words[0] = FIRST + words[0]
        of_shared = list(map(known.__getitem__, shared))
        found = [list(map(known.__getitem__, words)) for words in parts]
        if known.lacking:
            lacking, known.lacking = known.lacking, {}
            for (word, place), ids in zip(lacking.items(), self._encode([*lacking]), strict=True):
                place += ids
                if len(word) <= LONGEST:
                    known[word] = ids
        head = b"".join(of_shared)
        return [np.frombuffer(b"".join([head, *of]), np.int32).tolist() for of in found]

    def _encode(self, words: list[str]) -> list[bytes]:
        texts = [word[1:] if word[0] == FIRST else f"{BEFORE} {word}" for word in words]
        starts = [0 if word[0] == FIRST else self._before for word in words]
        return [
            np.array(ids[start:], np.int32).tobytes()
            for start, ids in zip(starts, self._parts(texts), strict=True)
        ]


def _cut_of(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Returns the spaces at which texts are cut; None where that may change their ids.

    They are single and between printed ASCII, of which none begins or ends an added token: what
    surrounds such a token is encoded apart.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    is_fast = getattr(tokenizer, "is_fast", False)
    if not is_fast or any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None
    if any(map(SPACE_AFTER.search, tokenizer.get_vocab())):
        return None
    names = [token.content for token in added if token.content]
    left = "".join(sorted(PRINTED - {name[-1] for name in names}))
    right = "".join(sorted(PRINTED - {name[0] for name in names}))
    return re.compile(f" (?<=[{re.escape(left)}] )(?=[{re.escape(right)}])")
