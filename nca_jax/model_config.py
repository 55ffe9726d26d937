"""What tells one decoder from another, and the table of named sizes.

Axes: V vocabulary, D width, N query heads, G kv heads, H head width, F MLP width, L layers,
      E experts, S labels of a reward model.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

VOCAB_MULTIPLE = 128  # padded so that V splits over any tensor axis and fills TPU lanes
# Matrices of a layer that may have an adapter; of a mixture gate, up and down are those of experts.
TARGETS = ("q", "k", "v", "o", "gate", "up", "down", "router")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretched rotary frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class Linear:
    """All rotary frequencies divided by one factor (`rope_type: linear`)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Long wavelengths slowed by `factor` (`rope_type: yarn`, arXiv:2309.00071)."""

    factor: float
    original_max_position: int
    attention_factor: float  # times sin and cos
    beta_fast: float = 32.0  # turns over the original context from which on nothing is slowed
    beta_slow: float = 1.0  # and below which all is


@dataclasses.dataclass(frozen=True)
class LongRope:
    """A factor for each frequency (`rope_type: longrope`, arXiv:2402.13753)."""

    short_factors: tuple[float, ...]  # [P], of sequences within the original context
    long_factors: tuple[float, ...]  # [P], of longer ones
    original_max_position: int
    attention_factor: float  # times sin and cos


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: frequency i of 2 P rotated elements of a head is theta^(-i / P)."""

    theta: float = 10_000.0
    scaling: RopeScaling | Linear | Yarn | LongRope | None = None
    fraction: float = 1.0  # of a head, its first elements, is rotated: 2 P / H


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What the layers of one model may differ in."""

    window: int = 0  # tokens by logical position; 0: none
    rope: Rope | None = Rope()  # None: queries and keys are not turned


def alike(theta: float = 10_000.0, window: int = 0) -> tuple[LayerKind, ...]:
    """The `kinds` of a model whose layers are all of one kind."""
    return (LayerKind(window, Rope(theta)),)


def shortest_period(layers: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The fewest `kinds` that, over and over, are those of all layers."""
    return next(
        tuple(layers[:length])
        for length in range(1, len(layers) + 1)
        if all(kind == layers[i % length] for i, kind in enumerate(layers))
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder; all sizes are per layer unless said otherwise.

    The defaults are Llama 2's. Each other feature costs no array and no operation where it is off.
    """

    vocab_size: int  # V
    num_layers: int  # L
    width: int  # D
    num_heads: int  # N
    num_kv_heads: int  # G
    head_dim: int  # H
    mlp_width: int  # F
    kinds: tuple[LayerKind, ...] = (LayerKind(),)  # layer i is kinds[i % len(kinds)]
    norm_eps: float = 1e-5
    norm_offset: bool = False  # norms multiply with 1 + scale
    # Of attention and MLP, norms of what goes in, of what comes out before it is added, or of both.
    norms: Literal["before", "after", "both"] = "before"
    tied_head: bool = False  # the head is the embedding table, transposed
    qkv_bias: bool = False
    qk_norm: Literal["head", "width"] | None = None  # of q and k: over H, or over all heads
    attn_scale: float | None = None  # of the scores q k; None: H^-0.5
    attn_cap: float = 0.0  # scaled scores s become cap tanh(s / cap); 0: they stay
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the gate of a dense MLP
    embed_scale: float = 1.0  # of what is looked up, rounded to the activations' dtype
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_divisor: float = 1.0
    logit_cap: float = 0.0  # logits, divided, become cap tanh(logit / cap); 0: they stay
    num_experts: int = 0  # E; 0: a dense MLP
    experts_per_token: int = 0
    num_labels: int = 0  # S, of a reward model, whose head is in place of that of tokens; 0: none
    renormalise: bool = True  # the shares of a token's experts sum to 1
    max_position: int = 8192
    bos_id: int | None = None
    pad_id: int | None = None  # a reward model reads the last token that is another one
    eos_ids: tuple[int, ...] = ()  # every id that ends a turn

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each of the L layers."""
        return tuple(self.kinds[i % len(self.kinds)] for i in range(self.num_layers))

    @property
    def score_scale(self) -> float:
        """What the scores q k are multiplied with."""
        return self.head_dim**-0.5 if self.attn_scale is None else self.attn_scale

    @property
    def windows(self) -> tuple[int, ...]:
        """Each window that layers have, ascending; 0 stands for none."""
        return tuple(sorted({kind.window for kind in self.kinds}))

    @property
    def has_longrope(self) -> bool:
        """Whether how a token is turned depends on the length of its sequence."""
        return any(kind.rope and isinstance(kind.rope.scaling, LongRope) for kind in self.kinds)

    @property
    def padded_vocab(self) -> int:
        """V rounded up to VOCAB_MULTIPLE; the columns beyond V never take part in a softmax."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


_GEMMA2_2B = ModelConfig(
    vocab_size=256000, num_layers=26, width=2304, num_heads=8, num_kv_heads=4, head_dim=256,
    mlp_width=9216, kinds=(LayerKind(window=4096), LayerKind()), norm_eps=1e-6, norm_offset=True,
    norms="both", tied_head=True, attn_scale=256**-0.5, attn_cap=50.0, activation="gelu_tanh",
    embed_scale=2304**0.5, logit_cap=30.0, bos_id=2, eos_ids=(1, 107),
)  # fmt: skip
_GEMMA3_1B = dataclasses.replace(
    _GEMMA2_2B, vocab_size=262144, width=1152, num_heads=4, num_kv_heads=1, mlp_width=6912,
    kinds=(*[LayerKind(window=512)] * 5, LayerKind(rope=Rope(1e6))), qk_norm="head", attn_cap=0.0,
    embed_scale=1152**0.5, logit_cap=0.0, max_position=32768, eos_ids=(1, 106),
)  # fmt: skip
_GRANITE3_2B = ModelConfig(  # 3.1
    vocab_size=49155, num_layers=40, width=2048, num_heads=32, num_kv_heads=8, head_dim=64,
    mlp_width=8192, kinds=alike(theta=5e6), tied_head=True, attn_scale=1 / 64, embed_scale=12.0,
    residual_scale=0.22, logit_divisor=8.0, max_position=131072, bos_id=0, eos_ids=(0,),
)  # fmt: skip
OLMO3 = (  # three layers of four see 4096 tokens; YaRN in the fourth
    *alike(theta=5e5, window=4096) * 3,
    LayerKind(rope=Rope(5e5, Yarn(8.0, 8192, attention_factor=1.2079441541679836))),
)
MODELS = {
    # Random weights over the 259 ids of the byte tokenizer: for smoke runs and tests.
    "tiny": ModelConfig(
        vocab_size=259, num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_dim=16,
        mlp_width=160, max_position=4096, eos_ids=(1,),
    ),
    "tiny_moe": ModelConfig(
        vocab_size=259, num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_dim=16,
        mlp_width=96, max_position=4096, eos_ids=(1,), num_experts=4, experts_per_token=2,
    ),
    "smollm2_135m": ModelConfig(
        vocab_size=49152, num_layers=30, width=576, num_heads=9, num_kv_heads=3, head_dim=64,
        mlp_width=1536, kinds=alike(theta=1e5), tied_head=True, bos_id=1, eos_ids=(2,),
    ),
    "qwen3_0_6b": ModelConfig(
        vocab_size=151936, num_layers=28, width=1024, num_heads=16, num_kv_heads=8, head_dim=128,
        mlp_width=3072, kinds=alike(theta=1e6), norm_eps=1e-6, tied_head=True, qk_norm="head",
        max_position=40960, bos_id=151643, eos_ids=(151645, 151643),
    ),
    "qwen3_8b": ModelConfig(
        vocab_size=151936, num_layers=36, width=4096, num_heads=32, num_kv_heads=8, head_dim=128,
        mlp_width=12288, kinds=alike(theta=1e6), norm_eps=1e-6, qk_norm="head",
        max_position=40960, bos_id=151643, eos_ids=(151645, 151643),
    ),
    "qwen3_30b_a3b": ModelConfig(
        vocab_size=151936, num_layers=48, width=2048, num_heads=32, num_kv_heads=4, head_dim=128,
        mlp_width=768, kinds=alike(theta=1e6), norm_eps=1e-6, qk_norm="head", num_experts=128,
        experts_per_token=8, max_position=40960, bos_id=151643, eos_ids=(151645, 151643),
    ),
    "qwen3_235b_a22b": ModelConfig(
        vocab_size=151936, num_layers=94, width=4096, num_heads=64, num_kv_heads=4, head_dim=128,
        mlp_width=1536, kinds=alike(theta=1e6), norm_eps=1e-6, qk_norm="head", num_experts=128,
        experts_per_token=8, max_position=40960, bos_id=151643, eos_ids=(151645, 151643),
    ),
    "smollm3_3b": ModelConfig(
        vocab_size=128256, num_layers=36, width=2048, num_heads=16, num_kv_heads=4, head_dim=128,
        mlp_width=11008, kinds=(*alike(theta=5e6) * 3, LayerKind(rope=None)), norm_eps=1e-6,
        tied_head=True, max_position=65536, bos_id=128000, eos_ids=(128012,),
    ),
    "olmo2_1b": ModelConfig(
        vocab_size=100352, num_layers=16, width=2048, num_heads=16, num_kv_heads=16, head_dim=128,
        mlp_width=8192, kinds=alike(theta=5e5), norm_eps=1e-6, norms="after", qk_norm="width",
        max_position=4096, eos_ids=(100257,),
    ),
    "olmo2_7b": ModelConfig(
        vocab_size=100352, num_layers=32, width=4096, num_heads=32, num_kv_heads=32, head_dim=128,
        mlp_width=11008, kinds=alike(theta=5e5), norm_eps=1e-6, norms="after", qk_norm="width",
        max_position=4096, eos_ids=(100257,),
    ),
    "olmo3_7b": ModelConfig(
        vocab_size=100278, num_layers=32, width=4096, num_heads=32, num_kv_heads=32, head_dim=128,
        mlp_width=11008, kinds=OLMO3, norm_eps=1e-6, norms="after", qk_norm="width",
        max_position=65536, eos_ids=(100257,),
    ),
    "olmo3_32b": ModelConfig(
        vocab_size=100278, num_layers=64, width=5120, num_heads=40, num_kv_heads=8, head_dim=128,
        mlp_width=27648, kinds=OLMO3, norm_eps=1e-6, norms="after", qk_norm="width",
        max_position=65536, eos_ids=(100257,),
    ),
    "phi3_mini_4k": ModelConfig(
        vocab_size=32064, num_layers=32, width=3072, num_heads=32, num_kv_heads=32, head_dim=96,
        mlp_width=8192, kinds=alike(window=2047), max_position=4096, bos_id=1,
        eos_ids=(32000, 32001, 32007),
    ),
    "phi4": ModelConfig(
        vocab_size=100352, num_layers=40, width=5120, num_heads=40, num_kv_heads=10, head_dim=128,
        mlp_width=17920, kinds=alike(theta=250_000.0), max_position=16384, bos_id=100257,
        eos_ids=(100265,),
    ),
    "mistral_7b": ModelConfig(  # v0.1, with its window of 4096
        vocab_size=32000, num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_dim=128,
        mlp_width=14336, kinds=alike(window=4096), max_position=32768, bos_id=1, eos_ids=(2,),
    ),
    "llama3_8b": ModelConfig(
        vocab_size=128256, num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_dim=128,
        mlp_width=14336, kinds=alike(theta=5e5), bos_id=128000, eos_ids=(128001, 128009),
    ),
    "mixtral_8x7b": ModelConfig(
        vocab_size=32000, num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_dim=128,
        mlp_width=14336, kinds=alike(theta=1e6), num_experts=8, experts_per_token=2,
        max_position=32768, bos_id=1, eos_ids=(2,),
    ),
    "gemma2_2b": _GEMMA2_2B,
    "gemma2_9b": dataclasses.replace(
        _GEMMA2_2B, num_layers=42, width=3584, num_heads=16, num_kv_heads=8, mlp_width=14336,
        embed_scale=3584**0.5,
    ),
    "gemma3_1b": _GEMMA3_1B,
    "gemma3_4b": dataclasses.replace(  # its text half
        _GEMMA3_1B, vocab_size=262208, num_layers=34, width=2560, num_heads=8, num_kv_heads=4,
        kinds=(*[LayerKind(window=1024)] * 5, LayerKind(rope=Rope(1e6, Linear(8.0)))),
        mlp_width=10240, embed_scale=2560**0.5, max_position=131072,
    ),
    "granite3_2b": _GRANITE3_2B,
    "granite3_8b": dataclasses.replace(
        _GRANITE3_2B, width=4096, head_dim=128, mlp_width=12800, attn_scale=1 / 128,
        logit_divisor=16.0,
    ),
}  # fmt: skip
