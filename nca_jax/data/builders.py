"""tensorflow-datasets of scored responses: raw files in, array_record files out, no TensorFlow.

A raw file is .parquet, .jsonl or .jsonl.gz; `layouts` knows how the records of each data set look.
"""

import contextlib
import io
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import tensorflow_datasets as tfds

from nca_jax.checks import UserError
from nca_jax.data.layouts import Origin
from nca_jax.data.sources import RecordError, parse, stream

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
VERSION = "1.0.0"


# tfds is not annotated: its __init_subclass__ is taken for object's.
class ScoredRecords(  # pyright: ignore[reportGeneralTypeIssues]
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # pyright: ignore[reportCallIssue]
):
    """One data set: prompts as messages, K responses each, a score for each response.

    Rows keep the order of the raw files. After `download_and_prepare`, `counts[split]` holds
    ("kept" | "dropped" | "left out", reason) -> number.

    Args:
      name, score: keys of `layouts.DATA_SETS`; the score names the builder config.
      files: raw files of each split.
      data_dir: where tensorflow-datasets live.
    """

    def __init__(
        self,
        name: str,
        score: str,
        origin: Origin,
        files: Mapping[str, Sequence[Path]],
        data_dir: str | Path,
    ):
        self.name, self.VERSION = name, tfds.core.Version(VERSION)
        self.origin, self.files = origin, files
        self.counts: dict[str, Counter] = {split: Counter() for split in files}
        config = tfds.core.BuilderConfig(name=score, version=VERSION) if score else None
        super().__init__(config=config, data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Prompts with scored responses, from {self.origin.hub or 'own records'}.",
            features=tfds.features.FeaturesDict(
                {
                    "prompt": tfds.features.Sequence(message),
                    "responses": tfds.features.Sequence(tfds.features.Text()),
                    "scores": tfds.features.Sequence(np.float32),
                    "from": tfds.features.Text(),  # raw file and record, as in "name:17"
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.files}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        counts = self.counts[split]
        for where, record in read_records(self.files[split]):
            left_out: Counter[str] = Counter()
            try:
                if isinstance(record, RecordError):
                    raise record
                example = self.origin.layout(record, left_out)
            except RecordError as error:
                counts["dropped", error.reason] += 1
                continue
            for reason, number in left_out.items():
                counts["left out", reason] += number
            yield counts["kept", "records"], example | {"from": where}
            counts["kept", "records"] += 1
        if not counts["kept", "records"]:
            raise UserError(f"No record of split {split!r} is left: {_words(counts)}.")


def prepare(builder: ScoredRecords) -> None:
    """Writes the files of a builder, all or none, and removes what a killed start has left.

    Raises:
      UserError: the data set is already there, a file cannot be read, or a split has no records.
    """
    if builder.is_prepared():
        raise UserError(
            f"{builder.data_dir} is already there; use it as it is, delete it, or give another "
            "--out=FOLDER."
        )
    folder = Path(builder.data_dir)
    for left in folder.parent.glob(f"incomplete.*_{folder.name}"):  # as tfds names them
        shutil.rmtree(left, ignore_errors=True)
    # What it prints is about downloads, and there are none.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()


def read_records(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """Iterates over ("file name:number", the record), or its RecordError if it is no JSON object.

    Raises:
      UserError: a file cannot be read.
    """
    for path in paths:
        for number, raw in enumerate(stream(str(path)), start=1):
            try:
                yield f"{path.name}:{number}", parse(raw)[1]
            except RecordError as error:
                yield f"{path.name}:{number}", error


def find_files(raw: Path, origin: Origin) -> dict[str, list[Path]]:
    """Returns the raw files of each split that a folder has; a file alone is the first split.

    Raises:
      UserError: there is none.
    """
    if raw.is_file():
        return {next(iter(origin.splits)): [raw]}
    candidates = sorted(path for path in raw.rglob("*") if path.name.endswith(SUFFIXES))
    files = {
        split: [path for path in candidates if _begins(path.relative_to(raw), prefix)]
        for split, prefix in origin.splits.items()
    }
    files = {split: paths for split, paths in files.items() if paths}
    if not files:
        wanted = ", ".join(f"{prefix}*" for prefix in origin.splits.values())
        raise UserError(
            f"{raw} has no file {wanted} of {', '.join(SUFFIXES)}; give --raw=FOLDER or FILE."
        )
    return files


def _begins(path: Path, prefix: str) -> bool:
    """Whether a file is of a split: train-0.parquet, train/0.parquet."""
    return path.name.startswith(prefix) or path.parent.name.startswith(prefix)


def fetch(origin: Origin) -> Path:
    """Returns a local folder with the raw files of a hub repository, downloaded if need be.

    Raises:
      UserError: the data set is on no hub, or the hub cannot be reached.
    """
    if not origin.hub:
        raise UserError(
            "Give --raw=FOLDER or FILE with your records, .jsonl, .jsonl.gz or .parquet."
        )
    patterns = [f"*{prefix}*{end}" for prefix in origin.splits.values() for end in SUFFIXES]
    try:
        folder = huggingface_hub.snapshot_download(
            origin.hub, repo_type="dataset", allow_patterns=patterns
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"The Hugging Face Hub did not give {origin.hub!r} ({reason}); download its files "
            "elsewhere and give --raw=FOLDER."
        ) from error
    return Path(folder)


def report(counts: Counter) -> str:
    """Returns what became of the records of a split, in words."""
    return f"{counts['kept', 'records']} records kept, {_words(counts)}"


def _words(counts: Counter) -> str:
    dropped = {reason: n for (what, reason), n in counts.items() if what == "dropped"}
    left_out = {reason: n for (what, reason), n in counts.items() if what == "left out"}
    words = f"{sum(dropped.values())} dropped" + _list(dropped)
    return words + (f"; left out of records that stay{_list(left_out)}" if left_out else "")


def _list(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{n} {reason}' for reason, n in counts.items())})" if counts else ""
