"""Finds a pretrained model by one string, and opens its parameters and its tokenizer.

`where` is a folder (Hugging Face layout) or a .gguf file, local or on gs://, `package:NAME` (the
one .gguf that an installed Python package ships) or a repository of the Hugging Face Hub, NAME or
NAME@REVISION (a branch, tag or commit). A folder of PEFT adapters stands for the model that they
were trained on, which it names, with the adapters merged into it.
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
from nca_jax.models.formats.merge import merge
from nca_jax.models.formats.names import Param, with_nf4
from nca_jax.models.formats.peft import Adapter, base_of, is_adapter, open_peft
from nca_jax.models.formats.templates import choose_template
from nca_jax.models.formats.untrusted import check_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_PATTERNS = ("tokenizer*", "*.model", "*.jinja", "tekken.json", "special_tokens_map.json",
                      "added_tokens.json", "vocab.json", "merges.txt")  # fmt: skip
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(@\w[\w./-]*)?")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "merges.txt"]
# Weights that are stored a second time in another layout.
HUB_IGNORED = ["*/*", "consolidated*"]
TOKENIZER_BYTES = 512 << 20  # of one file
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
    if where and path.exists():
        raise UserError(f"{where!r} is a file, but no .gguf; give the folder of a model.")
    if path.suffix == ".gguf" or not HUB_NAME.fullmatch(where):
        raise UserError(
            f"{where!r} is no folder, no .gguf file and no name of a hub repository; for the model "
            "in an installed package write package:NAME."
        )
    return _from_hub(where)


@functools.cache  # a run asks for its model more than once, and the answer must be one
def _from_hub(where: str) -> Path:
    """Returns the local copy of a hub repository, which is fetched where there is none."""
    name, _, revision = where.partition("@")
    print(f"{where!r} is no local folder: it is fetched from the Hugging Face Hub.", flush=True)
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=HUB_FILES,
            ignore_patterns=HUB_IGNORED,
        )
    except Exception as error:  # of its network's libraries too
        raise UserError(
            f"{where!r} is no local folder, and the Hugging Face Hub did not give it: "
            f"{_reason(error)}"
        ) from error
    print(f"{where!r} is commit {Path(folder).name}.", flush=True)
    return Path(folder)


def _reason(error: BaseException) -> str:
    """The first line of what a library says, or as much of it as can be read."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


def open_pretrained(where: str) -> tuple[ModelConfig, dict[str, Param]]:
    """Opens a model; its parameters are read only when asked, see `names.Param`.

    The same object as before if none of its files was written since.

    Raises:
      UserError: what `resolve`, `open_hf` and `open_gguf` raise.
    """
    path = resolve(where)
    base = _base(path)
    return _open(path, base, _versions(path) + (_versions(base) if base != path else ()))


def open_adapter(where: str, config: ModelConfig) -> Adapter:
    """Opens a folder of PEFT adapters of a model with this config.

    Raises:
      UserError: what `resolve` and `open_peft` raise.
    """
    return open_peft(resolve(where), config)


def resolve_base(where: str) -> Path:
    """Returns `resolve`, or for a folder of adapters that of the model that they belong to."""
    return _base(resolve(where))


def _base(path: Path) -> Path:
    if not is_adapter(path):
        return path
    where = base_of(path)
    if not where:
        raise UserError(
            f"{path} is an adapter, and its adapter_config.json does not say of which model "
            "(base_model_name_or_path); give the model as config.model.init_from and the adapter "
            "as config.lora.init_from."
        )
    try:
        base = resolve(where)
    except UserError as error:
        raise UserError(
            f"{path} is an adapter of {where!r}, which is not found: {error}"
        ) from error
    if is_adapter(base):
        raise UserError(f"{path} is an adapter of {where!r}, which is an adapter too, not a model.")
    return base


def _versions(path: Path) -> tuple[tuple, ...]:
    """What tells a file, or the files of a folder, from what was there by their names before."""
    files = sorted(file for file in path.iterdir() if file.exists()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files]
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)


@functools.lru_cache(maxsize=4)  # parsing the header of a .gguf takes seconds
def _open(
    path: Path, base: Path, versions: tuple[tuple, ...]
) -> tuple[ModelConfig, dict[str, Param]]:
    if path != base:
        config, params = _open(base, base, _versions(base))
        adapter = open_peft(path, config)
        return config, with_nf4(config, merge(params, adapter.lora, adapter.params))
    if path.is_dir():
        return open_hf(path)
    from nca_jax.models.formats.gguf import open_gguf  # wants the gguf extra: see checks.EXTRAS

    return open_gguf(path)


def load_tokenizer(where: str, template: str = "") -> "PreTrainedTokenizerBase":
    """Returns the tokenizer of a model, or for "byte" one that needs no files (259 ids).

    Args:
      where: as `resolve` takes it, or "byte".
      template: name of one of its chat templates, which becomes its only one; "" leaves them.
    Raises:
      UserError: what `resolve` and `gguf_tokenizer` raise, a folder without a tokenizer or with one
        that cannot be read, or no template of this name.
    """
    # transformers would print that PyTorch is missing; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer, ByT5Tokenizer  # takes seconds; only tokenizers need it

    if where == "byte":
        tokenizer = ByT5Tokenizer(extra_ids=0)  # its sentinels would lie beyond the 259 ids
    else:
        path = _tokenizer_place(where)
        if path.is_dir():
            _check_tokenizer_files(path)
            load = functools.partial(AutoTokenizer.from_pretrained, trust_remote_code=False)
        else:
            from nca_jax.models.formats.gguf import gguf_tokenizer as load
        try:
            tokenizer = load(path)
            tokenizer("a")  # some faults show in use alone
        except UserError:
            raise
        except BaseException as error:  # the library raises bare ones and many others, and panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"Cannot load the tokenizer in {path}: {_reason(error)}. If its files are whole, a "
                "newer version of tokenizers or transformers may have written them."
            ) from error
    choose_template(tokenizer, template)
    return tokenizer


def _tokenizer_place(where: str) -> Path:
    """Returns the folder or file with the tokenizer: adapters that have none have their model's."""
    path = resolve(where)
    return path if _has_tokenizer(path) else _base(path)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def _check_tokenizer_files(folder: Path) -> None:
    """Raises UserError unless a folder has a tokenizer, whose files are no larger than any is."""
    if not _has_tokenizer(folder):
        raise UserError(
            f"{folder} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there."
        )
    for pattern in TOKENIZER_PATTERNS:
        for file in filter(Path.is_file, folder.glob(pattern)):
            check_file(file, TOKENIZER_BYTES)


def save_tokenizer(where: str, folder: Path, template: str = "") -> None:
    """Writes the tokenizer of a model into a folder: its own files, as they are, if it has any.

    A `template` that was chosen is the default of what is written.

    Raises:
      UserError: as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(where, template)
    place = None if where == "byte" else _tokenizer_place(where)
    if place is None or not place.is_dir():
        tokenizer.save_pretrained(folder)
        return
    for pattern in TOKENIZER_PATTERNS:
        for file in filter(Path.is_file, place.glob(pattern)):
            shutil.copyfile(file, folder / file.name)
    if template:  # transformers reads this file before the list in tokenizer_config.json
        text = str(tokenizer.chat_template)
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8", newline="")


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
