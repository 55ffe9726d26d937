"""The PyTorch release, number by number: tokens, masks, cuts, log-probabilities, trajectories.

Files in tests/data: released_tokens.json and released_trajectory_*.json were made by the released
computation in PyTorch; released_logps.json and released_tokenizer.json by the make_*.py there.
"""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import metric_lines
from helpers import data_config, encode_one, stopping, write
from loss_cases import PAIRS
from transformers import PreTrainedTokenizerFast

from nca_jax import build, precompute, programs, train
from nca_jax.batch import Rows
from nca_jax.checks import UserError
from nca_jax.data import chat, released
from nca_jax.data.pipeline import Dataset, eval_batches
from nca_jax.data.table import table_of
from nca_jax.flags import parse_flags
from nca_jax.logprobs import token_logps
from nca_jax.losses import LOSSES, targets_from_scores
from nca_jax.params import policy_params, start_params

DATA = Path(__file__).parent / "data"
TOKEN_CASES = json.loads((DATA / "released_tokens.json").read_text())["cases"]
IGNORED = -100  # the label of a token that is not scored

# Text, tokens and masks


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(
        tokenizer_file=str(DATA / "released_tokenizer.json"), eos_token="<|im_end|>"
    )


def text_row(messages: dict) -> dict:
    """A row of ours: each response is the released data's whole conversation."""
    conversations = [messages[f"A{k}"] for k in range(4)]
    return {
        "prompt": conversations[0][:1],
        "responses": conversations,
        "scores": [messages[f"score_A{k}"] for k in range(4)],
    }


@pytest.mark.parametrize("case", TOKEN_CASES)
def test_packed_rows_hold_the_released_ids_labels_and_masks(case, tokenizer):
    max_prompt_len, max_len = case["max_prompt_length"], case["max_length"]
    config = data_config(
        format="released",
        num_responses=4,
        batch_size=1,
        row_len=4096,
        max_prompt_len=max_prompt_len,
        max_response_len=max_len - max_prompt_len,
    )
    example = encode_one(text_row(case["messages"]), config, tokenizer, vocab_size=49152)
    examples = table_of([example])
    (heldout,) = eval_batches(examples, config)
    for batch in (Dataset([examples], config, seed=0).batch_at(0).batch, heldout.batch):
        row = Rows(*(x[0, 0] for x in batch.rows))
        for k, sequence in enumerate(case["sequences"]):
            at = np.flatnonzero((row.segments == 1) | (row.segments == k + 2))
            scored = row.logp_slot == k
            labels = np.full(len(at), IGNORED)
            labels[row.positions[row.logp_at[scored]] + 1] = row.logp_token[scored]
            assert row.positions[at].tolist() == list(range(len(at)))
            assert row.tokens[at].tolist() == sequence["input_ids"]
            assert row.key_on[at].tolist() == [bool(on) for on in sequence["attention_mask"]]
            assert labels.tolist() == sequence["labels"]


@pytest.mark.parametrize("case", TOKEN_CASES)
def test_text_and_conversation_are_the_released_text(case):
    for k, text in enumerate(case["text_responses"]):
        question, answer = case["messages"][f"A{k}"]
        assert released.prompt_text([question], "<|im_end|>") == case["text_prompt"]
        assert released.response_text([answer], "<|im_end|>") == text


def test_the_first_user_turn_alone_is_the_prompt_and_later_ones_go_to_the_response(tokenizer):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    turns = [{"role": role, "content": content} for role, content in turns]
    first = chat.encode_prompt("a", tokenizer, "released")
    assert chat.encode_prompt(turns[:3], tokenizer, "released") == first
    assert tokenizer.decode(first) == (
        "<|system|>\n<|im_end|>\n<|user|>\na<|im_end|>\n<|assistant|>\n"
    )
    (ids,), _ = chat.encode_responses("a", [turns], tokenizer, "released", ())
    assert tokenizer.decode(ids) == (
        "b<|im_end|>\n<|user|>\nc<|im_end|>\n<|assistant|>\nd<|im_end|>\n<|im_end|>"
    )
    system = {"role": "system", "content": "s"}
    assert released.prompt_text([system, turns[0]], "</s>").startswith(
        "<|system|>\ns</s>\n<|user|>"
    )


@pytest.mark.parametrize(
    ("prompt_len", "longest", "kept_of_prompt", "kept_of_response"),
    [
        (3, 9, 3, 9),  # fits: a response may be longer than max_response_len,
        (11, 1, 11, 1),  # and a prompt longer than max_prompt_len
        (12, 1, 4, 1),  # the prompt keeps its last 4; then it fits
        (9, 8, 4, 8),
        (9, 9, 4, 8),  # the prompt's last 4 and the longest response do not fit
        (3, 10, 3, 8),  # cut under a short prompt too
    ],
)
def test_what_is_cut_goes_by_prompt_and_longest_response_together(
    prompt_len, longest, kept_of_prompt, kept_of_response
):
    config = data_config(format="released", max_prompt_len=4, max_response_len=8)
    prompt, response = list(range(3, 3 + prompt_len)), list(range(3, 3 + longest))
    row = {"prompt_ids": prompt, "response_ids": [[3], response], "scores": [1, 0]}
    example = encode_one(row, config, eos_ids=(2,))
    assert example.group.prompt.tolist() == prompt[-kept_of_prompt:]
    assert example.group.responses[1].tolist() == response[:kept_of_response]
    assert example.group.responses[0].tolist() == [3]
    on_prompt, on_responses = example.group.key_on
    assert [len(on_prompt), *map(len, on_responses)] == [kept_of_prompt, 1, kept_of_response]


def test_an_eos_is_no_key_but_at_the_end_of_a_whole_response():
    config = data_config(format="released", max_prompt_len=2, max_response_len=2)
    row = {"prompt_ids": [2, 5, 2], "response_ids": [[6, 2], [2, 2, 7]], "scores": [1, 0]}
    on_prompt, on_responses = encode_one(row, config, eos_ids=(2,)).group.key_on
    assert on_prompt.tolist() == [True, False]
    assert [on.tolist() for on in on_responses] == [[True, True], [False, False]]


def test_other_formats_switch_no_key_off():
    row = {"prompt_ids": [2, 5], "response_ids": [[2, 2], [3]], "scores": [1, 0]}
    assert encode_one(row, data_config(), eos_ids=(2,)).group.key_on is None


def test_a_prompt_without_a_user_and_a_tokenizer_without_an_eos_are_refused(tokenizer):
    with pytest.raises(UserError, match="wants a user's message"):
        chat.encode_prompt([{"role": "assistant", "content": "a"}], tokenizer, "released")
    nameless = PreTrainedTokenizerFast(tokenizer_file=str(DATA / "released_tokenizer.json"))
    with pytest.raises(UserError, match="no eos token; released format needs one"):
        chat.encode_prompt("a", nameless, "released")


def test_the_released_format_wants_the_released_cuts():
    for flag, field in (("too_long=skip", "too_long"), ("prompt_keep=start", "prompt_keep")):
        with pytest.raises(UserError, match=rf"format='released' cuts .* config\.data\.{field}="):
            parse_flags(flags_of("rows.jsonl", f"--config.data.{flag}"))


# The bonus of the first response


def test_the_bonus_breaks_a_tie_for_the_first_response_and_leaves_other_scores():
    row = {"prompt_ids": [5], "response_ids": [[6], [7], [8]], "scores": [3, 3, 1]}
    scores = encode_one(row, data_config(first_bonus=0.01)).scores
    np.testing.assert_allclose(scores, [3.01, 3, 1], rtol=1e-7)
    for bonus, targets in ((0.01, [1, 0, 0]), (0.0, [0.5, 0.5, 0])):
        scores = encode_one(row, data_config(first_bonus=bonus)).scores
        p = targets_from_scores(jnp.asarray(scores)[None], alpha=1e-4)
        np.testing.assert_allclose(p[0], targets, atol=1e-7)


# Log-probabilities and trajectories, through the config that documents them


def flags_of(rows: str, *flags: str, algo="nca", alpha=1e-4, beta=0.1, steps=30, batch_size=4):
    """Returns the arguments of a command under configs/torch_parity.py."""
    model = DATA / "tiny_mistral"
    arg = f"model={model},rows={rows},algo={algo},beta={beta},steps={steps}"
    arg += f",alpha={alpha}" if "alpha" in LOSSES[algo].fields else ""
    return [
        "train",
        f"--config=configs/torch_parity.py:{arg},batch_size={batch_size},lr=1e-3",
        "--config.data.row_len=192",
        "--config.loss.logits_chunk=64",
        *flags,
    ]


def test_log_probabilities_with_keys_off_are_those_of_pytorch(tmp_path, use_devices):
    use_devices(0)
    golden = json.loads((DATA / "released_logps.json").read_text())
    rows = write(tmp_path / "rows.jsonl", golden)
    layout = ("--config.data.row_len=256", "--config.data.rows=2", "--config.data.num_responses=3")
    config, _ = parse_flags(flags_of(rows, *layout, batch_size=len(golden)))
    run = build.build(config)
    (examples,) = build.read_data(run).sources
    (host,) = eval_batches(examples, config.data)
    num_slots = len(golden) * 3
    with jax.set_mesh(run.mesh):
        params = start_params(run, config.model.init_from)
        compute = jax.jit(
            functools.partial(token_logps, run.model, num_slots=num_slots, block=64, chunk=128)
        )
        got = {slot: [] for slot in range(num_slots)}
        for m in range(int(host.batch.num_micro)):
            rows = Rows(*(x[m] for x in host.batch.rows))
            for slot, logp in zip(
                rows.logp_slot.flat, np.ravel(compute(params, rows)), strict=True
            ):
                got.get(int(slot), []).append(logp)
    for b, row in enumerate(golden):
        for k, expected in enumerate(row["logps"]):
            np.testing.assert_allclose(got[b * 3 + k], expected, rtol=0, atol=1e-5)


# The largest differences allowed: relative for loss, grad_norm and lr, nats for the others.
BOUNDS = {
    "loss": 2e-5,
    "grad_norm": 5e-4,
    "lr": 1e-5,
    "logps": 1e-3,
    "rewards": 1e-4,
    "margin": 1e-4,
    "accuracy": 1e-6,
    "final logps": 1e-3,
}


def golden_trajectory(algo: str) -> dict:
    return json.loads((DATA / f"released_trajectory_{algo}.json").read_text())[0]


def golden_flags(tmp_path: Path, golden: dict, *flags: str) -> list[str]:
    rows = [
        {"prompt_ids": row["prompt"], "response_ids": row["responses"], "scores": row["scores"]}
        for row in golden["rows"]
    ]
    how = {name: golden[name] for name in ("alpha", "beta", "steps", "batch_size")}
    path = write(tmp_path / "rows.jsonl", rows)
    return flags_of(path, *flags, algo=golden["loss_type"].lower(), **how)


def largest_differences(golden: dict, lines: list[dict]) -> dict[str, float]:
    """Returns {name: the largest difference over all steps}; those of a loss are relative."""
    found: dict[str, float] = {}
    for ours, theirs in zip(lines, golden["log"], strict=False):
        assert ours["step"] == theirs["step"] + 1
        pairs = [(name, ours[name], theirs[name]) for name in ("loss", "grad_norm", "lr")]
        pairs += [("margin", ours["margin"], theirs["rewards/margins"])]
        if theirs[
            "rewards/margins"
        ]:  # 0 as long as the policy is the reference, and the sign noise
            pairs += [("accuracy", ours["accuracy"], theirs["rewards/accuracies"])]
        for name in ("logps", "rewards"):
            pairs += [(name, ours[f"{name}/{k}"], theirs[f"{name}/A{k}"]) for k in range(4)]
        for name, a, b in pairs:
            unit = (b or 1.0) if name in ("loss", "grad_norm", "lr") else 1.0
            found[name] = max(found.get(name, 0.0), abs(a - b) / unit)
    return found


def final_logps(flags: list[str], workdir: Path) -> np.ndarray:
    """Returns the log-probabilities [B, K] of the last batch under the last checkpoint."""
    config, _ = parse_flags(flags)
    run = build.build(config)
    with jax.set_mesh(run.mesh):
        params = policy_params(run, str(workdir))
        dataset = Dataset(build.read_data(run).sources, config.data, seed=config.seed)
        batch = dataset.batch_at(config.steps - 1).batch
        return np.asarray(programs.jit_step_logps(run)(params, batch))


def check(found: dict[str, float]) -> None:
    print("largest differences:", {name: f"{x:.2g}" for name, x in found.items()})
    assert {name: x for name, x in found.items() if x > BOUNDS[name]} == {}


def mesh(data: int, fsdp: int, tensor: int) -> tuple[str, ...]:
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
    return tuple(f"--config.mesh.{axis}={size}" for axis, size in sizes.items())


IN_ORDER, PERMUTED = range(8), (5, 2, 7, 0, 3, 6, 1, 4)


@pytest.mark.parametrize(
    ("algo", "devices", "flags"),
    [
        pytest.param("nca", [0], (), id="nca, 1 device"),
        pytest.param(
            "infonca",
            PERMUTED,
            mesh(2, 2, 2),
            id="infonca, 8 devices permuted",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "nca",
            IN_ORDER,
            mesh(2, 2, 2),
            id="nca, 8",
            marks=(pytest.mark.slow, pytest.mark.long),
        ),
        pytest.param("infonca", [0], (), id="infonca, 1", marks=pytest.mark.slow),
    ],
)
def test_thirty_steps_equal_the_released_pytorch_trainer(
    tmp_path, use_devices, algo, devices, flags
):
    use_devices(*devices)
    golden = golden_trajectory(algo)
    flags = golden_flags(tmp_path, golden, *flags)
    train.main([*flags, f"--workdir={tmp_path / 'run'}"])
    lines = metric_lines(tmp_path / "run", "train")
    assert len(lines) == 30
    found = largest_differences(golden, lines)
    last = np.array(golden["final_logps_of_last_batch"])
    found["final logps"] = np.abs(final_logps(flags, tmp_path / "run") - last).max()
    check(found)


def train_some_steps(monkeypatch, num_steps: int, flags: list[str], workdir: Path) -> list[dict]:
    """Trains until a stop is asked for; returns the train lines."""
    steps = itertools.count(1)
    monkeypatch.setattr(train, "stop_asked", stopping(lambda: next(steps) >= num_steps))
    train.main([*flags, f"--workdir={workdir}"])
    return metric_lines(workdir, "train")


ONE_ROW = ("--config.data.rows=1",)
ONE_PROMPT = (*ONE_ROW, "--config.data.row_len=192", "--config.loss.logits_chunk=64")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "flags"),
    [
        pytest.param([0], ONE_ROW, id="micro-batches of one packed row"),
        pytest.param([0], ONE_PROMPT, id="micro-batches of one prompt"),
        pytest.param([0, 1], mesh(2, 1, 1), id="data 2"),
        pytest.param([0, 1], mesh(1, 2, 1), id="fsdp 2", marks=pytest.mark.long),
        pytest.param([0, 1], mesh(1, 1, 2), id="tensor 2", marks=pytest.mark.long),
    ],
)
def test_rows_and_meshes_leave_the_released_numbers(
    tmp_path, use_devices, monkeypatch, devices, flags
):
    use_devices(*devices)
    golden = golden_trajectory("nca")
    flags = golden_flags(tmp_path, golden, *flags)
    lines = train_some_steps(monkeypatch, 10, flags, tmp_path / "run")
    assert len(lines) == 10
    check(largest_differences(golden, lines))


@pytest.mark.slow
def test_a_cached_reference_and_one_prompt_a_micro_batch_leave_the_released_numbers(
    tmp_path, use_devices, monkeypatch
):
    use_devices(0)
    cached = ("--config.reference.kind=cached", f"--config.reference.cache={tmp_path / 'cache'}")
    golden = golden_trajectory("infonca")
    flags = golden_flags(tmp_path, golden, *cached, *ONE_PROMPT)
    precompute.main(flags)
    lines = train_some_steps(monkeypatch, 10, flags, tmp_path / "run")
    check(largest_differences(golden, lines))


@pytest.mark.parametrize("algo", PAIRS)
def test_a_pair_loss_has_hard_labels_in_which_the_first_of_a_tie_wins(algo):
    config, _ = parse_flags(flags_of("rows.jsonl", algo=algo))
    row = {"prompt_ids": [5], "response_ids": [[7, 2], [8, 2]], "scores": [1, 1]}
    scores = jnp.asarray(encode_one(row, config.data, eos_ids=(2,)).scores)[None]
    assert "alpha" not in config.loss
    assert targets_from_scores(scores, alpha=0.0).tolist() == [[1, 0]]
