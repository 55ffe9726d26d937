"""Where a reference comes from, decided once; and the cache of its log-probabilities.

`config.reference.kind` is one of
    live     frozen parameters, sharded like the policy, which the step runs beside it
    cached   log-probabilities of every response of every example, made once by `precompute`
    none     for losses that read no reference

A cache is a folder: fingerprint.json says what it was made from, and part-NNNNN.safetensors hold
{"keys" [n] uint64, "sizes" [n] int32, "logps" [sum of sizes] float32}: for each example the digest
of its tokens and the log-probabilities of all its responses, in data order. So one cache serves
every K, choice of responses, loss and seed.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from safetensors.numpy import load, save

from nca_jax.axes import Params
from nca_jax.build import Run
from nca_jax.checks import UserError
from nca_jax.data.encode import Example
from nca_jax.data.sources import list_files
from nca_jax.files import AnyPath, as_path, read_json, write_whole
from nca_jax.infra.fingerprint import files_fingerprint, params_fingerprint, tokenizer_fingerprint
from nca_jax.params import reference_init_from, start_params

ENCODING = ("format", "max_prompt_len", "max_response_len", "prompt_keep", "too_long")


Lookup = Callable[[Sequence[Example]], list[np.ndarray]]


class Reference(NamedTuple):
    """What a run takes as its reference.

    Attributes:
      params: of a live reference, in the dtype that its file has: a part of `Frozen`.
      lookup: of a cached one: from examples to the log-probabilities of their responses.
      fingerprint: what run.json keeps, and a resumed run must find again.
    """

    params: Params | None
    lookup: Lookup | None
    fingerprint: str

    def cached(self, examples: Sequence[Example]) -> list[np.ndarray] | None:
        """Returns what batches bring of the reference; None where they bring nothing."""
        return None if self.lookup is None else self.lookup(examples)


def make_reference(run: Run) -> Reference:
    """Opens the reference that the config names.

    Raises:
      UserError: its parameters or its cache cannot be opened or do not fit.
    """
    kind = run.config.reference.kind
    if kind == "none":
        return Reference(None, None, "none")
    if kind == "cached":
        parts = sorted(map(str, as_path(run.config.reference.cache).glob("part-*.safetensors")))
        return Reference(None, read_cached_logps(run), files_fingerprint(parts))
    params = open_reference(run)
    return Reference(params, None, params_fingerprint(params))


def reference_params(run: Run) -> Params | None:
    """Returns `open_reference`, or None where there is no reference."""
    return None if run.config.reference.kind == "none" else open_reference(run)


def open_reference(run: Run) -> Params:
    """Returns the reference's parameters, in the dtype of their file, also of a cached one.

    What makes a cache, and what is measured on samples that no cache has seen, needs them.
    """
    return start_params(run, reference_init_from(run.config), keep_dtype=True)


def abstract_reference(run: Run, dtype: jax.typing.DTypeLike) -> tuple[Params | None, bool]:
    """Returns the shapes of a live reference's parameters, and whether batches bring ref_logps."""
    kind = run.config.reference.kind
    if kind != "live":
        return None, kind == "cached"
    shapes = run.model.abstract_params()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes), False


def cache_fingerprint(run: Run, ref_params: Params) -> dict[str, str | int]:
    """What the numbers of a cache depend on; equal exactly where the numbers are."""
    config = run.config
    return {
        "params": params_fingerprint(ref_params),
        "dtype": config.model.dtype,
        "tokenizer": tokenizer_fingerprint(run.tokenizer),
        "files": files_fingerprint(list_files(config.data.files)),
        "eval_files": files_fingerprint(list_files(config.data.eval_files)),
        **{name: config.data[name] for name in ENCODING},
    }


def example_key(example: Example) -> int:
    """A digest of the example's tokens, 64 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for ids in (example.group.prompt, *example.group.responses):
        digest.update(np.int32(len(ids)).tobytes() + ids.tobytes())
    return int.from_bytes(digest.digest(), "little")


def examples_fingerprint(examples: Sequence[Example]) -> str:
    """A digest of the tokens and scores of examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.uint64(example_key(example)).tobytes() + example.scores.tobytes())
    return digest.hexdigest()[:16]


def write_part(folder: AnyPath, part: int, examples: Sequence[Example], logps: np.ndarray) -> None:
    """Writes one part, whole or absent."""
    arrays = {
        "keys": np.array([example_key(example) for example in examples], np.uint64),
        "sizes": np.array([len(example.scores) for example in examples], np.int32),
        "logps": np.asarray(logps, np.float32),
    }
    write_whole(part_path(folder, part), save(arrays))


def part_path(folder: AnyPath, part: int) -> AnyPath:
    return folder / f"part-{part:05d}.safetensors"


def read_cached_logps(run: Run) -> Lookup:
    """Opens `config.reference.cache`; returns a function from examples to their log-probabilities.

    Raises:
      UserError: there is no cache, it was made from something else (says what), or it is not
        finished.
    """
    folder = as_path(run.config.reference.cache)
    path = folder / "fingerprint.json"
    if not path.exists():
        raise UserError(
            f"{folder} holds no cached reference; make it with python -m nca_jax.precompute and "
            "the same --config."
        )
    check_fingerprint(folder, cache_fingerprint(run, open_reference(run)))
    found: dict[int, np.ndarray] = {}
    for part in sorted(folder.glob("part-*.safetensors")):
        arrays = load(part.read_bytes())
        pieces = np.split(arrays["logps"], np.cumsum(arrays["sizes"])[:-1])
        found |= dict(zip(arrays["keys"].tolist(), pieces, strict=True))

    def lookup(examples: Sequence[Example]) -> list[np.ndarray]:
        missing = [example.where for example in examples if example_key(example) not in found]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(examples)} records, first {missing[0]}; "
                "run python -m nca_jax.precompute again, it goes on where it stopped."
            )
        return [found[example_key(example)] for example in examples]

    return lookup


def cache_date(folder: AnyPath) -> str:
    """Returns the date that chat templates wrote into a cache; "" where none is recorded."""
    path = folder / "fingerprint.json"
    return read_json(path).get("date", "") if path.exists() else ""


def check_fingerprint(folder: AnyPath, now: dict[str, str | int]) -> None:
    """Raises UserError, naming what differs, unless the cache was made from the same things."""
    saved = json.loads((folder / "fingerprint.json").read_text())
    differs = [
        f"{name}: {saved.get(name)} there, {value} here"
        for name, value in now.items()
        if saved.get(name) != value
    ]
    if differs:
        raise UserError(
            f"The cached reference {folder} is stale ({'; '.join(differs)}); make another with "
            "python -m nca_jax.precompute, in a new config.reference.cache."
        )
