"""Finds a pretrained model by one string, and opens its parameters and its tokenizer.

`where` is a folder (Hugging Face layout) or a .gguf file, local or on gs://, `package:NAME` (the
one .gguf that an installed Python package ships) or a repository of the Hugging Face Hub.
"""

import functools
import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub

from nca_jax.checks import UserError
from nca_jax.files import as_path, local_copy
from nca_jax.model_config import ModelConfig
from nca_jax.models.formats.hf import open_hf
from nca_jax.models.formats.names import Param

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_PATTERNS = ("tokenizer*", "*.model", "*.jinja", "tekken.json", "special_tokens_map.json",
                      "added_tokens.json", "vocab.json", "merges.txt")  # fmt: skip
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "merges.txt"]
# Weights that are stored a second time in another layout.
HUB_IGNORED = ["*/*", "consolidated*"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def resolve(where: str) -> Path:
    """Returns the local folder or .gguf file of `where`, copied to this host from gs:// or the hub.

    Raises:
      UserError: there is no such thing, or the hub cannot be reached.
    """
    if where.startswith("package:"):
        return _packaged_gguf(where.removeprefix("package:"))
    path = local_copy(as_path(where), HUB_FILES + ["*.gguf"])
    if where and (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        return path
    if path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", where):
        raise UserError(
            f"{where!r} is no folder, no .gguf file and no name of a hub repository; for the model "
            "in an installed package write package:NAME."
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(
                where, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{where!r} is no local folder, and the Hugging Face Hub did not give it: {reason}"
        ) from error


def open_pretrained(where: str) -> tuple[ModelConfig, dict[str, Param]]:
    """Opens a model; its parameters are read only when asked, see `names.Param`.

    The same object as before if none of its files was written since.

    Raises:
      UserError: what `resolve`, `open_hf` and `open_gguf` raise.
    """
    path = resolve(where)
    return _open(path, _versions(path))


def _versions(path: Path) -> tuple[tuple, ...]:
    """What tells a file, or the files of a folder, from what was there by their names before."""
    files = sorted(file for file in path.iterdir() if file.exists()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files]
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)


@functools.lru_cache(maxsize=4)  # parsing the header of a .gguf takes seconds
def _open(path: Path, versions: tuple[tuple, ...]) -> tuple[ModelConfig, dict[str, Param]]:
    if path.is_dir():
        return open_hf(path)
    from nca_jax.models.formats.gguf import open_gguf  # wants the gguf extra: see checks.EXTRAS

    return open_gguf(path)


def load_tokenizer(where: str) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer of a model, or for "byte" one that needs no files (259 ids).

    Raises:
      UserError: what `resolve` and `gguf_tokenizer` raise, or a folder without a tokenizer.
    """
    # transformers would print that PyTorch is missing; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer, ByT5Tokenizer  # takes seconds; only tokenizers need it

    if where == "byte":
        return ByT5Tokenizer(extra_ids=0)  # its sentinels would lie beyond the 259 ids
    path = resolve(where)
    if not path.is_dir():
        from nca_jax.models.formats.gguf import gguf_tokenizer

        return gguf_tokenizer(path)
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{path} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there.")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"Cannot load the tokenizer in {path}: {reason}") from error


def save_tokenizer(where: str, folder: Path) -> None:
    """Writes the tokenizer of a model into a folder: its own files, as they are, if it has any.

    Raises:
      UserError: as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(where)
    if where == "byte" or not resolve(where).is_dir():
        tokenizer.save_pretrained(folder)
        return
    for pattern in TOKENIZER_PATTERNS:
        for file in resolve(where).glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _packaged_gguf(package: str) -> Path:
    """Finds the file without importing the package, which may want libraries of its own."""
    # A dotted name would import its parent.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"No Python package {package!r} is installed; `pip install` it first.")
    found = [
        file for root in spec.submodule_search_locations for file in Path(root).rglob("*.gguf")
    ]
    if len(found) != 1:
        raise UserError(f"Wanted one .gguf file in the package {package!r}, found {len(found)}.")
    return found[0]
