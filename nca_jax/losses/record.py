"""What a loss is to the rest of the project: one record, which says all that others ask of it.

Axes: B prompts, K responses a prompt.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nca_jax.field import Field, Value

Fields = Mapping[str, Value]  # a loss's own hyperparameters by name, read as fields["beta"]


class Responses(NamedTuple):
    """All that a loss sees of a step. An absent response changes neither a loss nor a gradient."""

    logps: jax.Array  # [B, K] log pi(y|x), nats, summed over the response's tokens
    ref_logps: jax.Array  # [B, K] the same under the frozen reference; 0 where there is none
    lengths: jax.Array  # [B, K] scored tokens of each response, its end-of-turn token included
    scores: jax.Array  # [B, K] rewards, in the data's own unit
    mask: jax.Array  # [B, K] bool: the response is there


# What a loss may read, see `Loss.reads`.
OF_LOGRATIOS = ("ref_logps", "scores")
OF_MEAN_TOKENS = ("scores", "lengths")

PerPrompt = Callable[[Responses, Fields], jax.Array]  # -> [B]
Floor = Callable[[Responses, Fields], jax.Array | None]  # -> [B]; None: these fields have none


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
      usual_k: how many a config has unless it is asked for others; 0: as many as there are.
      soft_labels: it compares with p = softmax(s / alpha), see `targets`.
      floor: (responses, fields) -> the least value that L can have with these scores, [B] nats;
        None: not known, so no excess is reported.
      weight: (responses, fields) -> w, [B], of lengths, scores and mask alone; None: one a prompt.
    """

    per_prompt: PerPrompt
    fields: Mapping[str, Field]
    reads: Collection[str] = ("ref_logps", "scores")
    k: tuple[int, int | None] = (2, None)
    usual_k: int = 0
    soft_labels: bool = False
    floor: Floor | None = None
    weight: PerPrompt | None = None

    def defaults(self, **changes: Value) -> Fields:
        """Returns a value for each of its fields: that of `changes`, or its default."""
        return {name: field.default for name, field in self.fields.items()} | changes

    def at_reference(self, responses: Responses, fields: Fields) -> jax.Array | None:
        """Returns L where policy = reference, [B] nats; None where that differs between policies.

        What reads a reference sees log-ratios alone, which are then 0.
        """
        if "ref_logps" not in self.reads or fields.get("nll_weight"):
            return None
        zeros = jnp.zeros_like(responses.logps)
        return self.per_prompt(responses._replace(logps=zeros, ref_logps=zeros), fields)

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
