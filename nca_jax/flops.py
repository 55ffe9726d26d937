"""Floating-point operations that a step needs, counted from the sizes of the model and the tokens.

A multiply and an add are two operations. Counted are the matrix products of the layers, those of
attention over the pairs of tokens that may attend, and the head on the tokens that are scored. Left
out are norms, rotary angles, softmax and the update.
What a program computes beyond that (padding, a prompt again for each response, logits of a prompt)
is its own loss: `needed` says what the work is, not what a program does.

Axes: D width, N query heads, G kv heads, H head width, F MLP width, L layers, E experts.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nca_jax.chips import CHIPS
from nca_jax.model_config import ModelConfig


class Flops(NamedTuple):
    """Operations by part, of one pass or of a whole step."""

    trunk: int  # q, k, v, o, MLP or experts, router
    attention: int  # scores and their products with the values
    head: int  # hidden states to logits

    @property
    def total(self) -> int:
        return sum(self)


def trunk_params(config: ModelConfig) -> int:
    """Parameters that a token is multiplied with, all layers; of experts those it is routed to."""
    c = config
    attention = c.width * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    mlp = 3 * c.width * c.mlp_width * (c.experts_per_token if c.num_experts else 1)
    return c.num_layers * (attention + mlp + c.width * c.num_experts)


def head_params(config: ModelConfig) -> int:
    """Parameters of the head without padded columns, tied or not."""
    return config.width * (config.num_labels or config.vocab_size)


def forward_flops(config: ModelConfig, prompt_len: int, response_lens: Sequence[int]) -> Flops:
    """One forward pass of a prompt, computed once, and its responses.

    Args:
      prompt_len: tokens of the prompt, P.
      response_lens: tokens of each response; all of them are scored.
    """
    scored = sum(response_lens)
    pairs = 0
    for window, num_layers in Counter(kind.window for kind in config.layer_kinds).items():
        of_layer = _attended(0, prompt_len, window)
        of_layer += sum(_attended(prompt_len, length, window) for length in response_lens)
        pairs += num_layers * of_layer
    return Flops(
        trunk=2 * trunk_params(config) * (prompt_len + scored),
        attention=4 * config.num_heads * config.head_dim * pairs,
        head=2 * head_params(config) * scored,
    )


def needed_flops(
    config: ModelConfig, prompt_len: int, response_lens: Sequence[int], *, adapters: int = 0
) -> Flops:
    """A policy's forward and backward pass, the reference being known.

    A backward pass is two forward passes. The head's logits are computed again in it, as nobody
    can keep them: 6 operations a trunk parameter and token, 8 a head parameter and scored token.
    Under adapters trunk and head have no gradient of their own, and through a head that is frozen
    the gradient comes with the logits: 4 and 4.

    Args:
      adapters: parameters of theirs that a token is multiplied with; 0: all parameters are trained.
    """
    trunk, attention, head = forward_flops(config, prompt_len, response_lens)
    if not adapters:
        return Flops(3 * trunk, 3 * attention, 4 * head)
    tokens = prompt_len + sum(response_lens)
    return Flops(2 * trunk + 6 * adapters * tokens, 3 * attention, 2 * head)


def mfu(
    config: ModelConfig,
    lengths: Iterable[Sequence[int]],
    *,
    seconds: float,
    device_kind: str,
    num_devices: int,
    adapters: int = 0,
) -> float | None:
    """Model FLOPs utilization of a step: needed operations over what the devices could have done.

        sum over prompts of needed / (seconds * num_devices * peak)

    Needed are the policy's forward and backward pass: `needed_flops` without computing logits
    again. A prompt counts once however often it is computed; padding, anything that is computed
    again (layers, logits) and the reference's pass count nothing. The peak is that of bfloat16,
    whatever the run computes in.

    Args:
      lengths: tokens of each prompt, then of each of its responses.
      seconds: of the step.
      device_kind: as JAX names the devices.
      adapters: as in `needed_flops`.
    Returns:
      A fraction, or None for a device whose peak is not known.
    """
    if device_kind not in CHIPS:
        return None
    needed = 0
    for prompt, *rest in lengths:
        needed += needed_flops(config, prompt, rest, adapters=adapters).total
        needed -= 0 if adapters else forward_flops(config, prompt, rest).head
    return needed / (seconds * num_devices * CHIPS[device_kind].peak_flops)


def _attended(before: int, length: int, window: int) -> int:
    """Pairs (query, key) of a segment that follows `before` tokens, all causal.

    A query at position t sees t + 1 keys, or `window` of them where that is less.
    """
    growing = min(length, max(0, window - before)) if window else length
    return growing * before + growing * (growing + 1) // 2 + (length - growing) * window
