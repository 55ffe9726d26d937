"""A reward model reads the last token of a conversation, scores any text, and is trained here."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from commands import metric_lines, write_records
from helpers import CONFIGS, data_config, encode_one, hf_json, make_encoder, read_all, write_hf
from test_logprobs import LAYOUT, make_groups, slots_of
from test_readme import IM_END, chat_tokenizer, write_chat_model

from nca_jax import evaluate, export, generate, logps, score, train
from nca_jax.batch import Rows
from nca_jax.checks import UserError
from nca_jax.data.group import Group
from nca_jax.data.pack import pack
from nca_jax.data.sources import RecordError
from nca_jax.data.whole import encode_whole, num_read, share_start
from nca_jax.flags import parse_flags
from nca_jax.model_config import MODELS
from nca_jax.models.decoder import Model
from nca_jax.models.formats import hf
from nca_jax.values import sequence_values

PROMPTS = ["Say a.", [{"role": "user", "content": "Say b."}]]


# Values


@pytest.mark.parametrize("align", [1, 8])
def test_a_value_is_the_head_at_the_last_token_of_prompt_and_response(align):
    model = Model(dataclasses.replace(MODELS["tiny"], num_labels=2))
    params = model.init(jax.random.key(0))
    assert not params["score"]["kernel"].any()  # at the start all are equal
    params["score"]["kernel"] = jax.random.normal(jax.random.key(1), (model.config.width, 2))
    groups = make_groups([(5, (7, 1, 12)), (1, (3, 3)), (9, (2, 40))], 0, 250)
    layout = dataclasses.replace(LAYOUT, align=align)
    packed, num_micro, _ = pack(groups, layout, slots=slots_of(groups), num_slots=9)
    rows = Rows(*(x[0] for x in packed))
    assert num_micro == 1
    found = jax.jit(lambda p: sequence_values(model, p, rows, shape=(3, 3), block=16))(params)

    @jax.jit
    def head_of(rows):
        return model.rows(params, rows, block=16) @ params["score"]["kernel"]

    def alone(ids):  # whole, and in a row by itself
        one = Group(ids[:-1], [ids[-1:]])
        packed, _, _ = pack([one], LAYOUT, slots=[[0]], num_slots=1)
        return head_of(Rows(*(x[0] for x in packed)))[0, len(ids) - 1, 0]

    for b, group in enumerate(groups):
        wanted = [alone(np.concatenate([group.prompt, ids])) for ids in group.responses]
        wanted += [0.0] * (3 - len(wanted))  # of a response that is not there
        np.testing.assert_allclose(found[b], wanted, rtol=0, atol=1e-5)


# Texts


def test_padding_at_the_end_is_not_read_and_one_token_always_is():
    assert [num_read(ids, 2) for ids in ([1, 2, 3], [1, 2, 3, 2, 2], [2, 2])] == [3, 3, 1]
    assert num_read([1, 2, 2], None) == 3


def test_conversations_share_what_they_begin_with_and_keep_a_token_each():
    ids = [np.array(x, np.int32) for x in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 5])]
    for chosen, prompt in ((ids, [1, 2]), (ids[:2], [1, 2]), (ids[:1], [1, 2])):
        (group,) = share_start(chosen)
        assert group.prompt.tolist() == prompt
        for whole, response in zip(chosen, group.responses, strict=True):
            np.testing.assert_array_equal(np.concatenate([group.prompt, response]), whole)
    apart = share_start([ids[0], np.array([7, 8], np.int32)])
    assert [group.prompt.tolist() for group in apart] == [[1, 2], [7]]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_students_example_is_the_conversation_that_the_scorer_reads(prompt):
    tokenizer = chat_tokenizer()
    for pad_id in (None, tokenizer("\n").input_ids[0], tokenizer.eos_token_id):
        config = data_config(format="chat", max_prompt_len=99, max_response_len=99)
        how = {"is_reward": True, "pad_id": pad_id, "eos_ids": (tokenizer.eos_token_id,)}
        record = {"prompt": prompt, "responses": ["one", "two", "it is three"], "scores": [1, 2, 3]}
        group = encode_one(record, config, tokenizer, **how).group
        texts = record["responses"]
        wholes = encode_whole(prompt, texts, tokenizer, vocab_size=999, pad_id=pad_id)
        for response, whole in zip(group.responses, wholes, strict=True):
            np.testing.assert_array_equal(np.concatenate([group.prompt, response]), whole)
        is_break_read = tokenizer.decode(wholes[0]).endswith(f"one{IM_END}\n")
        assert is_break_read == (pad_id != tokenizer("\n").input_ids[0])


def test_what_another_policy_sampled_is_read_as_text():
    tokenizer = chat_tokenizer()
    encoder = make_encoder(
        data_config(format="chat", max_prompt_len=99, max_response_len=99),
        tokenizer,
        eos_ids=(tokenizer.eos_token_id,),
        is_reward=True,
        digest="mine",
    )
    record = {"prompt": "Say a.", "responses": ["one", "two", "three"], "scores": [1, 2, 3]}
    sampled = {"prompt_ids": [1], "response_ids": [[1]] * 3, "finished": [False] * 3}
    found = encoder.record("f:1", record | sampled | {"tokenizer": "mine"}).group
    again = encoder.record("f:1", record).group
    for one, other in zip(found.responses, again.responses, strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_a_template_prompts_are_texts():
    tokenizer = chat_tokenizer(template=None)
    (ids,) = encode_whole("Say a.", [" b"], tokenizer, vocab_size=999, pad_id=None)
    assert tokenizer.decode(ids) == "Say a. b"
    with pytest.raises(RecordError, match="no chat template; give prompts of text"):
        encode_whole(PROMPTS[1], ["b"], tokenizer, vocab_size=999, pad_id=None)
    with pytest.raises(RecordError, match="wanted two or more below 40"):
        encode_whole("Say a.", ["b"], tokenizer, vocab_size=40, pad_id=None)


# Folders


@pytest.mark.parametrize(
    ("change", "labels", "pad_id"),
    [
        ({"architectures": ["LlamaForCausalLM"], "pad_token_id": 3}, 0, 3),
        ({"architectures": ["LlamaForSequenceClassification"]}, 2, None),
        ({"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}, 1, None),
        (
            {
                "architectures": ["LlamaForSequenceClassification"],
                "id2label": {"0": "helpful", "1": "honest", "2": "short"},
                "pad_token_id": 2,
            },
            3,
            2,
        ),
        ({"architectures": ["LlamaRewardModel"], "pad_token_id": 2}, 1, None),
        ({"architectures": ["EurusRewardModel"]}, 1, None),
    ],
)
def test_config_json_says_how_many_labels_there_are_and_what_is_not_read(change, labels, pad_id):
    config = hf.parse_config(hf_json("llama", CONFIGS["llama"]) | change, {})
    assert (config.num_labels, config.pad_id) == (labels, pad_id)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("EurusRewardModel", "regression_head"), ("MistralForSequenceClassification", "score")],
)
def test_the_head_of_a_folder_is_read_by_its_own_name(tmp_path, architecture, name):
    head = np.arange(CONFIGS["mistral"].width, dtype=np.float32)[None]
    change = {"architectures": [architecture], "num_labels": 1}
    more = {f"{name}.weight": head}
    write_hf(tmp_path, "mistral", change=change, extra=more, drop=("lm_head.weight",))
    found = read_all(hf.open_hf(tmp_path)[1])
    np.testing.assert_array_equal(found["score/kernel"], head.T)
    assert "head/kernel" not in found
    (tmp_path / "other").mkdir()
    write_hf(tmp_path / "other", "mistral", change=change)  # the head of a policy
    with pytest.raises(UserError, match=rf"1 missing: {name}.weight; 1 unexpected: lm_head.weight"):
        hf.open_hf(tmp_path / "other")


# Configs


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("algo=simpo",), "'simpo' is of log-probabilities"),
        (("algo=likelihood",), "'likelihood' is of log-probabilities"),
        (("--config.loss.nll_weight=1",), "nll_weight and length_normalised"),
        (("algo=ipo", "--config.loss.length_normalised=True"), "nll_weight and length_normalised"),
        (("--config.reference.kind=live",), "has no reference"),
        (("--config.lora.rank=4",), "leave config.lora out"),
        (("--config.data.format=released",), "reads prompt and response as one text"),
    ],
)
def test_what_a_reward_model_has_not_is_refused(flags, said):
    args = ["files=x", "model=tiny", *(x for x in flags if x.startswith("algo"))]
    overrides = [flag for flag in flags if flag.startswith("--")]
    with pytest.raises(UserError, match=said):
        parse_flags(["x", f"--config=configs/reward_model.py:{','.join(args)}", *overrides])


# Commands


def run_score(tmp_path, scorer: str, *flags: str, name: str = "scored") -> list[list[float]]:
    out = tmp_path / f"{name}.jsonl"
    rows = f"--rows={tmp_path / 'rows.jsonl'}"
    score.main(["score", rows, f"--out={out}", f"--scorer={scorer}", *flags])
    return [json.loads(line)["scores"] for line in out.read_text().splitlines()]


def write_rows(path, num_rows: int = 3) -> list[dict]:
    records = [
        {"prompt": f"Say {n}.", "responses": ["one", f"{n} and more", ""][: 2 + n % 2]}
        for n in range(num_rows)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def test_score_gives_each_label_its_scores_in_rows_of_any_length(tmp_path):
    write_rows(tmp_path / "rows.jsonl")
    write_chat_model(tmp_path / "rm", num_labels=2)
    scorer = f"reward_model:{tmp_path / 'rm'}"
    first = run_score(tmp_path, f"{scorer}:label=0", "--row_len=64", name="first")
    second = run_score(tmp_path, f"{scorer}:label=1", "--row_len=128", name="second")
    again = run_score(tmp_path, f"{scorer}:label=1", "--row_len=64", name="again")
    assert [len(scores) for scores in first] == [2, 3, 2]
    np.testing.assert_allclose(np.concatenate(second), np.concatenate(again), atol=2e-6)
    assert np.abs(np.concatenate(first) - np.concatenate(second)).min() > 1e-4
    assert np.ptp(np.concatenate(first)) > 1e-4
    for flags, said in (
        (("", "--row_len=64"), "has 2 labels: write reward_model:.*:label=I with I from 0 to 1"),
        ((":label=2", "--row_len=64"), "has 2 labels"),
        ((":label=0", "--row_len=32"), r"takes \d+ tokens, and --row_len is 32"),
        ((":label=0", "--dtype=float16"), "--dtype must be one of float32, bfloat16"),
    ):
        with pytest.raises(UserError, match=said):
            run_score(tmp_path, scorer + flags[0], *flags[1:], name="none")


def test_a_policy_is_no_scorer_and_a_reward_model_no_policy(tmp_path):
    write_rows(tmp_path / "rows.jsonl")
    write_chat_model(tmp_path / "policy")
    with pytest.raises(UserError, match="policy is a policy, not a reward model"):
        run_score(tmp_path, f"reward_model:{tmp_path / 'policy'}")
    with pytest.raises(UserError, match="--row_len are of a reward model"):
        run_score(tmp_path, "length", "--row_len=64")
    with pytest.raises(UserError, match="names no model"):
        run_score(tmp_path, "reward_model:")
    write_chat_model(tmp_path / "rm", num_labels=1)
    records = write_records(tmp_path / "records.jsonl")
    arg = f"files={records},init_from={tmp_path / 'rm'}"
    with pytest.raises(UserError, match=r"is a reward model, which writes nothing: name it as a"):
        train.main(["train", f"--config=configs/jsonl.py:{arg}", f"--workdir={tmp_path / 'run'}"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a folder with policy, rows.jsonl, and run: a reward model that likes suns."""
    folder = tmp_path_factory.mktemp("trained")
    write_chat_model(folder / "policy")
    words = ["sun", "moon", "river", "stone", "cloud", "ember"]
    with open(folder / "rows.jsonl", "w") as file:
        for n in range(48):
            texts = [" ".join(words[(n * i + j) % 6 * (j > i)] for j in range(4)) for i in range(4)]
            scores = [text.count("sun") / 4 for text in texts]
            record = {"prompt": f"Say {n}.", "responses": texts, "scores": scores}
            file.write(json.dumps(record) + "\n")
    train_reward_model(folder, folder / "policy", folder / "run")
    return folder


def train_reward_model(folder, start, workdir) -> None:
    flags = ("data.eval_fraction=0.2", "data.batch_size=8", "data.row_len=512", "eval_every=20")
    flags += ("steps=20", "epochs=0", "optim.lr=2e-3", "log.tensorboard=False", "data.block=64")
    arg = f"files={folder / 'rows.jsonl'},init_from={start}"
    train.main(
        ["train", f"--config=configs/reward_model.py:{arg}", f"--workdir={workdir}"]
        + [f"--config.{flag}" for flag in flags]
    )


@pytest.mark.slow
def test_a_reward_model_learns_and_scores_the_next_run_as_it_did_here(trained, tmp_path):
    first, *_ = metric_lines(trained / "run", "train")
    assert first["loss"] == pytest.approx(np.log(4), abs=1e-5)  # nobody is preferred
    assert not {"perplexity", "logps/0", "start_loss"} & first.keys()
    before, *_, after = metric_lines(trained / "run", "eval")
    assert before["accuracy_half_ties"] == 0.5
    assert after["accuracy_half_ties"] > 0.8 and after["rewards/0"] > after["rewards/3"]

    export.main(["export", f"--workdir={trained / 'run'}", f"--out={tmp_path / 'rm'}"])
    logps.main(["logps", f"--workdir={trained / 'run'}", f"--out={tmp_path / 'logps.jsonl'}"])
    lines = [json.loads(line) for line in (tmp_path / "logps.jsonl").read_text().splitlines()]
    here = {int(line["where"].rpartition(":")[2]): line["logps"] for line in lines}
    shutil.copy(trained / "rows.jsonl", tmp_path)
    scored = run_score(tmp_path, f"reward_model:{tmp_path / 'rm'}")
    wanted = [here[n] for n in range(1, 49)]
    np.testing.assert_allclose(scored, wanted, rtol=0, atol=1e-4)

    small = ("max_new_tokens=4", "num_samples=2", f"scorer=reward_model:{tmp_path / 'rm'}")
    generate.main(
        ["generate", f"--config=configs/jsonl.py:files=x,init_from={trained / 'policy'}"]
        + [f"--prompts={tmp_path / 'rows.jsonl'}", f"--out={tmp_path / 'sampled.jsonl'}"]
        + [f"--config.generate.{flag}" for flag in small]
    )
    sampled = [json.loads(x) for x in (tmp_path / "sampled.jsonl").read_text().splitlines()]
    assert len(sampled) == 48 and all(len(record["scores"]) == 2 for record in sampled)


@pytest.mark.slow
@pytest.mark.long
def test_a_reward_model_is_evaluated_and_another_run_goes_on_from_it(trained, tmp_path):
    *_, after = metric_lines(trained / "run", "eval")
    evaluate.main(["evaluate", f"--workdir={trained / 'run'}", f"--out={tmp_path / 'found.json'}"])
    metrics = json.loads((tmp_path / "found.json").read_text())["metrics"]
    assert metrics["accuracy_half_ties"] == pytest.approx(after["accuracy_half_ties"])
    assert not {"kl", "length"} & metrics.keys()
    export.main(["export", f"--workdir={trained / 'run'}", f"--out={tmp_path / 'rm'}"])
    train_reward_model(trained, tmp_path / "rm", tmp_path / "more")
    assert metric_lines(tmp_path / "more", "eval")[0]["loss"] == pytest.approx(after["loss"], 1e-3)
