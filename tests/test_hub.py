"""Records of parquet and JSON files, and of the hub by name, through a library that stands in."""

import contextlib
import importlib.util
import json
import sys
from types import ModuleType

import pytest
from helpers import data_config, make_encoder

from nca_jax.checks import UserError
from nca_jax.data import hub, store
from nca_jax.data.load import load_examples
from nca_jax.data.sources import list_files, parse, split_globs, stream
from nca_jax.models.formats.pretrained import load_tokenizer

SCORED = {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 0.0], "note": None}
PAIR = {  # the prompt is what both conversations begin with
    key: [{"role": "user", "content": "q"}, {"role": "assistant", "content": key}]
    for key in ("chosen", "rejected")
}


@pytest.fixture
def hub_of(monkeypatch):
    """Returns a function that puts a library `datasets` in place that has these data sets."""

    def put(**sets: list[dict]) -> list:
        asked, library = [], ModuleType("datasets")

        def load_dataset(name, config, *, split, streaming):
            asked.append((name, config, split, streaming))
            if name not in sets:
                raise ValueError(f"no {name}")
            return iter(sets[name])

        library.__dict__["load_dataset"] = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", library)
        return asked

    return put


def records_of(entry: str) -> list[tuple[str, dict]]:
    return [parse(raw) for raw in stream(entry)]


def test_an_array_of_json_is_read_as_lines_are(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"x": 1}, {"x": 2}], indent=2))
    (tmp_path / "b.json").write_text('{"x": 3}\n')
    found = records_of(f"{tmp_path}/*.json")
    assert [record["x"] for _, record in found] == [1, 2, 3]
    assert [where for where, _ in found] == [
        f"{tmp_path}/{x}" for x in ("a.json:1", "a.json:2", "b.json:1")
    ]
    (tmp_path / "a.json").write_text("[1,")
    with pytest.raises(UserError, match=r"a\.json: is no array of JSON"):
        records_of(f"{tmp_path}/a.json")


def test_a_parquet_file_is_read_and_a_null_is_a_key_that_lacks(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([SCORED, SCORED]), path)
    scored = {key: value for key, value in SCORED.items() if value is not None}
    assert records_of(path) == [(f"{path}:{i}", scored) for i in (1, 2)]
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"b\.parquet: cannot be read"):
        records_of(str(tmp_path / "b.parquet"))


def test_a_data_set_of_the_hub_is_streamed_by_name_configuration_and_split(hub_of):
    asked = hub_of(**{"org/pairs": [PAIR, PAIR | {"rejected": None}]})
    config = data_config(bad_rows="skip")
    encoder = make_encoder(config, load_tokenizer("byte"))
    (table,), counts = load_examples("hf:org/pairs:en:train", encoder)
    assert asked == [("org/pairs", "en", "train", True)]
    assert table[0].where == "hf:org/pairs:en:train:0" and table[0].record == {"prompt": "q"}
    assert counts == {"records skipped: keys": 1}
    with pytest.raises(UserError, match="hf:org/none:train: cannot be read .*no org/none"):
        load_examples("hf:org/none:train", encoder)
    with pytest.raises(UserError, match="not of the form hf:NAME"):
        load_examples("hf:org", encoder)


def test_a_data_set_of_the_hub_is_stored_by_its_commit(hub_of, monkeypatch, tmp_path):
    asked, commits = hub_of(**{"org/pairs": [PAIR] * 3}), ["1"]
    monkeypatch.setattr(hub, "revision", lambda entry: commits[0])
    monkeypatch.setattr(store.os, "sched_getaffinity", lambda pid: {0})
    keep = store.Keep(tmp_path, lambda path: contextlib.nullcontext(), lambda *_: None)
    encoder = make_encoder(data_config(), load_tokenizer("byte"))
    for commit, times in (("1", 1), ("1", 1), ("2", 2)):
        commits[0] = commit
        (table,), _ = load_examples("hf:org/pairs:train", encoder, keep=keep)
        assert len(table) == 3 and len(asked) == times

    def gone(entry):
        raise UserError("no network.")

    monkeypatch.setattr(hub, "revision", gone)
    assert len(load_examples("hf:org/pairs:train", encoder, keep=keep).sources[0]) == 3
    assert len(asked) == 2


def test_entries_of_the_hub_are_parted_as_others_are():
    parts = ["a.parquet", "b.jsonl", "hf:org/x:train", "hf:org/y:en:test"]
    assert split_globs("+".join(parts)) == split_globs(",".join(parts)) == parts
    assert list_files("hf:org/x:train") == []


def test_a_hub_that_cannot_be_reached_and_a_library_that_lacks_are_one_line(hub_of, fails):
    flags = ("--config=configs/jsonl.py:files=hf:org/x:train,smoke", "--config.data.rows=8")
    if not importlib.util.find_spec("datasets"):
        assert "datasets is not installed: pip install 'nca_jax[datasets]'" in fails(
            "inspect", *flags
        )
    hub_of()
    assert "hf:org/x:train: the hub does not give it" in fails("inspect", *flags)
