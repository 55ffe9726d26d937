"""Beside PyTorch itself: models that transformers made, and what it reads of our export."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from families import (  # noqa: E402  (torch may not be there)
    DISTINCT,
    FAMILIES,
    GOLDEN,
    NUM_SLOTS,
    SIZES,
    VOCAB,
    families,
    greedy,
    packed_logits,
    packed_rows,
    pieces,
    read_params,
    write_family,
)
from make_families import load, torch_greedy, torch_logits  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from nca_jax import export, train  # noqa: E402
from nca_jax.axes import flatten_paths  # noqa: E402
from nca_jax.logprobs import sequence_logps  # noqa: E402
from nca_jax.model_config import Rope, RopeScaling  # noqa: E402
from nca_jax.models.families.rope import read_rope  # noqa: E402
from nca_jax.models.formats.hf import open_hf  # noqa: E402
from nca_jax.models.formats.hf_export import write_hf  # noqa: E402
from nca_jax.models.rope import rotary_frequencies  # noqa: E402

pytestmark = pytest.mark.torch
DATA = Path(__file__).parent / "data"


def made_by_transformers(name: str):
    """Returns a random model of a family; biases and norms are random too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SIZES | FAMILIES[name], initializer_range=0.25)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def assert_same_tensors(folder: Path, other: Path) -> None:
    found, wanted = (
        {name: x for file in one.glob("*.safetensors") for name, x in load_file(file).items()}
        for one in (folder, other)
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("name", families(but=DISTINCT, mark="long"))
def test_a_model_that_transformers_saved_in_shards_gives_its_logits_and_comes_back(tmp_path, name):
    theirs = made_by_transformers(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model, params = read_params(tmp_path / "theirs")
    logits, tokens = torch_logits(theirs), torch_greedy(theirs)
    found = packed_logits(model, params)
    print(f"{name}: logits differ by {np.abs(found - logits).max():.1e}")
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(greedy(model, params), tokens)

    # With the first config.json kept, and with ours alone.
    for origin in (tmp_path / "theirs", None):
        out = tmp_path / f"ours, origin {origin is not None}"
        write_hf(out, *open_hf(tmp_path / "theirs"), origin=origin, shard_bytes=20_000)
        assert_same_tensors(out, tmp_path / "theirs")
        again = load(out)
        # By where a tensor lies in memory, PyTorch sums in another order.
        np.testing.assert_allclose(torch_logits(again), logits, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(torch_greedy(again), tokens)


LR, NUM_STEPS = 1e-2, 3
WEIGHTS = np.random.default_rng(1).normal(size=NUM_SLOTS).astype(np.float32)


def torch_step(model) -> float:
    """One step of plain gradient descent on the weighted log-probabilities of all responses."""
    logps = []
    for prompt, responses, *_ in pieces():
        for response in responses:
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            logp = torch.log_softmax(logits, dim=-1)[range(len(response)), response]
            logps.append(logp.sum())
    loss = -(torch.tensor(WEIGHTS) * torch.stack(logps)).sum()
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LR * parameter.grad
    return loss.item()


@pytest.mark.parametrize("name", families(but=("gemma2", "phi3 with longrope"), mark="long"))
def test_gradients_and_three_steps_of_training_are_pytorchs(tmp_path, name):
    theirs = made_by_transformers(name)
    theirs.save_pretrained(tmp_path / "0")
    model, params = read_params(tmp_path / "0")
    rows = packed_rows()

    @jax.jit
    def step(params):
        def loss(params):
            logps = sequence_logps(model, params, rows, shape=(NUM_SLOTS, 1), block=16, chunk=16)[
                :, 0
            ]
            return -jnp.sum(WEIGHTS * logps)

        found, grads = jax.value_and_grad(loss)(params)
        return found, jax.tree.map(lambda p, g: p - LR * g, params, grads)

    start = params
    for i in range(1, NUM_STEPS + 1):
        found, params = step(params)
        np.testing.assert_allclose(found, torch_step(theirs), rtol=1e-5, atol=1e-4)
        theirs.save_pretrained(tmp_path / str(i))
        expected = read_params(tmp_path / str(i))[1]
        # After the first step they moved by the gradient.
        for (path, ours), wanted, before in zip(
            flatten_paths(params).items(), *map(jax.tree.leaves, (expected, start)), strict=True
        ):
            moved = np.abs(wanted - before).max()
            assert moved > 1e-6, path
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-3 * moved, err_msg=path)


def test_bfloat16_files_are_read_as_transformers_reads_them_and_written_as_it_does(tmp_path):
    theirs = made_by_transformers("qwen2").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    found = packed_logits(*read_params(tmp_path / "theirs"))
    np.testing.assert_allclose(found, torch_logits(load(tmp_path / "theirs")), rtol=0, atol=1e-4)

    write_hf(tmp_path / "ours", *open_hf(tmp_path / "theirs"), dtype="bfloat16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == torch.bfloat16
    for (name, ours), value in zip(again.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, value), name


def test_a_tied_head_that_is_stored_all_the_same_changes_nothing(tmp_path):
    write_family(tmp_path, "smollm2")
    before = packed_logits(*read_params(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    stored = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(packed_logits(*read_params(tmp_path)), before)
    found = torch_logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    np.testing.assert_allclose(before, found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_golden_file_is_what_pytorch_gives_today(tmp_path, name):
    model = load(write_family(tmp_path, name))
    with np.load(GOLDEN) as golden:
        np.testing.assert_allclose(torch_logits(model), golden[f"{name}/logits"], atol=2e-5)
        np.testing.assert_array_equal(torch_greedy(model), golden[f"{name}/greedy"])


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
def test_rotary_frequencies_are_pytorchs_to_the_last_digits(theta, head_dim, factor):
    rope, scaling = {"rope_type": "default"}, None
    if factor:
        scaling = RopeScaling(factor, 1.0, 4.0, 8192)
        rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    theirs = AutoConfig.for_model(
        "llama", hidden_size=4 * head_dim, num_attention_heads=4, rope_theta=theta,
        rope_scaling=rope, max_position_embeddings=131072,
    )  # fmt: skip
    if factor:
        expected = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")[0].numpy()
    else:
        expected = (1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)).numpy()
    found = rotary_frequencies(Rope(theta, scaling), head_dim)
    # Where Llama 3 blends two frequencies, their differences cancel digits.
    np.testing.assert_array_max_ulp(found, expected, maxulp=8 if factor else 1)
    assert np.mean(found == expected) > 0.9


SCALED = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "yarn": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192,
        "beta_fast": 32, "beta_slow": 1,
    },
    "yarn of another factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
        "attention_factor": 0.7, "beta_fast": 16.5, "beta_slow": 2.0,
    },
    "yarn within a turn": {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4,
    },
    "longrope": {
        "rope_type": "longrope", "original_max_position_embeddings": 4096,
        "short_factor": np.linspace(1, 2, 48).tolist(),
        "long_factor": np.geomspace(1, 60, 48).tolist(),
    },
}  # fmt: skip


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_and_their_factor_are_pytorchs_to_the_last_digits(name, theta):
    raw = {
        "hidden_size": 384, "num_attention_heads": 4, "max_position_embeddings": 131072,
        "rope_theta": theta, "head_dim": 96,
    }  # fmt: skip
    theirs = AutoConfig.for_model("llama", **raw, rope_scaling=dict(SCALED[name]))
    rope, by_length = read_rope(raw, SCALED[name]), ROPE_INIT_FUNCTIONS[SCALED[name]["rope_type"]]
    found = np.atleast_2d(rotary_frequencies(rope, 96))
    for freqs, length in zip(found, (None, 4097), strict=False):
        expected, factor = by_length(theirs, "cpu", seq_len=length)
        np.testing.assert_array_max_ulp(freqs, expected.numpy(), maxulp=2)
        assert np.mean(freqs == expected.numpy()) > 0.9
        assert getattr(rope.scaling, "attention_factor", 1.0) == pytest.approx(factor, rel=1e-12)


def test_transformers_gives_the_logits_of_a_policy_that_was_trained_and_exported(tmp_path):
    rng = np.random.default_rng(0)
    with open(tmp_path / "rows.jsonl", "w") as file:
        for _ in range(8):
            ids = {"prompt_ids": rng.integers(3, 257, 6).tolist()}
            ids["response_ids"] = [rng.integers(3, 257, 5).tolist() for _ in range(4)]
            file.write(json.dumps(ids | {"scores": [0.1, 0.9, 0.3, 0.5]}) + "\n")
    rows, start = tmp_path / "rows.jsonl", DATA / "tiny_mistral"
    flags = ("data.tokenizer=none", "data.rows=8", "data.row_len=64", "loss.logits_chunk=64",
             "data.block=16", "data.max_prompt_len=8", "data.max_response_len=8", "steps=2",
             "epochs=0", "eval_every=0", "data.eval_fraction=0", "data.batch_size=4",
             "optim.lr=1e-2", "log.tensorboard=False")  # fmt: skip
    train.main(
        ["train", f"--config=configs/jsonl.py:files={rows},init_from={start},k=4"]
        + [f"--workdir={tmp_path / 'run'}"]
        + [f"--config.{flag}" for flag in flags]
    )
    export.main(["export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'hf'}"])

    theirs = torch_logits(load(tmp_path / "hf"))[:, :VOCAB]
    np.testing.assert_allclose(
        packed_logits(*read_params(tmp_path / "hf")), theirs, rtol=0, atol=1e-4
    )
    before = torch_logits(load(start))[:, :VOCAB]
    assert np.abs(theirs - before).max() > 0.1  # it was trained
