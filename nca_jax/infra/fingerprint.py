"""What a number was computed from: digests of parameters, tokenizers and files."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from nca_jax.axes import Params, flatten_paths
from nca_jax.files import as_path
from nca_jax.protocols import Tokenizer

PACKAGE = Path(__file__).parent.parent


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """sum_i (2 i + 1) * bits_i mod 2^32: integers, so exact and the same under every sharding."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def params_fingerprint(params: Params) -> str:
    """A digest of the values, shapes and paths of parameters; the mesh does not enter."""
    sums = {path: [list(x.shape), int(_checksum(x))] for path, x in flatten_paths(params).items()}
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
