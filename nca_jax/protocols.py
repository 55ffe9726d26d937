"""What functions ask of things whose own types say less: a tokenizer, a section of the config.

A `ConfigDict` says nothing of its fields, so a function that takes one section says by a type of
this file what it reads. The table in `nca_jax.fields` is where fields are made; a test compares.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, overload

if TYPE_CHECKING:  # what reads text imports no jax, and a loss not even numpy
    import numpy as np


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    chat_template: str | dict[str, str] | None
    special_tokens_map: Mapping[str, str | list[str]]

    def __len__(self) -> int: ...
    @overload
    def __call__(
        self, text: str, *, add_special_tokens: bool = True
    ) -> Mapping[str, list[int]]: ...
    @overload
    def __call__(
        self, text: list[str], *, add_special_tokens: bool = True
    ) -> Mapping[str, list[list[int]]]: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(
        self, token_ids: "Sequence[int] | np.ndarray", *, skip_special_tokens: bool = False
    ) -> str: ...
    def batch_decode(self, sequences: Sequence[Sequence[int]]) -> list[str]: ...
    def apply_chat_template(
        self,
        conversation: list[list[dict[str, Any]]],
        *,
        chat_template: str | None = None,
        tokenize: bool,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
    ) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: int) -> str | None: ...
    def get_added_vocab(self) -> dict[str, int]: ...
    def get_chat_template(self) -> str: ...
    def get_vocab(self) -> dict[str, int]: ...


class Device(Protocol):
    """What is asked of a device: jax's own class is no type to a checker."""

    platform: str
    device_kind: str

    def memory_stats(self) -> dict[str, int] | None: ...


class DataSection(Protocol):
    """config.data"""

    files: str
    store: str
    eval_files: str
    eval_fraction: float
    weights: str
    shuffle: bool
    bad_rows: str
    tokenizer: str
    format: str
    join: str
    max_prompt_len: int
    max_response_len: int
    prompt_keep: str
    too_long: str
    num_responses: int
    train_on: str
    choose: str
    first_bonus: float
    score_unit: str
    batch_size: int
    row_len: int
    rows: int
    block: int
    row_pairs: int
    align: int


class ModelSection(Protocol):
    """config.model, as far as it says which model it is"""

    name: str
    init_from: str
    head: str


class OptimSection(Protocol):
    """config.optim"""

    lr: float
    schedule: str
    warmup_frac: float
    warmup_from: str
    decay_frac: float
    freeze: str
    clip_norm: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    mu_dtype: str
    moments: str
    grad_dtype: str


class RoundsSection(Protocol):
    """config.rounds"""

    number: int
    prompts: int
    samples: int
    steps: int
    reference: str
    keep_best: bool
    drop_tied: bool
    dedupe: bool
    optimizer: str


class CheckpointSection(Protocol):
    """config.checkpoint"""

    keep_last: int
    best_metric: str
    on_damage: str


class LogSection(Protocol):
    """config.log"""

    tensorboard: bool
    wandb_project: str
