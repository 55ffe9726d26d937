"""Records encoded a chunk at a time, in this process or by others that share the cores."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

from nca_jax.data.encode import TOO_FEW_LEFT, Encoder, Example
from nca_jax.data.sources import Raw, RecordError, parse
from nca_jax.data.table import Table, table_of
from nca_jax.protocols import DataSection

CHUNK = 256  # records
AHEAD = 3  # chunks a process that are read before they are wanted

_encoder: Encoder  # of a process that encodes for another one


class Chunk(NamedTuple):
    """What became of some records, in their order."""

    table: Table
    counts: Counter[str]  # of what is said of the records, see `load.notes_of`
    num_records: int
    done: float  # as of the last `Raw`


def encode_chunk(encoder: Encoder, raws: list[Raw]) -> Chunk:
    """Encodes some records; a record at fault stops by `config.bad_rows`, or is counted.

    Raises:
      RecordError: a record at fault stops; it is the first of them.
      UserError: what is wrong is not the record but the tokenizer.
    """
    counts: Counter[str] = Counter()
    examples = [item for raw in raws if (item := _usable(encoder, raw, counts)) is not None]
    return Chunk(table_of(examples), counts, len(raws), raws[-1].done)


def encoded(raws: Iterable[Raw], encoder: Encoder, *, num_processes: int = 1) -> Generator[Chunk]:
    """Iterates over the chunks of records, which so many processes encode.

    Raises:
      RecordError, UserError: as `encode_chunk`.
    """
    raws = iter(raws)
    chunks = iter(lambda: list(itertools.islice(raws, CHUNK)), [])
    if num_processes == 1:
        yield from (encode_chunk(encoder, chunk) for chunk in chunks)
        return
    # Started anew, since a fork of a process with JAX's threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _begin, (encoder,)) as pool:
        waiting: deque[Future[Chunk]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_encode, chunk))
                if len(waiting) == AHEAD * num_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def note_fault(error: RecordError, config: DataSection, counts: Counter[str]) -> None:
    """Counts a record that cannot be used as skipped, or raises its error.

    What is wrong with a record stops by `config.bad_rows`, its length by `config.too_long`; a
    record of samples that hold nothing is no one's mistake.
    """
    rules = {"too_long": config.too_long, TOO_FEW_LEFT: "skip"}
    if rules.get(error.reason, config.bad_rows) == "stop":
        raise error
    counts[f"records skipped: {error.reason}"] += 1


def _usable(encoder: Encoder, raw: Raw, counts: Counter[str]) -> Example | None:
    try:
        example = encoder.record(*parse(raw))
    except RecordError as error:
        note_fault(error, encoder.config, counts)
        return None
    counts.update(example.notes)
    return example


def _begin(encoder: Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all: one answers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = encoder


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode(raws: list[Raw]) -> Chunk:
    return encode_chunk(_encoder, raws)
