"""A prepared tensorflow-dataset as a random-access source of records, without TensorFlow.

An entry of data.files is `tfds:NAME[/BUILDER_CONFIG]:SPLIT`; it is found under $TFDS_DATA_DIR, or
~/tensorflow_datasets, in its newest version. SPLIT may be a slice: train[:100]. Records are read
from a local disk: a data set on gs:// is copied there first, see `files.local_copy`.
"""

import os
import re
from pathlib import Path
from typing import Any

from nca_jax.checks import UserError
from nca_jax.files import AnyPath, as_path, local_copy

PREFIX = "tfds:"


def data_dir() -> AnyPath:
    """Where tensorflow-datasets live."""
    return as_path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))


def record_files(entry: str) -> list[str]:
    """Returns every file of the data set that an entry names, of all its splits, sorted."""
    folder, _ = _find(entry)
    return sorted(str(path) for path in folder.iterdir() if path.is_file())


class TfdsSource:
    """The records of one entry, as grain reads them: `len` and `[i]`.

    Raises:
      UserError: the data set or split is not there, or not in array_record files.
    """

    def __init__(self, entry: str):
        import tensorflow_datasets as tfds  # takes a second, which JSON lines should not wait for

        folder, split = _find(entry)
        self._entry = entry
        builder = tfds.builder_from_directory(folder)
        self._features = builder.info.features
        try:
            self._records = builder.as_data_source(split)
        except (ValueError, NotImplementedError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{entry}: cannot be read ({reason}); wanted one of the splits "
                f"{', '.join(builder.info.splits)}, in array_record files."
            ) from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[str, dict[str, Any]]:
        """Returns ("tfds:NAME:SPLIT:index", the record), a prompt of one user turn as its text."""
        record = _plain(self._records[index], self._features)
        match record:
            case {"prompt": [{"role": "user", "content": text}]}:
                record["prompt"] = (
                    text  # the same to a chat template, and plain format has no turns
                )
        return f"{self._entry}:{index}", record


def _find(entry: str) -> tuple[Path, str]:
    """Returns the newest version's local folder, and the split. Raises UserError if it lacks."""
    name, _, split = entry.removeprefix(PREFIX).partition(":")
    if not name or not split:
        raise UserError(f"{entry!r} is not of the form tfds:NAME[/BUILDER_CONFIG]:SPLIT.")
    versions = [
        path
        for path in (data_dir() / name).glob("*.*.*")
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name)
    ]
    if not versions:
        raise UserError(
            f"{entry}: {data_dir() / name} holds no data set; build it with python -m "
            f"nca_jax.prepare --name={name.split('/')[0]}, or set TFDS_DATA_DIR."
        )
    newest = max(versions, key=lambda path: [int(n) for n in path.name.split(".")])
    return local_copy(newest), split


def _plain(value: Any, feature: Any) -> Any:
    """Returns what tensorflow-datasets decoded as Python values: dicts, lists, texts, numbers.

    A sequence of dicts comes as a dict of lists, and goes as a list of dicts.
    """
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _plain(value[name], feature[name]) for name in feature}
    if isinstance(feature, tfds.features.Sequence):
        inner = feature.feature
        if isinstance(inner, tfds.features.FeaturesDict):
            columns = zip(*(value[name] for name in inner), strict=True)
            value = [dict(zip(inner, cells, strict=True)) for cells in columns]
        return [_plain(item, inner) for item in value]
    return value.decode() if isinstance(value, bytes) else value.item()
