"""Splash attention equals attention over block pairs, in value and gradient, by interpretation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_logprobs import make_groups, slots_of

from nca_jax.batch import Rows
from nca_jax.checks import UserError
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


def make_rows() -> Rows:
    """Two rows, several prompts in each, with keys that are off here and there; [R, ...]."""
    groups = make_groups(LENGTHS, seed=0, vocab_size=100)
    packed, num_micro, _ = pack(groups, LAYOUT, slots=slots_of(groups), num_slots=len(groups) * 3)
    assert num_micro == 1
    rows = Rows(*(jnp.asarray(x[0]) for x in packed))
    is_off = (np.arange(ROW_LEN) % 11 == 5)[None] & (np.asarray(rows.positions) > 0)
    return rows._replace(key_on=rows.key_on & ~is_off)


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


PLAN = dict(num_blocks=ROW_LEN // BLOCK, scale=64**-0.5)
PAIRS = functools.partial(pairs.packed, **PLAN)
SPLASH = functools.partial(splash.packed, **PLAN, align=ALIGN, interpret=True)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_splash_equals_block_pairs_in_value_and_gradient():
    rows, qkv = make_rows(), make_qkv()
    assert_same(value_and_grads(SPLASH, rows, *qkv), value_and_grads(PAIRS, rows, *qkv))


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
    [(1024, 1, True), (2048, 1, False), (4096, 8, True), (8192, 8, False), (8192, 16, True)],
)
def test_codes_say_how_long_rows_may_be(row_len, align, fits):
    assert (splash.Code.of(row_len, align) is not None) == fits


def test_every_code_allows_exactly_what_the_row_layout_allows():
    rows = make_rows()
    code = splash.Code.of(ROW_LEN, ALIGN)
    codes = jax.vmap(lambda rows: splash._codes(rows, code))(rows)
    r = jax.tree.map(np.asarray, rows)
    place = np.arange(ROW_LEN)
    for row in range(2):
        allowed = code.allows(np.asarray(codes[row])[:, None], place[None])
        allowed &= r.prompt_ids[row][:, None] == r.prompt_ids[row][None]
        own = r.segments[row][:, None] == r.segments[row][None]
        wanted = (place[None] <= place[:, None]) & (own | (r.segments[row][None] == 1))
        wanted &= r.prompt_ids[row][:, None] == r.prompt_ids[row][None]
        real = r.segments[row] > 0
        np.testing.assert_array_equal(allowed[real][:, real], wanted[real][:, real])


def test_next_live_is_the_next_pair_in_order_and_wraps():
    live = jnp.asarray([[1, 0, 0], [0, 1, 0], [1, 0, 0]], bool)
    np.testing.assert_array_equal(splash._next_live(live), [[0, 1, 1], [1, 1, 0], [0, 0, 0]])
