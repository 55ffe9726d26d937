"""Several processes share the reading of rows; threads stand for processes here."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from helpers import data_config, id_record, make_encoder, write

from nca_jax.checks import UserError
from nca_jax.data import load
from nca_jax.data.encode import Encoder
from nca_jax.data.group import Group


def in_processes(num_processes: int, run) -> list:
    """Returns `run(share)` of every process, a thread here, or the UserError that it raised."""
    barrier, given = threading.Barrier(num_processes), {}

    def one(process: int):
        def gather(mine: bytes) -> list[bytes]:
            given[process] = mine
            barrier.wait(timeout=10)
            parts = [given[p] for p in range(num_processes)]
            barrier.wait(timeout=10)
            return parts

        try:
            return run(load.Share(process, num_processes, gather))
        except UserError as error:
            return error

    with ThreadPoolExecutor(num_processes) as pool:
        return list(pool.map(one, range(num_processes)))


def read(files: str, share=load.ALONE, **changes):
    return load.load_examples(files, make_encoder(data_config(**changes)), share=share)


@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_every_row_is_encoded_by_one_process_and_known_to_all_in_order(
    tmp_path, monkeypatch, num_processes
):
    files = write(tmp_path / "rows.jsonl", [*map(id_record, range(7)), {"prompt": "no"}])
    alone = read(files, bad_rows="skip")
    encoded = []
    encode = Encoder.record

    def counting(self, where, record):
        encoded.append(where)
        return encode(self, where, record)

    monkeypatch.setattr(Encoder, "record", counting)
    for found in in_processes(num_processes, lambda share: read(files, share, bad_rows="skip")):
        assert found.counts == alone.counts == {"records skipped: keys": 1}
        for a, b in zip(found.sources[0], alone.sources[0], strict=True):
            assert (a.where, a.prompt_hash) == (b.where, b.prompt_hash)
            assert a.group.prompt.tolist() == b.group.prompt.tolist()
            assert [x.tolist() for x in a.group.responses] == [
                x.tolist() for x in b.group.responses
            ]
    assert sorted(encoded) == [f"{files}:{i}" for i in range(1, 9)]


def test_a_bad_row_stops_every_process_with_the_same_words(tmp_path):
    files = write(tmp_path / "rows.jsonl", [id_record(0), {"prompt": "no"}, id_record(2)])
    found = in_processes(3, lambda share: read(files, share))
    assert {str(error) for error in found} == {
        f"{files}:2: wanted keys (prompt_ids, response_ids, scores) or (prompt, responses, scores) "
        "or (prompt, chosen, rejected), got (prompt)"
    }


def test_processes_that_do_not_see_the_same_files_are_refused(tmp_path, monkeypatch):
    for process in range(2):
        (tmp_path / str(process)).mkdir()
        write(tmp_path / str(process) / "rows.jsonl", [id_record(i) for i in range(3 + process)])
    found = in_processes(2, lambda share: read(f"{tmp_path}/{share.process}/*.jsonl", share))
    assert all("Process 1 sees other files" in str(error) for error in found)


def test_files_of_the_same_size_but_other_contents_are_refused_by_name(tmp_path):
    for process in range(2):
        (tmp_path / str(process)).mkdir()
        write(tmp_path / str(process) / "a.jsonl", [id_record(1)])
        write(tmp_path / str(process) / "b.jsonl", [id_record(2 + process)])
    found = in_processes(2, lambda share: read(f"{tmp_path}/{share.process}/*.jsonl", share))
    assert all("than process 0: b.jsonl, 2 records there, 2 here" in str(error) for error in found)


def test_examples_come_through_bytes_as_they_are(tmp_path):
    items = list(
        load._read(
            write(tmp_path / "rows.jsonl", [id_record(0), {"prompt": "no"}]),
            load.ALONE,
            make_encoder(data_config()),
        )
    )
    prompt, responses, _ = items[0].group
    group = Group(prompt, responses, (prompt > 5, tuple(ids > 5 for ids in responses)))
    record = {"prompt": [{"role": "user"}], "answer": 7, "more": {"a": [None, "é", 0.5]}}
    items.insert(0, dataclasses.replace(items[0], group=group, record=record, notes=("x", "y")))
    seen, found = load._from_bytes(load._to_bytes({"records": 2}, items))
    assert seen == {"records": 2}
    for got, want in zip(found[:2], items[:2], strict=True):
        assert (got.record, got.notes) == (want.record, want.notes)
        jax.tree.map(np.testing.assert_array_equal, vars(got), vars(want))
        assert got.group.prompt.dtype == np.int32 and got.scores.dtype == np.float32
    assert str(found[2]) == str(items[2]) and found[2].reason == "keys"
