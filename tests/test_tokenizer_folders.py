"""Tokenizers that are read from folders, and their chat templates: which one, or one line."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers import DENSE, POINTER

from nca_jax import build
from nca_jax.checks import UserError
from nca_jax.config import default_config
from nca_jax.data.chat import encode_prompt
from nca_jax.data.sources import RecordError
from nca_jax.models.formats import pretrained, templates
from nca_jax.models.formats.pretrained import load_tokenizer, save_tokenizer

TURNS = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


def write_tokenizer(folder: Path, chat_template=None) -> str:
    """Writes a tokenizer of two words, 0 and 1; returns its folder."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "b"}
    content |= {} if chat_template is None else {"chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return str(folder)


NAMED = [{"name": "chat", "template": TURNS}, {"name": "tool_use", "template": "-"}]


def tokenizer_of(where: str, template: str = "", vocab_size: int = 2):
    """Returns the tokenizer as every command opens it."""
    config = default_config()
    config.data.tokenizer, config.data.chat_template = where, template
    return build.open_tokenizer(config, dataclasses.replace(DENSE, vocab_size=vocab_size))


def test_a_tokenizer_with_more_ids_than_the_model_is_said(tmp_path, capsys):
    where = write_tokenizer(tmp_path)
    tokenizer_of(where)
    assert not capsys.readouterr().out
    assert len(tokenizer_of(where, vocab_size=1)) == 2
    assert "has 2 ids, the model's vocabulary 1: a record with one" in capsys.readouterr().out


def test_one_of_several_chat_templates_is_chosen_by_its_name(tmp_path):
    where = write_tokenizer(tmp_path, NAMED)
    with pytest.raises(UserError, match="set config.data.chat_template to 'chat' or 'tool_use'"):
        tokenizer_of(where)
    with pytest.raises(UserError, match="no chat template 'x'.* must be 'chat' or 'tool_use'"):
        tokenizer_of(where, "x")
    assert tokenizer_of(where, "chat").chat_template == TURNS

    out = tmp_path / "out"
    out.mkdir()
    save_tokenizer(where, out, "chat")  # the policy's template is the default of what is exported
    assert tokenizer_of(str(out), "default").chat_template == TURNS


def test_the_default_of_several_chat_templates_needs_no_name(tmp_path):
    default = {"name": "default", "template": "d"}
    tokenizer = tokenizer_of(write_tokenizer(tmp_path, [*NAMED, default]))
    assert encode_prompt("a", tokenizer, "chat") == tokenizer.encode("d")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Newer"}}, "Cannot load the tokenizer in .*Exception: "),
        ({"version": "9.0"}, "Cannot load the tokenizer in .*newer version of tokenizers"),
        ({"added_tokens": [{"id": "a"}]}, "Cannot load the tokenizer in "),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(tmp_path, change, message):
    where = write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(where)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("field", ["eos_token", "chat_template", "extra_special_tokens"])
def test_a_tokenizer_config_of_another_kind_is_one_line(tmp_path, field):
    where = write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({field: [{"name": 5}]}))
    with pytest.raises(UserError, match="Cannot load the tokenizer in "):
        load_tokenizer(where)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_a_pointer_or_too_large_is_one_line(tmp_path, monkeypatch, name):
    where = write_tokenizer(tmp_path)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is a pointer of Git LFS"):
        load_tokenizer(where)
    (tmp_path / name).write_text("{}" + " " * 100_000)
    monkeypatch.setattr(pretrained, "TOKENIZER_BYTES", 50_000)
    with pytest.raises(UserError, match=f"{name} has 100002 bytes; wanted at most 50000"):
        load_tokenizer(where)


ENDLESS = "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3


def test_a_chat_template_that_comes_to_no_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    with pytest.raises(UserError, match="came to no end in 0.5 seconds"):
        tokenizer_of(write_tokenizer(tmp_path, ENDLESS))


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(10**9) %}x{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% if 1 %}" * 300 + "{% endif %}" * 300,
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{% for",
    ],
)
def test_a_chat_template_that_fails_is_an_error_of_the_record(tmp_path, template):
    tokenizer = tokenizer_of(write_tokenizer(tmp_path, template))
    with pytest.raises(RecordError, match="the chat template refuses it"):
        encode_prompt("a", tokenizer, "chat")
