"""Records of the Hugging Face Hub by the name of their data set, and of the files it has them in.

An entry of data.files is `hf:NAME[:CONFIG]:SPLIT`, read by the library `datasets` as a stream: of
what is read nothing stays but what a run makes of it. NAME is that of the hub, or a local folder.
A column without a value (null) is a key that the record lacks.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nca_jax.checks import UserError

PREFIX = "hf:"
BATCH = 256  # records of a parquet file in memory at once


def records(entry: str) -> Iterator[tuple[int, dict[str, Any], float]]:
    """Iterates over (index, record, how much has been read with it; 0: not known).

    Raises:
      UserError: the hub, or `datasets`, does not give it.
    """
    import datasets  # pyright: ignore[reportMissingImports]  # an extra: see checks.EXTRAS

    name, config, split = _parts(entry)
    try:
        found = datasets.load_dataset(name, config, split=split, streaming=True)
        splits = getattr(getattr(found, "info", None), "splits", None) or {}
        total = getattr(splits.get(split), "num_examples", None)
        for index, record in enumerate(found):
            yield index, _filled(record), (index + 1) / total if total else 0.0
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"{entry}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]}"
            "); look at its name, configuration and split, or give its files."
        ) from None


def local_files(entry: str) -> list[str]:
    """Returns the files of a data set that is a local folder, sorted; [] of one of the hub."""
    folder = Path(_parts(entry)[0])
    return sorted(str(path) for path in folder.rglob("*") if path.is_file())


def revision(entry: str) -> str:
    """Returns the commit of the data set that the hub has now.

    Raises:
      UserError: the hub cannot be reached, or has no such data set.
    """
    import datasets  # noqa: F401  # pyright: ignore[reportMissingImports]  # without it, no records
    import huggingface_hub

    name, _, _ = _parts(entry)
    try:
        return huggingface_hub.HfApi().dataset_info(name).sha or ""
    except Exception as error:  # also those of the client that it speaks HTTP by
        raise UserError(
            f"{entry}: the hub does not give it ({' '.join(str(error).split())[:300]}); look at "
            "its name, or give its files."
        ) from None


def parquet_records(path: str, file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Iterates over the records of an open parquet file.

    Raises:
      UserError: it cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=BATCH):
                yield from map(_filled, batch.to_pylist())
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it anew.") from None


def _parts(entry: str) -> tuple[str, str | None, str]:
    """Returns the name, the configuration and the split that an entry says."""
    found = re.fullmatch(r"hf:([^:]+)(?::([^:]+))?:([^:]+)", entry)
    if found is None:
        raise UserError(f"{entry!r} is not of the form hf:NAME[:CONFIG]:SPLIT.")
    return found[1], found[2], found[3]


def _filled(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value is not None}
