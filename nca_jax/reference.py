"""Where a reference comes from, decided once; and the cache of its log-probabilities.

`config.reference.kind` is one of
    live     frozen parameters, sharded like the policy, which the step runs beside it
    base     the base of adapters, without any; live is with those that the run goes on from
    cached   log-probabilities of every response of every example, made once by `precompute`
    none     for losses that read no reference

A cache is a folder: fingerprint.json says what it was made from, and part-NNNNN.safetensors hold
{"keys" [n] uint64, "sizes" [n] int32, "logps" [sum of sizes] float32, "digest" [32] uint8}: for
each example the digest of its tokens and the log-probabilities of all its responses, in data order;
and sha256 of these three, which parts of older versions lack. So one cache serves every K, choice
of responses, loss and seed.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from nca_jax.axes import Params
from nca_jax.build import Run, keep_of
from nca_jax.checks import UserError
from nca_jax.data.sources import split_named
from nca_jax.data.store import contents_fingerprint
from nca_jax.data.table import Table
from nca_jax.files import AnyPath, as_path, read_json, write_whole
from nca_jax.infra.fingerprint import (
    array_kind,
    files_fingerprint,
    params_fingerprint,
    tokenizer_fingerprint,
)
from nca_jax.infra.optim import merge_trained
from nca_jax.models.lora import split_adapters
from nca_jax.params import (
    abstract_base,
    reference_init_from,
    start_params,
    start_trained,
    usual_dtype,
    with_dtype,
)
from nca_jax.train_step import Frozen

PART_ARRAYS = ("keys", "sizes", "logps")
FINGERPRINT = "fingerprint.json"
PIECE = 2**16  # examples whose digest is made at a time
ENCODING = ("format", "join", "max_prompt_len", "max_response_len", "prompt_keep", "too_long")


Lookup = Callable[[Table], list[np.ndarray]]


class Reference(NamedTuple):
    """What a run takes as its reference.

    Attributes:
      params: of one that the step runs, in the dtype that its file has: a part of `Frozen`, which
        does not hold the base of adapters again. None: the step runs none.
      lookup: of a cached one: from examples to the log-probabilities of their responses.
      fingerprint: what run.json keeps, and a resumed run must find again.
    """

    params: Params | None
    lookup: Lookup | None
    fingerprint: str

    def cached(self, examples: Table) -> list[np.ndarray] | None:
        """Returns what batches bring of the reference; None where they bring nothing."""
        return None if self.lookup is None else self.lookup(examples)


def make_reference(run: Run, base: Params | None = None) -> Reference:
    """Opens the reference that the config names.

    Args:
      base: of the run's adapters, from `open_base`.
    Raises:
      UserError: its parameters or its cache cannot be opened or do not fit.
    """
    kind = run.config.reference.kind
    if kind == "none":
        return Reference(None, None, "none")
    if kind == "cached":
        parts = sorted(map(str, as_path(run.config.reference.cache).glob("part-*.safetensors")))
        return Reference(None, read_cached_logps(run, base), files_fingerprint(parts))
    params = open_reference(run, base)
    apart = params if base is None else split_adapters(params)[0]
    return Reference(apart, None, params_fingerprint(params))


def reference_params(run: Run, policy: Params) -> Params | None:
    """Returns `open_reference`, on the base of a policy; None where there is no reference."""
    if run.config.reference.kind == "none":
        return None
    return open_reference(run, split_adapters(policy)[1] if run.model.lora else None)


def open_reference(run: Run, base: Params | None) -> Params:
    """Returns the reference's parameters, in the dtype of their file, also of a cached one.

    What makes a cache, and what is measured on samples that no cache has seen, needs them. Adapters
    that start at 0 change nothing, so they are left out.

    Args:
      base: of the run's adapters, which it is a part of; None: it has none.
    """
    config = run.config
    if base is None or reference_init_from(config) != config.model.init_from:
        return start_params(run, reference_init_from(config), dtype="")
    if not _has_adapters(config):
        return base
    return merge_trained(start_trained(run, base), base)


def _has_adapters(config: ConfigDict) -> bool:
    return bool(config.lora.init_from) and config.reference.kind != "base"


def abstract_frozen(run: Run) -> tuple[Frozen, bool]:
    """Returns the shapes of what a step does not train, and whether batches bring ref_logps."""
    config, base = run.config, abstract_base(run)
    kind = config.reference.kind
    if kind not in ("live", "base"):
        return Frozen(base), kind == "cached"
    if base is None:
        dtype = usual_dtype(reference_init_from(config))
        return Frozen(reference=with_dtype(run.model.abstract_params(), dtype)), False
    return Frozen(base, run.model.abstract_trained() if _has_adapters(config) else {}), False


def cache_fingerprint(run: Run, ref_params: Params) -> dict[str, str | int]:
    """What the numbers of a cache depend on; equal exactly where the numbers are."""
    config = run.config
    named = split_named(config.data.eval_files)
    return {
        "params": params_fingerprint(ref_params),
        "dtype": config.model.dtype,
        "tokenizer": tokenizer_fingerprint(run.tokenizer),
        "files": contents_fingerprint(config.data.files, keep_of(config)),
        "eval_files": contents_fingerprint(",".join(named.values()), keep_of(config)),
        **{name: config.data[name] for name in ENCODING},
    }


def examples_fingerprint(examples: Table) -> str:
    """A digest of the tokens and scores of examples, in their order."""
    digest = hashlib.sha256()
    for start in range(0, len(examples), PIECE):
        piece = examples[start : start + PIECE]
        ends = np.cumsum(8 + 4 * piece.entries["count"])
        said = np.zeros(ends[-1], np.uint8)
        for at, _, scores in piece.by_count():
            keys = np.ascontiguousarray(piece.entries["key"][at, None])
            both = np.concatenate([keys.view(np.uint8), scores.view(np.uint8)], axis=1)
            said[(ends[at] - both.shape[1])[:, None] + np.arange(both.shape[1])] = both
        digest.update(said.tobytes())
    return digest.hexdigest()[:16]


def write_part(folder: AnyPath, part: int, examples: Table, logps: np.ndarray) -> None:
    """Writes one part, whole or absent.

    Raises:
      UserError: a log-probability is not finite.
    """
    if not np.isfinite(logps).all():
        raise UserError(
            f"The reference gives log-probabilities that are not finite to {examples[0].where} or "
            "the records after it; look at its weights, or set config.model.dtype=float32."
        )
    arrays = {
        "keys": np.ascontiguousarray(examples.entries["key"]),
        "sizes": np.ascontiguousarray(examples.entries["count"]),
        "logps": np.asarray(logps, np.float32),
    }
    write_whole(part_path(folder, part), save(arrays | {"digest": _digest(arrays)}))


def read_part(path: AnyPath) -> dict[int, np.ndarray]:
    """Returns {key of an example: the log-probabilities of its responses} of one part.

    Raises:
      UserError: it is not what was written, or not finite; names the file.
    """
    try:
        arrays = load(path.read_bytes())
        digest = arrays.pop("digest", None)
        if arrays.keys() != set(PART_ARRAYS):
            raise ValueError(f"it holds {', '.join(sorted(arrays))}")
        if digest is not None and not np.array_equal(digest, _digest(arrays)):
            raise ValueError("its numbers changed since it was written")
        keys, sizes, logps = (arrays[name] for name in PART_ARRAYS)
        if len(keys) != len(sizes) or sizes.sum() != len(logps):
            raise ValueError(f"{len(keys)} keys, {len(sizes)} sizes, {len(logps)} numbers")
        if not np.isfinite(logps).all():
            raise ValueError("it holds NaN or infinity")
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"The cached reference {path} is damaged ({type(error).__name__}: {error}); python -m "
            "nca_jax.precompute with the same --config makes this part again."
        ) from None
    pieces = np.split(logps, np.cumsum(sizes)[:-1])
    return dict(zip(keys.tolist(), pieces, strict=True))


def _digest(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Returns sha256 of the arrays of a part, [32] uint8."""
    digest = hashlib.sha256()
    for name in PART_ARRAYS:
        digest.update(array_kind(arrays[name]).encode() + arrays[name].tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def is_whole(path: AnyPath) -> bool:
    """Whether a part is there and holds what was written; says so where it holds something else."""
    if not path.exists():
        return False
    try:
        read_part(path)
    except UserError as error:
        print(error)
        return False
    return True


def part_path(folder: AnyPath, part: int) -> AnyPath:
    return folder / f"part-{part:05d}.safetensors"


def read_cached_logps(run: Run, base: Params | None = None) -> Lookup:
    """Opens `config.reference.cache`; returns a function from examples to their log-probabilities.

    Raises:
      UserError: there is no cache, it was made from something else (says what), a part of it is
        damaged, or it is not finished.
    """
    folder = as_path(run.config.reference.cache)
    path = folder / FINGERPRINT
    if not path.exists():
        raise UserError(
            f"{folder} holds no cached reference; make it with python -m nca_jax.precompute and "
            "the same --config."
        )
    check_fingerprint(folder, cache_fingerprint(run, open_reference(run, base)))
    found: dict[int, np.ndarray] = {}
    for part in sorted(folder.glob("part-*.safetensors")):
        found |= read_part(part)

    def lookup(examples: Table) -> list[np.ndarray]:
        keys = examples.entries["key"].tolist()
        missing = [i for i, key in enumerate(keys) if key not in found]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(examples)} records, first "
                f"{examples[missing[0]].where}; run python -m nca_jax.precompute again, it goes on "
                "where it stopped."
            )
        return [found[key] for key in keys]

    return lookup


def cache_date(folder: AnyPath) -> str:
    """Returns the date that chat templates wrote into a cache; "" where none is recorded."""
    path = folder / FINGERPRINT
    return read_json(path).get("date", "") if path.exists() else ""


def check_fingerprint(folder: AnyPath, now: dict[str, str | int]) -> None:
    """Raises UserError, naming what differs, unless the cache was made from the same things."""
    # A cache that does not say how its records were encoded is older than the choice.
    saved = {"join": "apart"} | read_json(folder / FINGERPRINT)
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
