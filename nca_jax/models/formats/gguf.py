"""GGUF files: sizes, tensors (dequantised to float32 where quantised) and tokenizer of one file.

The dequantised weights are what is trained and what the reference is; nothing is requantised.
"""

import functools
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, QuantError, ReaderTensor, TokenType, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from nca_jax.checks import UserError
from nca_jax.field import TEXT, Check
from nca_jax.model_config import ModelConfig, alike
from nca_jax.models.families import FAMILIES
from nca_jax.models.formats import names
from nca_jax.models.formats.untrusted import (
    EVEN,
    INTEGER,
    NUM_STACKED,
    NUMBER,
    SIZE,
    SIZE_OR_0,
    check_field,
    check_file,
    or_null,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BY_ARCHITECTURE = {x.gguf.architecture: (x, x.gguf) for x in FAMILIES.values() if x.gguf}
_TURN_IDS = ("bos", "eos", "eot")  # eos and eot both end a turn
_NOT_QUANTISED = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_INTERLEAVED = re.compile(r"blk\.\d+\.attn_[qk]\.weight")


class _Reader(GGUFReader):
    """Stops at the end of the file: it would read nothing there, as often as a length says."""

    @property
    def data(self) -> np.ndarray:
        """The bytes of the file. Of an np.memmap each of 10^5 strings would be a slow slice."""
        return self._bytes

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._bytes = mapped.view(np.ndarray)

    def _get(self, offset: int, dtype: Any, count: Any = 1, *more: Any, **named: Any) -> Any:
        found = super()._get(offset, dtype, count, *more, **named)
        if len(found) < int(count):
            raise ValueError("it ends before what it says it holds")
        return found


class File(NamedTuple):
    """A GGUF file mapped into memory."""

    path: Path
    reader: GGUFReader

    def get(self, key: str, **default: Any) -> Any:
        """Returns the metadata of a key, or `default=`; raises UserError if there is neither."""
        field = self.reader.get_field(key)
        if field is not None:
            try:
                return field.contents()
            except ValueError as error:  # bytes that are no text
                raise UserError(f"{self.path}: {key} cannot be read ({error}).") from error
        if not default:
            raise UserError(f"{self.path} has no {key}.")
        return default["default"]


def open_gguf(path: str | Path) -> tuple[ModelConfig, dict[str, names.Param]]:
    """Opens one GGUF file of an architecture in BY_ARCHITECTURE.

    Every name, shape and quantisation is checked here; the values are read when a `Param` is.

    Raises:
      UserError: not a GGUF file, a model this decoder would compute wrongly, or tensors that do
        not fit the metadata.
    """
    file = _open_file(path)
    tensors = {tensor.name: tensor for tensor in file.reader.tensors}
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    config = _read_config(file, shapes)
    names.check_tensors(str(path), shapes, names.tensor_shapes(config, names.GGUF))
    _check_quantisation(file)
    how = BY_ARCHITECTURE[file.get("general.architecture")][1]

    def fetch(name: str, index: tuple[slice, ...]) -> np.ndarray:
        data, kind = tensors[name].data, tensors[name].tensor_type
        if data.ndim == 1:
            part = _values(data, kind)[index]
            return part - how.norms_hold if name.endswith("norm.weight") else part
        part = _values(data.reshape(-1, data.shape[-1])[index[0]], kind)
        if how.interleaves and _INTERLEAVED.fullmatch(name):
            part = _unpermute(part, config.head_dim)
        return part[:, *index[1:]]

    kinds = {name: tensor.tensor_type for name, tensor in tensors.items()}
    dtypes = {name: _NOT_QUANTISED.get(kind, names.FLOAT32) for name, kind in kinds.items()}
    return config, names.open_params(config, names.GGUF, fetch, dtypes)


def _open_file(path: str | Path) -> File:
    check_file(Path(path))
    found = os.stat(path)
    return _parsed(Path(path), found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=1)  # config, tokenizer and weights of a run are in one file
def _parsed(path: Path, changed: int, size: int) -> File:
    """Returns the file as it is since `changed`; reading its strings takes seconds."""
    try:
        file = File(path, _Reader(path))
    except Exception as error:  # whatever its bytes make of the reader
        raise UserError(f"Cannot read {path} as GGUF: {error}") from error
    if file.get("split.count", default=1) != 1:
        raise UserError(f"{path} is one part of a split GGUF; merge the parts first.")
    return file


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """A tensor of all experts of a layer is a matrix here, one expert below the other."""
    *rows, columns = map(int, tensor.shape[::-1])
    return (math.prod(rows), columns) if rows else (columns,)


def _read_config(file: File, shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    arch = file.get("general.architecture")
    if arch not in BY_ARCHITECTURE:
        raise UserError(
            f"{file.path}: architecture {arch!r} is not one of {', '.join(BY_ARCHITECTURE)}."
        )
    family, how = BY_ARCHITECTURE[arch]

    def get(key: str, check: Check = SIZE, **default):
        value = file.get(f"{arch}.{key}", **default)
        check_field(f"{file.path}: {arch}.{key}", value, check)
        return value

    width, num_heads = get("embedding_length"), get("attention.head_count")
    num_kv_heads = get("attention.head_count_kv", default=num_heads)
    head_dim = get("attention.key_length", EVEN, default=width // num_heads)
    if num_heads % num_kv_heads:
        raise UserError(
            f"{file.path}: attention.head_count {num_heads} must be a multiple of "
            f"attention.head_count_kv {num_kv_heads}."
        )
    refused = {  # what this decoder would compute wrongly
        "expert_count": get("expert_count", SIZE_OR_0, default=0) > 0,
        "rope.scaling.type": get("rope.scaling.type", TEXT, default="none") != "none",
        "rope_freqs.weight": "rope_freqs.weight" in shapes,  # Llama 3.1's stretched frequencies
        "rope.dimension_count": get("rope.dimension_count", default=head_dim) != head_dim,
        "attention.value_length": get("attention.value_length", default=head_dim) != head_dim,
        "attention.sliding_window": get("attention.sliding_window", SIZE_OR_0, default=0) > 0,
    }
    for key in (key for key, is_so in refused.items() if is_so and key not in how.reads):
        raise UserError(
            f"{file.path}: {key} is not supported as it is set there; open the model's safetensors "
            "folder instead."
        )

    vocab_size = shapes.get("token_embd.weight", (0,))[0]  # absent: named by check_tensors
    ids = {name: _token_id(file, name, vocab_size) for name in _TURN_IDS}
    common = {
        "vocab_size": vocab_size,
        "num_layers": get("block_count", NUM_STACKED),
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "mlp_width": get("feed_forward_length"),
        "kinds": alike(theta=get("rope.freq_base", NUMBER, default=10_000.0)),
        "norm_eps": _shortest(get("attention.layer_norm_rms_epsilon", NUMBER)),
        "tied_head": "output.weight" not in shapes,
        "max_position": get("context_length"),
        "bos_id": ids.pop("bos"),
        "eos_ids": tuple(dict.fromkeys(i for i in ids.values() if i is not None)),
    }
    config = ModelConfig(**{**common, **family.has, **how.read(get, common)})
    if config.experts_per_token > config.num_experts:
        raise UserError(
            f"{file.path}: expert_used_count {config.experts_per_token} is more than expert_count "
            f"{config.num_experts}."
        )
    return config


def _token_id(file: File, name: str, vocab_size: int) -> int | None:
    """Returns the id of a special token, None where there is none in the vocabulary."""
    key = f"tokenizer.ggml.{name}_token_id"
    found = file.get(key, default=None)
    check_field(f"{file.path}: {key}", found, or_null(INTEGER))
    return found if found is not None and 0 <= found < vocab_size else None


def _shortest(value: float) -> float:
    """The shortest decimal of a stored float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _check_quantisation(file: File) -> None:
    """Dequantises one row of each kind, so that an unknown kind is found before a long read."""
    kinds = {tensor.tensor_type: tensor for tensor in file.reader.tensors}
    for kind, tensor in kinds.items():
        try:
            dequantize(tensor.data[:1] if tensor.data.ndim > 1 else tensor.data, kind)
        except (NotImplementedError, QuantError) as error:
            raise UserError(
                f"{file.path}: {tensor.name} is stored as {kind.name}, which the gguf package "
                "cannot dequantise."
            ) from error


def _values(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Rows of a tensor in the dtype that it is stored in, float32 if it is quantised."""
    return data.view(_NOT_QUANTISED[kind]) if kind in _NOT_QUANTISED else dequantize(data, kind)


def _unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes llama.cpp's order of the q and k rows, [heads * H, D] -> the same.

    It interleaves the two halves that the rotary embedding pairs; here the halves stay apart.
    """
    shape = rows.shape
    return rows.reshape(-1, head_dim // 2, 2, shape[-1]).swapaxes(1, 2).reshape(shape)


class _Splitter(NamedTuple):
    """What `tokenizer.ggml.pre` stands for, as the original tokenizer.json has it."""

    first: pre_tokenizers.PreTokenizer
    use_regex: bool = False  # GPT-2's own pattern after `first`
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False
    add_bos: bool = False  # unless the metadata say otherwise


def _split(numbers: str) -> pre_tokenizers.PreTokenizer:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


SPLITTERS = {
    "smollm": _Splitter(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "llama-bpe": _Splitter(_split(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True),
    "qwen2": _Splitter(_split(r"\p{N}"), normalizer=normalizers.NFC()),
}


def gguf_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """Builds the byte-level BPE tokenizer of a GGUF file, with its chat template if it has one.

    Raises:
      UserError: another kind of tokenizer, or a way to split words that is not in SPLITTERS.
    """
    from transformers import PreTrainedTokenizerFast  # takes seconds; only tokenizers need it

    file = _open_file(path)
    model = file.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise UserError(f"{path}: tokenizer {model!r} is not supported; wanted 'gpt2'.")
    pre = file.get("tokenizer.ggml.pre", default=None)
    if pre not in SPLITTERS:
        raise UserError(f"{path}: pre-tokenizer {pre!r} is not one of {', '.join(SPLITTERS)}.")

    tokens = file.get("tokenizer.ggml.tokens")
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token_id = _token_id(file, key, len(tokens))
        special[f"{name}_token"] = None if token_id is None else tokens[token_id]
    tokenizer = _byte_level_bpe(file, tokens, SPLITTERS[pre])
    bos = special["bos_token"]
    if bos is not None and file.get("tokenizer.ggml.add_bos_token", default=SPLITTERS[pre].add_bos):
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokens.index(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.get("tokenizer.chat_template", default=None),
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )


def _byte_level_bpe(file: File, tokens: list[str], splitter: _Splitter) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=splitter.ignore_merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter.use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitter.first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if splitter.normalizer is not None:
        tokenizer.normalizer = splitter.normalizer
    kinds = file.get("tokenizer.ggml.token_type")
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
        ]
    )
    return tokenizer
