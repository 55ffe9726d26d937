# What is used of transformers, for the type checker: its own __init__ imports every model there is,
# which takes the checker longer than all of nca_jax, and its annotations are wider than what comes.

from os import PathLike
from typing import Any

from nca_jax.protocols import Tokenizer

class PreTrainedTokenizerBase(Tokenizer):
    def save_pretrained(self, save_directory: str | PathLike[str]) -> tuple[str, ...]: ...

# These two are classes; a checker would want all methods of Tokenizer written out.
def PreTrainedTokenizerFast(**kwargs: Any) -> PreTrainedTokenizerBase: ...
def ByT5Tokenizer(*, extra_ids: int) -> PreTrainedTokenizerBase: ...

class AutoTokenizer:
    @classmethod
    def from_pretrained(
        cls, name: str | PathLike[str], *, trust_remote_code: bool
    ) -> PreTrainedTokenizerBase: ...
