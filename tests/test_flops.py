"""What a step needs, against XLA's own count and against counting one by one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nca_jax.chips import CHIPS
from nca_jax.flops import forward_flops, head_params, mfu, needed_flops, trunk_params
from nca_jax.infra.optim import merge_trained
from nca_jax.model_config import MODELS, alike
from nca_jax.models.decoder import Model
from nca_jax.models.formats import names
from nca_jax.models.lora import Lora, split_adapters

# Wide enough that norms and rotary angles, which are not counted, are few.
WIDE = dataclasses.replace(MODELS["tiny"], width=512, num_heads=8, head_dim=64, mlp_width=1024)


def without_products(q, k, v, cache):
    """Stands for attention: needs q, k and v, and multiplies no matrices."""
    groups = q.shape[2] // k.shape[2]
    return q + (k + v).repeat(groups, axis=2), cache


ATTENDS = {0: without_products}


@pytest.mark.parametrize(("passes", "is_gradient"), [(1, False), (3, True)])
def test_the_trunk_is_what_xla_counts_in_an_unrolled_model(passes, is_gradient):
    model, num_tokens = Model(WIDE, scan_layers=False), 256
    tokens = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)

    def total(params, tokens):
        return model.hidden(params, tokens, jnp.zeros_like(tokens), ATTENDS)[0].sum()

    run = jax.grad(total) if is_gradient else total
    compiled = jax.jit(run).lower(model.abstract_params(), tokens).compile()
    counted = compiled.cost_analysis()["flops"]
    needed = passes * forward_flops(WIDE, num_tokens, []).trunk
    assert counted == pytest.approx(needed, rel=0.03)


def test_adapters_leave_the_trunk_two_passes_and_their_own_products():
    lora = Lora(rank=2, alpha=2.0, targets=("q", "k", "v", "o", "gate", "up", "down"))
    model, num_tokens = Model(WIDE, lora=lora, scan_layers=False), 256
    adapters, base = split_adapters(model.abstract_params())
    tokens = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)

    def total(adapters, base, tokens):
        params = merge_trained(adapters, base)
        return model.hidden(params, tokens, jnp.zeros_like(tokens), ATTENDS)[0].sum()

    compiled = jax.jit(jax.grad(total)).lower(adapters, base, tokens).compile()
    needed = needed_flops(WIDE, num_tokens, [], adapters=model.adapter_params).trunk
    # The first layer's input has no gradient: its q, k and v are multiplied once.
    assert compiled.cost_analysis()["flops"] == pytest.approx(needed, rel=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_trunk_and_head_are_the_matrices_of_the_model(name):
    config = dataclasses.replace(MODELS[name], experts_per_token=MODELS[name].num_experts)
    sizes = {path: math.prod(shape) for path, shape in names.param_shapes(config).items()}
    layers = sum(
        size for path, size in sizes.items() if path.endswith("kernel") and "layers" in path
    )
    assert trunk_params(config) == layers
    assert head_params(config) == config.vocab_size * config.width


def test_a_token_is_multiplied_with_the_experts_that_it_is_routed_to():
    sparse = MODELS["tiny_moe"]
    all_experts = dataclasses.replace(sparse, experts_per_token=sparse.num_experts)
    expert = 3 * sparse.width * sparse.mlp_width * sparse.num_layers
    idle = sparse.num_experts - sparse.experts_per_token
    assert trunk_params(all_experts) - trunk_params(sparse) == idle * expert


@pytest.mark.parametrize("window", [0, 1, 5, 100])
def test_attention_is_counted_over_the_pairs_that_may_attend(window):
    config = dataclasses.replace(MODELS["tiny"], kinds=alike(window=window))
    prompt, responses = 7, [3, 1, 9]
    segment = np.repeat(range(4), [prompt, *responses])
    position = np.concatenate([np.arange(prompt), *(prompt + np.arange(n) for n in responses)])
    apart = position[:, None] - position[None]
    may = (segment[None] == 0) | (segment[None] == segment[:, None])
    may &= (apart >= 0) & (apart < (window or 1000))
    found = forward_flops(config, prompt, responses).attention
    assert found == 4 * config.num_layers * config.num_heads * config.head_dim * may.sum()


def test_a_step_is_three_passes_of_the_trunk_and_four_of_the_head():
    forward = forward_flops(WIDE, 10, [4, 6])
    needed = needed_flops(WIDE, 10, [4, 6])
    assert forward.head == 2 * head_params(WIDE) * 10
    assert needed == (3 * forward.trunk, 3 * forward.attention, 4 * forward.head)
    assert needed.total == sum(needed)


def test_mfu_is_six_operations_a_parameter_and_token_over_what_the_chips_could_do():
    """In closed form, attention apart: P + R tokens pass the trunk, R the head."""
    lengths = [[10, 4, 6], [7, 3]]
    attention = sum(3 * forward_flops(WIDE, prompt, rest).attention for prompt, *rest in lengths)
    products = 6 * trunk_params(WIDE) * (20 + 10) + 6 * head_params(WIDE) * (10 + 3)
    found = mfu(WIDE, lengths, seconds=0.5, device_kind="TPU v5", num_devices=8)
    assert found == pytest.approx((products + attention) / (0.5 * 8 * 459e12), rel=1e-12)


def test_a_step_at_the_peak_has_an_mfu_of_one():
    needed = 3 * forward_flops(WIDE, 100, [50, 50]).total
    for kind, chip in CHIPS.items():
        args = dict(device_kind=kind, num_devices=4)
        assert mfu(
            WIDE, [[100, 50, 50]], seconds=needed / (4 * chip.peak_flops), **args
        ) == pytest.approx(1)


def test_under_adapters_the_base_has_no_gradient():
    forward, adapters = forward_flops(WIDE, 10, [4, 6]), 1000
    needed = needed_flops(WIDE, 10, [4, 6], adapters=adapters)
    assert needed.trunk == 2 * forward.trunk + 6 * adapters * 20
    assert (needed.attention, needed.head) == (3 * forward.attention, 2 * forward.head)


def test_an_unknown_device_has_no_mfu():
    assert mfu(WIDE, [[1, 1]], seconds=1.0, device_kind="cpu", num_devices=1) is None
