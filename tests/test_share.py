"""Several processes read the same files; threads stand for processes here."""

import threading
from concurrent.futures import ThreadPoolExecutor

from helpers import data_config, id_record, make_encoder, write

from nca_jax.checks import UserError
from nca_jax.data.load import Gather, load_examples


def in_processes(num_processes: int, run) -> list:
    """Returns `run(process, gather)` of every process, a thread here, or its UserError."""
    barrier, given = threading.Barrier(num_processes), {}

    def one(process: int):
        def gather(mine: bytes) -> list[bytes]:
            given[process] = mine
            barrier.wait(timeout=10)
            parts = [given[p] for p in range(num_processes)]
            barrier.wait(timeout=10)
            return parts

        try:
            return run(process, gather)
        except UserError as error:
            return error

    with ThreadPoolExecutor(num_processes) as pool:
        return list(pool.map(one, range(num_processes)))


def read(files: str, gather: Gather, **changes):
    return load_examples(files, make_encoder(data_config(**changes)), gather=gather)


def test_a_bad_row_stops_every_process_with_the_same_words(tmp_path):
    files = write(tmp_path / "rows.jsonl", [id_record(0), {"prompt": "no"}, id_record(2)])
    found = in_processes(3, lambda _, gather: read(files, gather))
    assert {str(error) for error in found} == {
        f"{files}:2: wanted keys (prompt_ids, response_ids, scores) or (prompt, responses, scores) "
        "or (prompt, chosen, rejected) or (prompt, response) or (messages), got (prompt)"
    }


def test_processes_that_do_not_see_the_same_files_are_refused_by_name(tmp_path):
    for process in range(2):
        (tmp_path / str(process)).mkdir()
        write(tmp_path / str(process) / "a.jsonl", [id_record(1)])
        write(tmp_path / str(process) / "b.jsonl", [id_record(2 + process)])
    found = in_processes(2, lambda process, gather: read(f"{tmp_path}/{process}/*.jsonl", gather))
    assert all("Process 1 sees other files" in str(error) for error in found)
    assert all("than process 0: b.jsonl; give all of them the same" in str(e) for e in found)


def test_a_process_that_sees_no_file_stops_all_of_them(tmp_path):
    write(tmp_path / "0.jsonl", [id_record(1)])
    found = in_processes(2, lambda process, gather: read(f"{tmp_path}/{process}.jsonl", gather))
    assert all("than process 0: fewer" in str(error) for error in found)
