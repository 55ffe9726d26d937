"""What tells one decoder from another, and the table of named sizes.

Axes: V vocabulary, D width, N query heads, G kv heads, H head width, F MLP width, L layers,
      E experts, S labels of a reward model.
"""

import dataclasses

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
class ModelConfig:
    """One decoder of the Llama family; all sizes are per layer unless said otherwise."""

    vocab_size: int  # V
    num_layers: int  # L
    width: int  # D
    num_heads: int  # N
    num_kv_heads: int  # G
    head_dim: int  # H
    mlp_width: int  # F
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_head: bool = False  # the head is the embedding table, transposed
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    sliding_window: int = 0  # tokens by logical position; 0: none
    num_experts: int = 0  # E; 0: a dense MLP
    experts_per_token: int = 0
    num_labels: int = 0  # S, of a reward model, whose head is in place of that of tokens; 0: none
    max_position: int = 8192
    bos_id: int | None = None
    pad_id: int | None = None  # a reward model reads the last token that is another one
    eos_ids: tuple[int, ...] = ()  # every id that ends a turn

    @property
    def padded_vocab(self) -> int:
        """V rounded up to VOCAB_MULTIPLE; the columns beyond V never take part in a softmax."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


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
        mlp_width=1536, rope_theta=100_000.0, tied_head=True, bos_id=1, eos_ids=(2,),
    ),
    "qwen3_0_6b": ModelConfig(
        vocab_size=151936, num_layers=28, width=1024, num_heads=16, num_kv_heads=8, head_dim=128,
        mlp_width=3072, rope_theta=1_000_000.0, norm_eps=1e-6, tied_head=True, qk_norm=True,
        max_position=40960, bos_id=151643, eos_ids=(151645, 151643),
    ),
    "qwen3_8b": ModelConfig(
        vocab_size=151936, num_layers=36, width=4096, num_heads=32, num_kv_heads=8, head_dim=128,
        mlp_width=12288, rope_theta=1_000_000.0, norm_eps=1e-6, qk_norm=True,
        max_position=40960, bos_id=151643, eos_ids=(151645, 151643),
    ),
    "mistral_7b": ModelConfig(  # v0.1, with its window of 4096
        vocab_size=32000, num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_dim=128,
        mlp_width=14336, sliding_window=4096, max_position=32768, bos_id=1, eos_ids=(2,),
    ),
    "llama3_8b": ModelConfig(
        vocab_size=128256, num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_dim=128,
        mlp_width=14336, rope_theta=500_000.0, bos_id=128000, eos_ids=(128001, 128009),
    ),
    "mixtral_8x7b": ModelConfig(
        vocab_size=32000, num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_dim=128,
        mlp_width=14336, rope_theta=1_000_000.0, num_experts=8, experts_per_token=2,
        max_position=32768, bos_id=1, eos_ids=(2,),
    ),
}  # fmt: skip
