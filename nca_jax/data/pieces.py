"""Records that take long to make, kept piece by piece beside the file OUT that they will be.

OUT.pieces/made_from.json   digests of what they are made from
OUT.pieces/N.jsonl          the records from the N-th on, whole or absent: a stop loses none of them
"""

import json
from typing import Any

from nca_jax.checks import UserError
from nca_jax.data.sources import write_records
from nca_jax.files import AnyPath, read_json, remove, write_json, write_whole

Record = dict[str, Any]  # JSON

MADE_FROM = "made_from.json"


def begin(out: AnyPath, made_from: dict[str, str]) -> list[Record]:
    """Returns the records that a start before this one has left, in order; [] if there was none.

    Raises:
      UserError: they were made from something else, says what; or what says it is damaged.
    """
    folder = folder_of(out)
    made = sorted(folder.glob("*.jsonl"))
    if not made:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MADE_FROM, made_from)
        return []
    saved = read_json(folder / MADE_FROM)
    differs = [name for name, digest in made_from.items() if saved.get(name) != digest]
    if differs:
        raise UserError(
            f"{folder} holds what a stopped command has made so far, and that had other "
            f"{' and '.join(differs)}. Finish that one, give another --out, or remove the folder."
        )
    records = []
    for path in made:
        lines = path.read_bytes().split(b"\n")
        try:
            piece = [json.loads(line) for line in lines if line]
        except ValueError:  # it is damaged, and made again
            continue
        if int(path.name.split(".")[0]) == len(records):
            records += piece
    return records


def add(out: AnyPath, start: int, records: list[Record]) -> None:
    """Keeps the records from number `start` on."""
    write_records(folder_of(out) / f"{start:09d}.jsonl", records)


def finish(out: AnyPath, records: list[Record], *, is_list: bool = False) -> None:
    """Writes all of them as OUT, JSON lines or one list, and removes the pieces."""
    if is_list:
        write_whole(out, json.dumps(records, ensure_ascii=False, indent=2).encode())
    else:
        write_records(out, records)
    remove(folder_of(out))


def folder_of(out: AnyPath) -> AnyPath:
    """Returns OUT.pieces, which is there while records are made."""
    return out.with_name(out.name + ".pieces")
