"""Records that are encoded once: the store gives what memory gives, or says that it is damaged."""

import contextlib
import json
import os

import numpy as np
import pytest
from helpers import data_config, id_record, make_encoder, write

from nca_jax.checks import UserError
from nca_jax.data import chunks, load, store
from nca_jax.data.pipeline import Dataset
from nca_jax.data.store import Keep, read_stored

NUM = 23


@pytest.fixture
def files(tmp_path, monkeypatch) -> str:
    """Returns a file that is large enough, in parts of four records, one process encoding."""
    monkeypatch.setattr(store, "SMALL", 0)
    monkeypatch.setattr(store, "PART", 4)
    monkeypatch.setattr(chunks, "CHUNK", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    rows = [id_record(i, 2 + i % 3) for i in range(NUM)]
    return write(tmp_path / "rows.jsonl", [*rows[:5], {"prompt": "no"}, *rows[5:], rows[0]])


@pytest.fixture
def keep(tmp_path) -> Keep:
    return Keep(tmp_path / "tokens", lambda path: contextlib.nullcontext(), lambda *_: None)


def encoder_of(**changes):
    return make_encoder(data_config(bad_rows="skip", **changes))


def read(files: str, keep: Keep | None, **changes):
    (table,), counts = load.load_examples(files, encoder_of(**changes), keep=keep)
    return table, counts


def folder_of(keep: Keep):
    (found,) = (path.parent for path in keep.folder.glob("*/made_from.json"))
    return found


def assert_same(table, other) -> None:
    assert len(table) == len(other)
    for one, two in zip(table, other, strict=True):
        assert (one.where, one.record, one.num_cut) == (two.where, two.record, two.num_cut)
        assert one.scores.tolist() == two.scores.tolist()
        for x, y in zip((one.group.prompt, *one.group.responses),
                        (two.group.prompt, *two.group.responses), strict=True):  # fmt: skip
            assert x.dtype == y.dtype == np.int32 and x.tolist() == y.tolist()


def test_a_store_gives_what_memory_gives_and_the_next_start_encodes_nothing(
    files, keep, monkeypatch
):
    in_memory, said = read(files, None)
    stored, counts = read(files, keep)
    assert_same(stored, in_memory)
    assert list(counts.items()) == list(said.items()) and counts["records skipped: keys"] == 1
    monkeypatch.setattr(store, "stream", None)
    again, counts = read(files, keep)
    assert_same(again, in_memory)
    assert counts == said and again.entries.tolist() == stored.entries.tolist()


def test_batches_of_a_store_are_those_of_memory_bit_for_bit(files, keep):
    config = data_config(choose="random", num_responses=2)
    of_both = [Dataset([read(files, one)[0]], config, seed=3) for one in (None, keep)]
    for step in range(9):
        (a, *rest), (b, *others) = (dataset.batch_at(step) for dataset in of_both)
        assert rest == others
        for x, y in zip((*a.rows, a.scores, a.mask), (*b.rows, b.scores, b.mask), strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_start_after_a_stop_encodes_what_is_lacking(files, keep, monkeypatch):
    def stops(entry, records, done):
        if records == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(files, keep._replace(progress=stops))
    assert not list(keep.folder.glob("*/made_from.json"))
    encoded, encode = [], chunks.encode_chunk

    def counting(encoder, raws):
        encoded.extend(raw.where for raw in raws)
        return encode(encoder, raws)

    monkeypatch.setattr(chunks, "encode_chunk", counting)
    assert_same(read(files, keep)[0], read(files, None)[0])
    assert encoded[0] == f"{files}:13" and encoded[12] == f"{files}:25"
    assert not list(keep.folder.glob("*.making"))


@pytest.mark.parametrize("name", ["00001.bytes", "00001.index"])
@pytest.mark.parametrize("size", [0, 50, -1])
def test_a_store_that_was_cut_off_is_named_when_it_is_opened(files, keep, name, size):
    read(files, keep)
    path = folder_of(keep) / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"00001.bytes is damaged .* encodes the records anew"):
        read(files, keep)


def test_a_store_that_is_cut_off_while_it_is_read_is_named(files, keep):
    read(files, keep)
    table, _ = read(files, keep)
    os.truncate(folder_of(keep) / "00001.bytes", 0)
    with pytest.raises(UserError, match="00001.bytes is damaged at byte 0"):
        list(table)


@pytest.mark.parametrize("name", ["00001.bytes", "00001.index"])
def test_a_flipped_bit_of_a_store_is_never_read_back_as_another_number(files, keep, name):
    read(files, keep)
    path, rng = folder_of(keep) / name, np.random.default_rng(0)
    whole = path.read_bytes()
    for at in rng.integers(0, len(whole), 40).tolist():
        content = bytearray(whole)
        content[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        with pytest.raises(UserError, match="00001.bytes is damaged"):
            list(read(files, keep)[0])
    path.write_bytes(whole)
    assert_same(read(files, keep)[0], read(files, None)[0])


def test_a_store_is_of_these_contents_and_this_encoding(files, keep):
    read(files, keep)
    os.utime(files, (1, 1))  # the same contents, of another time
    read(files, keep)
    assert len(list(keep.folder.glob("*/made_from.json"))) == 1
    read(files, keep, max_response_len=1)
    assert len(list(keep.folder.glob("*/made_from.json"))) == 2
    with open(files, "a") as file:
        file.write(json.dumps(id_record(99)) + "\n")
    table, _ = read(files, keep)
    assert len(list(keep.folder.glob("*/made_from.json"))) == 3 and len(table) == NUM + 2


def test_a_small_file_is_encoded_at_every_start(files, keep, monkeypatch):
    monkeypatch.setattr(store, "SMALL", 1 << 20)
    read(files, keep)
    assert not keep.folder.exists()


def test_other_processes_encode_the_same(files, monkeypatch, keep):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert_same(read_stored(files, encoder_of(), keep)[0], read(files, None)[0])


def test_a_record_at_fault_stops_the_other_processes_with_its_place(files, monkeypatch, keep):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    with pytest.raises(UserError, match=f"{files}:6: wanted keys"):
        read_stored(files, make_encoder(data_config()), keep)
