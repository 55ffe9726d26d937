"""From the product of hidden states and head to logits: what log-probabilities and sampling share.

Axes: V columns of a head, or some of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nca_jax.model_config import ModelConfig
from nca_jax.models.attention.attend import NEVER


class Logits(NamedTuple):
    """logits = product / divisor, or cap tanh(product / divisor / cap).

    Attributes:
      vocab_size: columns of the head from this on are no tokens.
      divisor: 1 for most models.
      cap: 0 for none.
    """

    vocab_size: int
    divisor: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, config: ModelConfig) -> "Logits":
        return cls(config.vocab_size, config.logit_divisor, config.logit_cap)

    def __call__(self, product: jax.Array, first: int = 0) -> jax.Array:
        """[..., V] float32 -> the same; columns that are no tokens are far below every token.

        Args:
          product: hidden states by some columns of the head.
          first: which the first of these is.
        """
        logits = product if self.divisor == 1 else product / self.divisor
        if self.cap:
            logits = self.cap * jnp.tanh(logits / self.cap)
        if first + logits.shape[-1] <= self.vocab_size:
            return logits
        return jnp.where(token_of(logits, first) < self.vocab_size, logits, NEVER)

    def slope(self, logits: jax.Array, of_logits: jax.Array) -> jax.Array:
        """The gradient with respect to the product, from that with respect to the logits."""
        if self.cap:  # logits of no token lie outside, and their gradient is 0
            of_logits = of_logits * (1 - jnp.square(jnp.maximum(logits / self.cap, -1)))
        return of_logits if self.divisor == 1 else of_logits / self.divisor


def token_of(logits: jax.Array, first: int) -> jax.Array:
    """The token that each logit is of, int32 in the shape of `logits`; never materialised."""
    return first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
