"""What a number was computed from: digests of arrays, parameters, tokenizers and files."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nca_jax.axes import Params, flatten_paths, on_device
from nca_jax.files import as_path
from nca_jax.protocols import Tokenizer

PACKAGE = Path(__file__).parent.parent

# Sums of integers over an array: exact, and the same under every sharding. What is summed is, at
# its place, another number for every other value, so one value that changed changes the sum.


def _bits(x: jax.Array) -> jax.Array:
    """Returns the values as uint32, those of bfloat16 and float16 as the float32 they are."""
    if x.dtype == jnp.bfloat16:  # no arithmetic: a processor may take the smallest for 0
        return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return x.astype(jnp.uint32)


def _places(x: jax.Array) -> jax.Array:
    """Returns the number of each element in row-major order, mod 2^32."""
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return place


@jax.jit
def _checksums(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """sum_i (2 i + 1) * bits_i mod 2^32: what workdirs and caches hold of their references."""
    return [jnp.sum(_bits(x) * (2 * _places(x) + 1), dtype=jnp.uint32) for x in arrays]


@jax.jit
def _digests(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The same of bits that are mixed (MurmurHash3's last step), in which no two changes cancel.

    In the plain sum they may: two flipped signs do, or a zeroed page of ones.
    """

    def mixed(x: jax.Array) -> jax.Array:
        h = _bits(x) + _places(x) * jnp.uint32(0x9E3779B9)
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    return [jnp.sum(mixed(x), dtype=jnp.uint32) for x in on_device(arrays)]


def array_kind(x: Any) -> str:
    """Returns the shape and dtype of an array, or of what describes one: "(2, 3) float32"."""
    return f"{tuple(x.shape)} {x.dtype}"


def array_digests(arrays: Any) -> dict[str, str]:
    """Returns {"a/b/c": kind and digest of its values} of the arrays of a tree, in one program.

    The mesh does not enter. One flipped bit always gives another digest.
    """
    flat = flatten_paths(arrays)
    sums = jax.device_get(_digests(list(flat.values())))
    return {
        path: f"{array_kind(x)} {int(digest):08x}"
        for (path, x), digest in zip(flat.items(), sums, strict=True)
    }


def params_fingerprint(params: Params) -> str:
    """A digest of the values, shapes and paths of parameters; the mesh does not enter."""
    flat = flatten_paths(params)
    checksums = jax.device_get(_checksums(list(flat.values())))
    sums = {
        path: [list(x.shape), int(checksum)]
        for (path, x), checksum in zip(flat.items(), checksums, strict=True)
    }
    return text_fingerprint(json.dumps(sums, sort_keys=True))


def tokenizer_fingerprint(tokenizer: Tokenizer | None) -> str:
    """A digest of the vocabulary, special tokens and chat template; "none" without a tokenizer."""
    if tokenizer is None:
        return "none"
    parts = [tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.special_tokens_map]
    return text_fingerprint(json.dumps(parts, sort_keys=True, default=str))


def files_fingerprint(paths: Iterable[str]) -> str:
    """A digest of the contents of files, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        with as_path(path).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def code_fingerprint() -> str:
    """A digest of the source files of this package."""
    return files_fingerprint(map(str, sorted(PACKAGE.rglob("*.py"))))


def text_fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
