"""What a loss is to the rest of the project: one record, which says all that others ask of it.

Axes: B prompts, K responses a prompt.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax

from nca_jax.field import Field, Value

Fields = Mapping[str, Value]  # a loss's own hyperparameters by name, read as fields["beta"]


class Responses(NamedTuple):
    """All that a loss sees of a step. An absent response changes neither a loss nor a gradient."""

    logps: jax.Array  # [B, K] log pi(y|x), nats, summed over the response's tokens
    ref_logps: jax.Array  # [B, K] the same under the frozen reference; 0 where there is none
    lengths: jax.Array  # [B, K] scored tokens of each response, its end-of-turn token included
    scores: jax.Array  # [B, K] rewards, in the data's own unit
    mask: jax.Array  # [B, K] bool: the response is there


PerPrompt = Callable[[Responses, Fields], jax.Array]  # -> [B]


class Loss(NamedTuple):
    """One loss over K scored responses.

    The loss of a step is sum_b w_b L_b / sum_b w_b over the prompts that have a response.

    Attributes:
      per_prompt: (responses, fields) -> L, [B] nats.
      fields: its own hyperparameters; config.loss has these beside `name` and `logits_chunk`, and
        no others.
      reads: what it needs of "ref_logps", "scores" and "lengths"; no reference is opened for a
        loss that does not read its log-probabilities.
      k: the least and the most responses a prompt that it takes; None: any number.
      floor: (responses, fields) -> the least value that L can have with these scores, [B] nats;
        None: not known, so no excess is reported.
      at_reference: (responses, fields) -> L where policy = reference, [B] nats; None: it is not
        the same for every policy, so the first step is not checked against it.
      weight: (responses, fields) -> w, [B], of lengths, scores and mask alone; None: one a prompt.
    """

    per_prompt: PerPrompt
    fields: Mapping[str, Field]
    reads: Collection[str] = ("ref_logps", "scores")
    k: tuple[int, int | None] = (2, None)
    floor: PerPrompt | None = None
    at_reference: PerPrompt | None = None
    weight: PerPrompt | None = None

    @property
    def takes(self) -> str:
        """The numbers of responses that it takes, in words: "2", "2 or more", "1 to 4"."""
        least, most = self.k
        more = " or more" if most is None else f" to {most}" if most > least else ""
        return f"{least}{more}"

    def nearest_k(self, k: int) -> int:
        """Returns the number of responses nearest to k that the loss takes."""
        least, most = self.k
        return max(least, k if most is None else min(k, most))
