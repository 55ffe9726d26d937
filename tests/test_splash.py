"""Both kernels of packed rows give what rows of one response give; splash by interpretation."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_logprobs import make_groups, slots_of

from nca_jax.axes import MESH_AXES, ROWS
from nca_jax.batch import PROMPT_SEGMENT, Rows
from nca_jax.checks import UserError
from nca_jax.compiled.topology import topology_devices
from nca_jax.data.pack import RowLayout, pack
from nca_jax.data.plan import causal_bound
from nca_jax.infra.mesh import make_mesh
from nca_jax.model_config import MODELS
from nca_jax.models.attention import pairs, splash
from nca_jax.models.decoder import Model

ROW_LEN, BLOCK, ALIGN = 512, 128, 8
LAYOUT = RowLayout(
    ROW_LEN, rows=2, block=BLOCK, num_pairs=causal_bound(ROW_LEN, BLOCK), align=ALIGN
)
LENGTHS = [(100, (90, 50, 128)), (61, (17, 90, 41)), (1, (3, 3)), (33, (200, 7))]


def make_rows(lengths=LENGTHS, layout=LAYOUT) -> Rows:
    """Two rows, several prompts in each, with keys that are off here and there; [R, ...]."""
    groups = make_groups(lengths, seed=0, vocab_size=100)
    slots = slots_of(groups, k := max(len(responses) for _, responses in lengths))
    packed, num_micro, _ = pack(groups, layout, slots=slots, num_slots=len(groups) * k)
    assert num_micro == 1
    rows = Rows(*(jnp.asarray(x[0]) for x in packed))
    is_off = (np.arange(layout.row_len) % 11 == 5)[None] & (np.asarray(rows.positions) > 0)
    return rows._replace(key_on=rows.key_on & ~is_off)


def allowed(rows: Rows, row: int, at: np.ndarray, window: int = 0) -> np.ndarray:
    """What the tokens at the places `at` of a row may attend to, keys that are off too: [at, T]."""
    prompt_id, segment, position = (
        np.asarray(x[row]) for x in (rows.prompt_ids, rows.segments, rows.positions)
    )
    mask = np.arange(len(segment))[None] <= at[:, None]
    mask &= (prompt_id == prompt_id[at][:, None]) & (segment > 0) & (segment[at] > 0)[:, None]
    mask &= (segment == PROMPT_SEGMENT) | (segment == segment[at][:, None])
    return mask & (position[at][:, None] - position < (window or len(segment)))


def alone(rows: Rows, *, scale: float, window: int = 0, cap: float = 0.0):
    """Each prompt with each of its responses as a row of its own, by dense attention."""
    num_tokens, length = rows.tokens.size, max(p + max(responses) for p, responses in LENGTHS)
    prompt_id = (np.asarray(rows.prompt_ids) + [[0], [100]]).reshape(-1)
    segment = np.asarray(rows.segments).reshape(-1)
    responses = sorted({(i, n) for i, n in zip(prompt_id, segment, strict=True) if n > 1})
    read = np.full((len(responses), length), num_tokens)  # filler is out of bounds
    written = read.copy()  # a prompt with its first response only
    for i, (one, n) in enumerate(responses):
        of_prompt, of_response = (
            np.flatnonzero((prompt_id == one) & (segment == which)) for which in (1, n)
        )
        at = np.concatenate([of_prompt, of_response])
        read[i, : len(at)] = written[i, : len(at)] = at
        written[i, : len(of_prompt) * (n > 2)] = num_tokens

    def apart(x):
        return x.reshape(num_tokens, *x.shape[2:]).at[read].get(mode="fill", fill_value=0)

    back = np.arange(length)[:, None] - np.arange(length)[None]
    mask = ((back >= 0) & (back < (window or length)))[None] & apart(rows.key_on)[:, None]

    def attend(q, k, v, cache):
        each = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, each, axis=2) for x in (k, v))
        scores = jnp.einsum("itnh,isnh->ints", apart(q), apart(k)) * scale
        scores = cap * jnp.tanh(scores / cap) if cap else scores
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e9), axis=-1)
        out = jnp.einsum("ints,isnh->itnh", weights, apart(v))
        flat = jnp.zeros((num_tokens, *q.shape[2:])).at[written].add(out, mode="drop")
        return flat.reshape(q.shape), cache

    return attend


def value_and_grads(attend, rows: Rows, q, k, v):
    """A sum over the real tokens of a nonlinear function of the output, and its gradients."""

    def total(q, k, v):
        out = attend(rows)(q, k, v, None)[0]
        return jnp.sum(jnp.sin(out), where=(rows.segments > 0)[..., None, None])

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)


def make_qkv(num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 64):
    rng = np.random.default_rng(1)
    shapes = [(2, ROW_LEN, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


NUM_BLOCKS, SCALE = ROW_LEN // BLOCK, 64**-0.5
PAIRS = functools.partial(pairs.packed, num_blocks=NUM_BLOCKS, scale=SCALE)
SPLASH = functools.partial(
    splash.packed, num_blocks=NUM_BLOCKS, scale=SCALE, align=ALIGN, interpret=True
)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_splash_equals_block_pairs_in_value_and_gradient():
    rows, qkv = make_rows(), make_qkv()
    assert_same(value_and_grads(SPLASH, rows, *qkv), value_and_grads(PAIRS, rows, *qkv))


@pytest.mark.parametrize(
    "how",
    [  # prompts have up to 100 tokens
        dict(window=40, cap=1.5, scale=0.3),
        pytest.param(dict(window=150, scale=SCALE), marks=pytest.mark.slow),
    ],
    ids=["shorter than a prompt, soft cap", "shorter than prompt and response"],
)
def test_windows_and_soft_caps_with_shared_prompts_equal_rows_of_one_response(how):
    rows, qkv = make_rows(), make_qkv()
    want = value_and_grads(functools.partial(alone, **how), rows, *qkv)
    for kernel in (PAIRS, SPLASH):
        assert_same(value_and_grads(functools.partial(kernel, **how), rows, *qkv), want)


@pytest.mark.parametrize("kernel", [PAIRS, SPLASH], ids=["pairs", "splash"])
def test_blocks_that_no_query_sees_in_its_window_are_not_computed(kernel):
    window, rows = 5, make_rows()
    attend = jax.jit(lambda q, k, v: kernel(rows, window=window)(q, k, v, None)[0])
    places = np.arange(ROW_LEN)
    seen = np.stack([allowed(rows, row, places, window) for row in range(2)])
    seen = seen.reshape(2, NUM_BLOCKS, BLOCK, NUM_BLOCKS, BLOCK).any(axis=(2, 4))
    seen |= np.eye(NUM_BLOCKS, dtype=bool)
    assert seen.sum() < (np.asarray(rows.pairs)[..., 0] >= 0).sum()
    q, k, v = make_qkv()
    for block in range(NUM_BLOCKS):  # 0 * nan shows, also where the mask is off
        hole = v.at[:, block * BLOCK : (block + 1) * BLOCK].set(jnp.nan)
        computed = jnp.isnan(attend(q, k, hole)).reshape(2, NUM_BLOCKS, -1).any(axis=-1)
        np.testing.assert_array_equal(computed, seen[:, :, block])


@pytest.mark.parametrize(
    "sizes",
    [
        "block_q=256,block_kv=512,block_kv_compute=128,"
        "block_q_dkv=512,block_kv_dkv=256,block_kv_dkv_compute=128,block_q_dq=256",
        "use_fused_bwd_kernel=1,block_q_dkv=256,block_kv_dkv=512,block_kv_dkv_compute=256",
    ],
)
def test_larger_blocks_and_the_fused_backward_kernel_change_no_number(sizes):
    rows, qkv = make_rows(), make_qkv()
    blocks = splash.parse_blocks(sizes, block=BLOCK, row_len=ROW_LEN)
    of_blocks = functools.partial(SPLASH, blocks=blocks)
    assert_same(value_and_grads(of_blocks, rows, *qkv), value_and_grads(PAIRS, rows, *qkv))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ("block_k=512", "block_k=512 is no size; wanted whole numbers for some of block_q, "),
        ("block_q", "block_q= is no size"),
        ("block_q=192", "block_q=192 must be a multiple of config.data.block=128"),
        ("block_kv=384", "and divide config.data.row_len=512"),
        ("block_kv=512,block_kv_compute=192", "must be a multiple of 128 and divide block_kv=512"),
        ("block_kv_dkv_compute=256", "divide block_kv_dkv=128"),
        ("use_fused_bwd_kernel=2", "must be 0 or 1"),
        ("use_fused_bwd_kernel=1,block_q_dq=256", "that use_fused_bwd_kernel=1 does without"),
    ],
)
def test_sizes_that_the_kernels_cannot_have_are_refused_by_name(sizes, said):
    with pytest.raises(UserError, match=said):
        splash.parse_blocks(sizes, block=BLOCK, row_len=ROW_LEN)


TINY = Model(MODELS["tiny"], attention_kernel="splash", align=ALIGN, interpret=True)


def grad_of_rows(**changes):
    """Returns the gradient of a number by the parameters of TINY, with `changes`."""
    model, rows = dataclasses.replace(TINY, **changes), make_rows()
    return jax.grad(lambda params: jnp.sum(jnp.sin(model.rows(params, rows, block=BLOCK))))


def test_a_model_with_a_window_is_the_same_by_both_kernels():
    config = dataclasses.replace(TINY.config, num_layers=1, sliding_window=40)
    model, rows = dataclasses.replace(TINY, config=config), make_rows()
    params, real = model.init(jax.random.key(0)), np.asarray(rows.segments) > 0
    by_splash, by_pairs = (
        dataclasses.replace(model, attention_kernel=kernel).rows(params, rows, block=BLOCK)[real]
        for kernel in ("splash", "pairs")
    )
    np.testing.assert_allclose(by_splash, by_pairs, rtol=1e-4, atol=1e-4)


def test_attention_that_is_kept_is_not_run_again_in_the_backward_pass():
    def num_kernels(**changes) -> int:
        program = jax.make_jaxpr(grad_of_rows(**changes))(TINY.abstract_params())
        return str(program).count("pallas_call[")

    fused = splash.parse_blocks("use_fused_bwd_kernel=1", block=BLOCK, row_len=ROW_LEN)
    # Forward, dq and dkv; the layers are one scan forward and one back.
    assert num_kernels(remat="full") == 4
    assert num_kernels(remat="dots") == num_kernels(remat="attention") == 3
    assert num_kernels(remat="attention", splash_blocks=fused) == 2


@pytest.mark.slow
def test_attention_that_is_kept_changes_no_bit_of_the_gradient():
    params = TINY.init(jax.random.key(0))
    got, want = (jax.jit(grad_of_rows(remat=x))(params) for x in ("attention", "full"))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_splash_on_four_devices_equals_one():
    rows, qkv = make_rows(), make_qkv()
    want = value_and_grads(PAIRS, rows, *qkv)
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 2, "expert": 1}, jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert_same(value_and_grads(SPLASH, rows, *qkv), want)


@pytest.mark.parametrize(
    ("row_len", "align", "fits"),
    [
        (1024, 1, True), (2048, 1, False), (4096, 8, True), (8192, 8, False), (8192, 16, True),
        (16384, 16, False), (16384, 64, True), (32768, 64, False), (32768, 128, True),
        (65536, 128, False),
    ],
)  # fmt: skip
def test_codes_say_how_long_rows_may_be(row_len, align, fits):
    assert (splash.Code.of(row_len, align) is not None) == fits


def assert_codes_allow(rows: Rows, align: int, window: int, at: np.ndarray):
    """Checks the tokens at the places `at` of every row against all keys of theirs."""
    num_rows, row_len = rows.tokens.shape
    code = splash.Code.of(row_len, align, window)
    codes = np.asarray(splash._codes(rows, code))
    assert codes.min() >= 0
    prompt_id, is_real = np.asarray(rows.prompt_ids), np.asarray(rows.segments) > 0
    for row in range(num_rows):
        here = at[is_real[row, at]]
        got = code(codes[row, here][:, None], np.arange(row_len)[None])
        got &= prompt_id[row, here][:, None] == prompt_id[row][None]
        np.testing.assert_array_equal(got, allowed(rows, row, here, window))


@pytest.mark.parametrize("window", [0, 1, 2, 40, 99, 100, 101, 150])
@pytest.mark.parametrize("align", [1, ALIGN, 16])
def test_every_code_allows_exactly_what_the_row_layout_and_the_window_allow(align, window):
    rows = make_rows(layout=dataclasses.replace(LAYOUT, align=align))
    assert_codes_allow(rows, align, window, np.arange(ROW_LEN))


@pytest.mark.parametrize("window", [0, 1024, 4096])
def test_a_prompt_of_2k_tokens_with_8_answers_of_3_5k_fits_a_row_of_32k_and_its_codes(window):
    row_len, align = 32768, 128
    layout = RowLayout(row_len, rows=1, block=512, num_pairs=causal_bound(64, 1), align=align)
    rows = make_rows([(2000, (3500,) * 8), (300, (700,))], layout)
    at = np.random.default_rng(0).choice(row_len, 200, replace=False)
    assert_codes_allow(rows, align, window, at)


def test_next_live_is_the_next_pair_in_order_and_wraps():
    live = jnp.asarray([[1, 0, 0], [0, 1, 0], [1, 0, 0]], bool)
    np.testing.assert_array_equal(splash._next_live(live), [[0, 1, 1], [1, 1, 0], [0, 0, 0]])


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="wants libtpu")
@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", pytest.param("v5p:2x2x1", marks=pytest.mark.long)])
def test_layers_with_and_without_a_window_over_rows_of_32k_compile_for_tpus(topology):
    row_len, num_blocks = 32768, 64
    mesh = make_mesh(dict.fromkeys(MESH_AXES, 1) | {"data": 4}, topology_devices(topology, 1))
    by_row = NamedSharding(mesh, P(ROWS))

    def shape(*after_rows, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((4, *after_rows), dtype, sharding=by_row)

    is_on, pairs_of_row = shape(row_len, dtype=bool), shape(causal_bound(num_blocks, 1), 2)
    rows = Rows(*[shape(row_len)] * 9)._replace(key_on=is_on, pairs=pairs_of_row)
    qkv = [shape(row_len, heads, 128, dtype=jnp.bfloat16) for heads in (4, 2, 2)]

    def total(q, k, v, rows):
        for how in (dict(window=1024, cap=50.0), dict()):
            packed = functools.partial(splash.packed, num_blocks=num_blocks, align=128, **how)
            q = packed(rows, scale=SCALE, interpret=False)(q, k, v, None)[0]
        return jnp.sum(q.astype(jnp.float32))

    with jax.set_mesh(mesh):
        jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*qkv, rows).compile()
