"""Packed rows with shared prompts give what K separate rows with full logits give."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import sampler_of
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nca_jax import logprobs
from nca_jax.axes import MESH_AXES, flatten_paths
from nca_jax.data.group import Group
from nca_jax.data.pack import RowLayout, pack
from nca_jax.data.plan import causal_bound
from nca_jax.evaluators import make_misses
from nca_jax.infra.compiler import compiler_options
from nca_jax.infra.mesh import make_mesh
from nca_jax.logprobs import sequence_logps
from nca_jax.model_config import MODELS, LayerKind, Rope, alike
from nca_jax.models.decoder import Model
from nca_jax.models.logits import Logits

BLOCK, CHUNK, ROW_LEN = 16, 8, 128
LAYOUT = RowLayout(ROW_LEN, rows=2, block=BLOCK, num_pairs=causal_bound(ROW_LEN, BLOCK), align=1)
# Lengths of prompt and responses: ragged, several prompts a row, one that fills a row to its end.
RAGGED = [(5, (7, 1, 12)), (1, (3, 3)), (17, (20, 16, 30)), (32, (32, 32, 32)), (9, (2, 40))]


def make_groups(lengths, seed: int, vocab_size: int, keys_off=0.0) -> list[Group]:
    """Random groups; a share `keys_off` of the tokens are no keys."""
    rng = np.random.default_rng(seed)

    def draw(n):
        return rng.integers(0, vocab_size, n)

    return [
        Group(
            draw(p),
            [draw(r) for r in responses],
            (rng.random(p) >= keys_off, [rng.random(r) >= keys_off for r in responses]),
        )
        for p, responses in lengths
    ]


def slots_of(groups: list[Group], k: int = 3) -> list[range]:
    """Returns b * K + k of each response."""
    return [range(b * k, b * k + len(group.responses)) for b, group in enumerate(groups)]


def plain_logps(model: Model, params: dict, groups: list[Group], k: int = 3) -> jax.Array:
    """[B, K]: one row a response, dense causal attention, full logits, log_softmax, gather."""
    pairs = [(group.prompt, response) for group in groups for response in group.responses]
    pairs_on = [(group.key_on[0], on) for group in groups for on in group.key_on[1]]
    slots = np.concatenate(slots_of(groups, k))
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    ids, scored = np.zeros((len(pairs), length), int), np.zeros((len(pairs), length - 1), bool)
    key_on = np.ones(ids.shape, bool)
    for i, (prompt, response) in enumerate(pairs):
        ids[i, : len(prompt) + len(response)] = [*prompt, *response]
        scored[i, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
        key_on[i, : len(prompt) + len(response)] = np.concatenate(pairs_on[i])
    place = jnp.arange(length)
    distance = (place[:, None] - place[None])[None]
    attends = model.over_prompts((distance >= 0) & key_on[:, None], distance)
    positions = jnp.broadcast_to(place[None], ids.shape)
    hidden, _ = model.hidden(params, jnp.asarray(ids), positions, attends)
    logps = jax.nn.log_softmax(model.logits(params, hidden), axis=-1)[:, :-1]
    picked = jnp.take_along_axis(logps, jnp.asarray(ids)[:, 1:, None], axis=2)[..., 0]
    sums = jnp.sum(picked, axis=1, where=scored)
    return jnp.zeros(len(groups) * k).at[slots].set(sums).reshape(len(groups), k)


def packed_logps(model: Model, params: dict, groups: list[Group], layout=LAYOUT, k: int = 3):
    shape = (len(groups), k)
    rows, _, _ = pack(groups, layout, slots=slots_of(groups, k), num_slots=len(groups) * k)
    rows = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, *x.shape[2:]), rows)
    return sequence_logps(model, params, rows, shape=shape, block=BLOCK, chunk=CHUNK)


def model_of(name: str, **changes) -> Model:
    config = dataclasses.replace(MODELS["tiny"], **changes)
    if name == "moe":
        config = dataclasses.replace(MODELS["tiny_moe"], **changes)
    return Model(config)


FEATURES = dict(  # all that Llama has not, in three layers of two kinds
    num_layers=3, kinds=(LayerKind(7, Rope(1e3)), LayerKind(rope=None)), norm_offset=True,
    norms="both", qk_norm="width", attn_scale=0.3, attn_cap=2.0, activation="gelu_tanh",
    embed_scale=5.0, residual_scale=0.6, logit_divisor=0.5, logit_cap=3.0,
)  # fmt: skip
VARIANTS = {
    "plain": dict(),
    "window": dict(kinds=alike(window=7)),
    "tied": dict(tied_head=True),
    "bias": dict(qkv_bias=True),
    "qk_norm": dict(qk_norm="head"),
    "moe": dict(),
    "features": FEATURES,
    "keys off": dict(),
}


@pytest.mark.parametrize(
    "variant",
    [x if x == "plain" else pytest.param(x, marks=pytest.mark.slow) for x in VARIANTS],
)
def test_packed_shared_rows_equal_separate_rows_in_value_and_gradient(variant):
    model = model_of(variant, **VARIANTS[variant])
    params = model.init(jax.random.key(0))
    keys_off = 0.3 if variant == "keys off" else 0.0
    groups = make_groups(RAGGED, seed=1, vocab_size=model.config.vocab_size, keys_off=keys_off)
    weights = jax.random.normal(jax.random.key(2), (len(groups), 3))

    def packed(params):
        logps = packed_logps(model, params, groups)
        return jnp.sum(weights * logps), logps

    def plain(params):
        logps = plain_logps(model, params, groups)
        return jnp.sum(weights * logps), logps

    (_, got), grads = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
    (_, want), plain_grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.slow
def test_layers_of_two_kinds_are_the_same_unrolled_and_run_again():
    kinds = {name: FEATURES[name] for name in ("num_layers", "kinds")}
    base = model_of("kinds", **kinds)
    params = base.init(jax.random.key(0))
    groups = make_groups(RAGGED[:2], seed=1, vocab_size=base.config.vocab_size)

    def gradient(**how) -> dict:
        model = dataclasses.replace(base, **how)
        return jax.jit(jax.grad(lambda params: packed_logps(model, params, groups).sum()))(params)

    want = gradient()
    for got in (gradient(scan_layers=False), gradient(remat="full")):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("axes", "is_trained"),
    [
        ({}, True),
        ({}, False),
        pytest.param({"fsdp": 4}, True, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "tensor": 2}, True, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "tensor": 2}, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_gradient_by_hand_goes_through_the_divisor_and_the_cap(monkeypatch, axes, is_trained):
    length, width, vocab, columns = 16, 8, 90, 96  # several pieces where a head is split
    monkeypatch.setattr(logprobs, "PIECE", 32)
    sizes = dict.fromkeys(MESH_AXES, 1) | axes
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (4, length))
    weights, hidden, head = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((4, length), (4, length, width), (width, columns))
    )

    def by_hand(hidden, head):
        logits = Logits(vocab, divisor=0.5, cap=3.0)
        logps = logprobs.head_logps(hidden, head, tokens, jnp.int32(2), logits, 8)
        return jnp.sum(weights * logps)

    def plainly(hidden, head):
        logits = 3.0 * jnp.tanh(hidden @ head[:, :vocab] / 0.5 / 3.0)
        logps = jax.nn.log_softmax(logits)
        return jnp.sum(weights * jnp.take_along_axis(logps, tokens[..., None], axis=2)[..., 0])

    of = (0, 1) if is_trained else (0,)
    want = jax.value_and_grad(plainly, argnums=of)(hidden, head)
    with jax.set_mesh(mesh):
        specs = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P("fsdp", "tensor"))
        grad = jax.jit(jax.value_and_grad(by_hand, argnums=of), in_shardings=specs)
        got = grad(*map(jax.device_put, (hidden, head), specs))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_no_array_of_tokens_by_vocabulary_exists_forward_or_backward():
    model = model_of("plain")
    params = model.init(jax.random.key(0))
    groups = make_groups(RAGGED, seed=1, vocab_size=model.config.vocab_size)
    grad = jax.grad(lambda params: packed_logps(model, params, groups).sum())
    rows = pack(groups, LAYOUT, slots=slots_of(groups), num_slots=15)[0].tokens.size // ROW_LEN
    v = model.config.padded_vocab

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (var.aval.shape for var in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from shapes(inner)

    with_vocab = [s for s in shapes(jax.make_jaxpr(grad)(params).jaxpr) if v in s]
    # A chunk's logits, and parameters and gradients [V, D]; all tokens would be rows * ROW_LEN * v.
    assert {np.prod(shape) for shape in with_vocab} == {rows * CHUNK * v, v * model.config.width}


def test_a_frozen_head_gives_the_same_gradient_by_half_the_products():
    length, width, vocab, chunk = 24, 16, 40, 8
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (2, length, width))
    head = jax.random.normal(keys[1], (width, vocab))
    tokens = jax.random.randint(keys[2], (2, length), 0, vocab)
    weights = jax.random.normal(keys[3], (2, length))

    def total(hidden, head):
        logps = logprobs.head_logps(hidden, head, tokens, jnp.int32(3), Logits(vocab - 2), chunk)
        return jnp.sum(weights * logps)

    value, (of_hidden, _) = jax.value_and_grad(total, argnums=(0, 1))(hidden, head)
    frozen_value, of_hidden_alone = jax.value_and_grad(total)(hidden, head)
    assert frozen_value == value
    np.testing.assert_allclose(of_hidden_alone, of_hidden, rtol=1e-4, atol=1e-5)
    products = [
        str(jax.make_jaxpr(jax.grad(total, argnums=which))(hidden, head)).count("dot_general")
        for which in ((0, 1), 0)
    ]
    assert products == [4, 2]


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_head_keeps_three_chunks_of_logits_at_most_and_its_gradient(tensor):
    length, width, vocab, chunk = 512, 32, 4096, 64
    sizes = {"data": 1, "fsdp": 1, "tensor": tensor, "expert": 1}
    mesh = make_mesh(sizes, jax.devices()[:tensor])

    def total(hidden, head, tokens, num_chunks):
        logps = logprobs.head_logps(hidden, head, tokens, num_chunks, Logits(vocab), chunk)
        return jnp.sum(logps)

    shapes = [(1, length, width), (width, vocab), (1, length), ()]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.int32]
    specs = [P(), P(None, "tensor"), P(), P()]
    grad = jax.jit(
        jax.grad(total, argnums=(0, 1)),
        in_shardings=[NamedSharding(mesh, spec) for spec in specs],
        out_shardings=tuple(NamedSharding(mesh, spec) for spec in specs[:2]),
    )
    with jax.set_mesh(mesh):
        compiled = grad.lower(*map(jax.ShapeDtypeStruct, shapes, dtypes)).compile()
    logits, head = 4 * chunk * vocab // tensor, 4 * width * vocab // tensor  # bytes on a device
    assert compiled.memory_analysis().temp_size_in_bytes <= 3 * logits + head


def test_a_split_head_is_never_whole_on_a_device_and_gives_the_numbers_of_a_whole_one(monkeypatch):
    length, width, vocab, columns = 64, 32, 300, 320
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 1, "expert": 1}, jax.devices()[:4])
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, length)).astype(np.float32)
    given = (
        rng.normal(size=(4, length, width)).astype(np.float32),
        rng.normal(size=(width, columns)).astype(np.float32),
        rng.integers(0, vocab, (4, length)),
        2,  # of four chunks
    )

    def total(hidden, head, tokens, num_chunks):
        logps = logprobs.head_logps(hidden, head, tokens, num_chunks, Logits(vocab), 16)
        return jnp.sum(weights * logps), logps

    def numbers(piece: int) -> tuple:
        monkeypatch.setattr(logprobs, "PIECE", piece)
        specs = (P("fsdp"), P("fsdp"), P("fsdp"), P())
        grad = jax.jit(
            jax.grad(total, argnums=(0, 1), has_aux=True),
            in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs),
            out_shardings=(tuple(NamedSharding(mesh, spec) for spec in specs[:2]), None),
        )
        with jax.set_mesh(mesh):
            compiled = grad.lower(*given).compile()
            return compiled(*map(jax.device_put, given, compiled.input_shardings[0])), compiled

    (want, whole), (got, in_pieces) = numbers(columns), numbers(128)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    shape = f"f32[{width},{columns}]"
    assert shape in whole.as_text() and shape not in in_pieces.as_text()


@pytest.mark.slow
def test_bfloat16_activations_keep_float32_parameters_and_log_probabilities():
    model = model_of("plain")
    params = model.init(jax.random.key(0))
    groups = make_groups(RAGGED, seed=1, vocab_size=model.config.vocab_size)
    want = packed_logps(model, params, groups)
    model = dataclasses.replace(model, dtype=jnp.bfloat16)
    got = packed_logps(model, params, groups)
    grads = jax.grad(lambda params: packed_logps(model, params, groups).sum())(params)
    assert {x.dtype for x in jax.tree.leaves((params, got, grads))} == {jnp.dtype("float32")}
    # bfloat16 has 8 bits: 2^-8 of a log-probability of about log V = 5.6 nats, for each token.
    num_tokens = np.zeros_like(want)
    for b, (_, responses) in enumerate(RAGGED):
        num_tokens[b, : len(responses)] = responses
    assert (np.abs(got - want) <= 5.6 * 2**-8 * num_tokens).all()
    assert (got != want).any()


def test_gradients_of_matrices_in_bfloat16_are_the_float32_ones_rounded_once():
    base = dataclasses.replace(model_of("plain", num_layers=1), dtype=jnp.dtype("bfloat16"))
    options = compiler_options(
        make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1]), base.dtype, ""
    )
    params = base.init(jax.random.key(0))
    groups = make_groups(RAGGED, seed=1, vocab_size=base.config.vocab_size)

    def numbers(dtype: str) -> tuple[jax.Array, dict]:
        model = dataclasses.replace(base, grad_dtype=jnp.dtype(dtype))

        def total(params):
            logps = packed_logps(model, params, groups)
            return logps.sum(), logps

        grad = jax.jit(jax.grad(total, has_aux=True), compiler_options=options)
        grads, logps = grad(params)
        return logps, flatten_paths(grads)

    (want_logps, want), (logps, got) = numbers("float32"), numbers("bfloat16")
    np.testing.assert_array_equal(logps, want_logps)
    for path, grad in got.items():
        of_matrix = path.startswith("layers/") and path.endswith("kernel")
        rounded = jnp.asarray(want[path], jnp.bfloat16 if of_matrix else jnp.float32)
        np.testing.assert_array_equal(grad, rounded.astype(jnp.float32), err_msg=path)
    assert {grad.dtype for grad in got.values()} == {jnp.dtype("float32")}


def test_remat_dots_computes_no_product_again_and_remat_full_some():
    base = model_of("plain")
    params = base.init(jax.random.key(0))
    groups = make_groups(RAGGED, seed=1, vocab_size=base.config.vocab_size)

    def num_products(jaxpr) -> int:
        inner = sum(num_products(j) for e in jaxpr.eqns for j in jaxprs_in_params(e.params))
        return inner + sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)

    def of(remat: str) -> int:
        model = dataclasses.replace(base, remat=remat)
        grad = jax.grad(lambda params: packed_logps(model, params, groups).sum())
        return num_products(jax.make_jaxpr(grad)(params).jaxpr)

    assert of("dots") == of("none") < of("full") == of("host")


def test_remat_host_gives_the_gradient_of_remat_full_from_inputs_in_the_hosts_memory():
    base = model_of("plain")
    params = base.init(jax.random.key(0))
    groups = make_groups(RAGGED, seed=1, vocab_size=base.config.vocab_size)

    def gradient(remat: str) -> tuple[dict, str]:
        model = dataclasses.replace(base, remat=remat)
        grad = jax.jit(jax.grad(lambda params: packed_logps(model, params, groups).sum()))
        return grad(params), str(jax.make_jaxpr(grad)(params))

    (want, without), (got, program) = gradient("full"), gradient("host")
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert "Host" in program and "Host" not in without


def test_the_misses_of_a_response_are_its_tokens_that_full_logits_do_not_give():
    model = model_of("plain")
    params = model.init(jax.random.key(0))
    (group,) = make_groups([(5, (4,))], seed=1, vocab_size=model.config.vocab_size)
    sample, prompts = sampler_of(model, max_new_tokens=4), jnp.asarray(group.prompt)[None]
    found = sample(params, prompts, jnp.array([5]), jax.random.split(jax.random.key(0), 1))
    greedy = np.asarray(found.tokens[0, 0])
    once_wrong = np.where(np.arange(4) == 3, (greedy + 1) % model.config.vocab_size, greedy)
    group = Group(group.prompt, [greedy, once_wrong, group.responses[0]])
    rows, _, _ = pack([group], LAYOUT, slots=[range(3)], num_slots=3)
    rows = jax.tree.map(lambda x: jnp.asarray(x)[0], rows)
    misses = make_misses(model, num_slots=3, block=BLOCK, chunk=CHUNK)
    logps, missed = jax.jit(misses)(params, rows)
    expected = packed_logps(model, params, [group])
    np.testing.assert_allclose(logps, expected[0], rtol=1e-6)
    assert missed.tolist() == [0, 1, 4]
