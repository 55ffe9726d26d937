"""Texts that are encoded by the words they share have the ids of whole texts."""

import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nca_jax.data import words
from nca_jax.data.words import ids_after, ids_of

WORDS = [
    "the", "The", "cat's", "don't", "naïve", "日本", "x", "42", "3.14", "…", "(a)", "end.\n\nNext",
    "\ttab", "  two", "<|end|>", "<|end|>x", "a<|end|>", "wordword", "é", "W" * 90, "\u00a0", "-",
]  # fmt: skip
TEXTS = [
    " ".join(random.Random(seed).choices(WORDS, k=random.Random(seed).randrange(1, 40)))
    for seed in range(400)
]
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
METASPACE = pre_tokenizers.Metaspace(prepend_scheme="first")
LLAMA2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def trained(pre_tokenizer=None, normalizer=None, **more):
    tokenizer = Tokenizer(models.BPE())
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text[:200] for text in TEXTS[:40]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", **more)


@pytest.mark.parametrize(
    "parts",
    [dict(pre_tokenizer=x) for x in (GPT2, LLAMA3, METASPACE)],
    ids=["gpt2", "llama3", "metaspace"],
)
def test_ids_are_those_of_whole_texts_also_of_words_that_were_seen(parts, monkeypatch):
    tokenizer = trained(**parts)
    monkeypatch.setattr(words, "COMPARED", 0)  # nothing but the words
    wholes = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    for start in range(0, len(TEXTS), 7):
        assert ids_of(TEXTS[start : start + 7], tokenizer) == wholes[start : start + 7]
    assert ids_of(TEXTS[::-1], tokenizer) == wholes[::-1]
    assert words._cut_of(tokenizer) is not None


@pytest.mark.parametrize("parts", [dict(pre_tokenizer=x) for x in (GPT2, METASPACE)])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_what_follows_a_start_is_what_the_whole_text_has_after_it(parts, share, monkeypatch):
    tokenizer = trained(**parts)
    monkeypatch.setattr(words, "COMPARED", 0)
    for text in TEXTS[:100]:
        start, rest = text[: (at := int(share * len(text)))], text[at:]
        of_start, whole = tokenizer([start, text], add_special_tokens=False)["input_ids"]
        wanted = [whole[len(of_start) :]] if whole[: len(of_start)] == of_start else None
        assert ids_after(start, [rest], tokenizer) == wanted


def test_a_vocabulary_whose_tokens_hold_spaces_is_not_cut():
    tokenizer = trained(normalizer=LLAMA2)  # trained without words: tokens go over spaces
    assert words._cut_of(tokenizer) is None
    assert ids_of(TEXTS[:9], tokenizer) == tokenizer(TEXTS[:9], add_special_tokens=False).input_ids


def test_a_difference_ends_the_cutting(monkeypatch):
    tokenizer = trained(GPT2)
    monkeypatch.setattr(words, "BEFORE", "the the")  # stands for what is not expected
    monkeypatch.setattr(words._Words, "_encode", lambda self, lacking: [b""] * len(lacking))
    wholes = tokenizer(TEXTS[:9], add_special_tokens=False)["input_ids"]
    assert ids_of(TEXTS[:9], tokenizer) == wholes
    monkeypatch.setattr(words, "COMPARED", 0)
    assert ids_of(TEXTS[:9], tokenizer) == wholes
