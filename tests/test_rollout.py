"""The sampling loop: what is sampled is what is written, scored and trained on."""

import json

import jax
import numpy as np
import pytest
from commands import write_records

from nca_jax import build, evaluate, generate, score
from nca_jax.checks import UserError
from nca_jax.data.encode import Prompt
from nca_jax.data.load import load_examples, load_prompts
from nca_jax.data.sources import write_records as write_lines
from nca_jax.flags import parse_flags
from nca_jax.infra.fingerprint import tokenizer_fingerprint
from nca_jax.params import start_params
from nca_jax.rewards.scorers import Scorer, get_scorer
from nca_jax.rollout import make_generator, make_records, rollout

EOS = 1  # of the byte tokenizer, whose other ids are bytes + 3


def run_of(*flags: str) -> build.Run:
    small = ("--config.generate.num_samples=2", "--config.generate.max_new_tokens=3")
    argv = ["x", "--config=configs/jsonl.py:files=none,smoke", "--config.data.rows=8"]
    return build.build(parse_flags([*argv, *small, *flags])[0])


@pytest.fixture(scope="module")
def run() -> build.Run:
    return run_of()


@pytest.fixture(scope="module")
def params(run) -> dict:
    with jax.set_mesh(run.mesh):
        return start_params(run, "")


def prompts_file(path, *records: dict) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def ids_of(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def words(records, responses) -> np.ndarray:
    """A scorer that wants everything of a record that the data gave."""
    assert all(record["prompt"] == [{"role": "user", "content": "a"}] for record in records)
    pairs = zip(records, responses, strict=True)
    return np.array([record["answer"] + len(text) for record, text in pairs])


# Records


def test_a_record_of_samples_has_their_ids_and_says_which_ended(run):
    prompt = Prompt("f:1", np.array(ids_of("a"), np.int32), {"prompt": "a", "answer": 3})
    samples = [[np.array([*ids_of("bc"), EOS]), np.array(ids_of("def")), np.array([EOS])]]
    (record,) = make_records(run, [prompt], samples, get_scorer("length"))
    assert record == {
        "prompt": "a",
        "answer": 3,
        "responses": ["bc", "def", ""],
        "prompt_ids": ids_of("a"),
        "response_ids": [[*ids_of("bc"), EOS], ids_of("def"), [EOS]],
        "finished": [True, False, True],
        "tokenizer": tokenizer_fingerprint(run.tokenizer),
        "scores": [1.0, 1.0, 0.0],
    }


def test_what_was_cut_at_the_stop_string_is_trained_on_as_its_text(tmp_path):
    run = run_of("--config.generate.stop=\n")
    prompt = Prompt("f:1", np.array(ids_of("a"), np.int32), {"prompt": "a"})
    samples = [[np.array(ids_of("b\nc")), np.array(ids_of("de"))]]
    records = make_records(run, [prompt], samples, get_scorer("length"))
    assert records[0]["responses"] == ["b", "de"] and records[0]["finished"] == [True, False]
    assert records[0]["response_ids"] == [None, ids_of("de")]
    write_lines(tmp_path / "out.jsonl", records)
    ((example,),), counts = load_examples(str(tmp_path / "out.jsonl"), run.encoder)
    assert [x.tolist() for x in example.group.responses] == [[*ids_of("b"), EOS], ids_of("de")]
    assert not counts


def test_train_reads_of_a_rollout_the_very_ids_that_were_sampled(run, params, tmp_path):
    file = prompts_file(tmp_path / "p.jsonl", {"prompt": "Say"}, {"prompt": "Do", "answer": 1})
    prompts, _ = load_prompts(file, run.encoder)
    with jax.set_mesh(run.mesh):
        records = rollout(run, params, prompts, get_scorer("length"), seed=0)
        samples = make_generator(run)(params, [prompt.ids for prompt in prompts], 0)
    write_lines(tmp_path / "out.jsonl", records)
    (examples,), counts = load_examples(str(tmp_path / "out.jsonl"), run.encoder)
    assert not counts and len(examples) == 2
    for example, prompt, of_prompt in zip(examples, prompts, samples, strict=True):
        assert example.group.prompt.tolist() == prompt.ids.tolist()
        assert [x.tolist() for x in example.group.responses] == [x.tolist() for x in of_prompt]
        assert example.record == prompt.record
    # Bytes at random are no text: read by their text, they would be other ids.
    texts = [ids_of(text) for record in records for text in record["responses"]]
    sampled = [ids for record in records for ids in record["response_ids"]]
    assert any(ids not in (text, [*text, EOS]) for ids, text in zip(sampled, texts, strict=True))


def test_a_prompts_samples_depend_on_its_index_and_the_seed_alone(run, params):
    prompts = [ids_of(text) for text in ("a", "bcd", "ef", "g")] * 3
    few = run_of("--config.generate.batch_size=1")  # of which each device has one
    generate, generate_few = make_generator(run), make_generator(few)

    def samples(generate, prompts, seed) -> list:
        with jax.set_mesh(run.mesh):
            drawn = generate(params, prompts, seed)
        return [[ids.tolist() for ids in of_prompt] for of_prompt in drawn]

    found = samples(generate, prompts, seed=5)
    wider = [*prompts[:-1], ids_of("h" * 20)]  # more slots for every prompt
    assert samples(generate_few, wider, seed=5)[:-1] == found[:-1]
    assert found[:4] != found[4:8] and samples(generate, prompts, seed=6) != found


# Commands


@pytest.fixture
def config(tmp_path) -> tuple[str, ...]:
    rows = write_records(tmp_path / "rows.jsonl")
    return (f"--config=configs/jsonl.py:files={rows},smoke", "--config.data.rows=8")


@pytest.fixture
def no_weights(monkeypatch):
    """Fails where a command opens weights."""

    def opened(*_):
        pytest.fail("weights are opened before the input is checked")

    monkeypatch.setattr(generate, "policy_params", opened)
    monkeypatch.setattr(evaluate, "policy_params", opened)


@pytest.mark.parametrize(
    ("record", "flags", "said"),
    [
        ({"prompt": 7}, (), "wanted a prompt of text or messages"),
        ({"prompt": ""}, (), "the prompt is empty"),
        ({"prompt": "a" * 9}, ("--config.data.too_long=stop",), "has 9 tokens where data.max_pro"),
        ({"prompt": "b"}, ("--config.generate.scorer=answer",), 'the scorer wants an "answ'),
    ],
)
def test_generate_names_the_line_of_a_bad_prompt_before_it_opens_weights(
    record, flags, said, config, no_weights, tmp_path
):
    file = prompts_file(tmp_path / "p.jsonl", {"prompt": "a", "answer": 1}, record)
    out = f"--out={tmp_path / 'out.jsonl'}"
    limit = "--config.data.max_prompt_len=8"
    with pytest.raises(UserError) as error:
        generate.main(["generate", *config, limit, *flags, f"--prompts={file}", out])
    assert str(error.value).startswith(f"{file}:2: {said}")


@pytest.mark.parametrize("command", ["generate", "score"])
def test_a_place_that_cannot_be_written_is_refused_before_work_and_a_folder_is_made(
    command, config, no_weights, tmp_path, monkeypatch
):
    records = prompts_file(tmp_path / "p.jsonl", {"prompt": "a", "responses": ["b"]})
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(score, "score_each", lambda *_: pytest.fail("scored before it is checked"))

    def main(out) -> None:
        if command == "generate":
            generate.main(["generate", *config, f"--prompts={records}", f"--out={out}"])
        score.main(["score", f"--rows={records}", f"--out={out}", "--scorer=length"])

    with pytest.raises(UserError, match="file/out.jsonl: its folder cannot be made"):
        main(tmp_path / "file" / "out.jsonl")
    with pytest.raises(UserError, match="a file cannot be written there"):
        main(tmp_path)


def test_score_keeps_how_samples_ended_and_makes_the_folder_of_its_output(tmp_path):
    record = {
        "prompt": "a",
        "answer": 4,
        "responses": ["4", "5"],
        "prompt_ids": [3],
        "response_ids": [[4, EOS], [5]],
        "finished": [True, False],
        "tokenizer": "x",
    }
    out = tmp_path / "new" / "out.jsonl"
    rows = prompts_file(tmp_path / "p.jsonl", record)
    score.main(["score", f"--rows={rows}", f"--out={out}", "--scorer=answer"])
    assert json.loads(out.read_text()) == record | {"scores": [1.0, 0.0]}


def test_evaluate_finds_a_missing_answer_before_it_opens_weights(config, no_weights, tmp_path):
    flags = ("--config.data.eval_fraction=0.5", "--judge=answer", f"--out={tmp_path / 'e.json'}")
    with pytest.raises(UserError, match=r'rows\.jsonl:\d+: the scorer wants an "answer"'):
        evaluate.main(["evaluate", *config, *flags])


def test_evaluate_gives_a_scorer_the_whole_record(run, monkeypatch, capsys):
    turns = [{"role": "user", "content": "a"}]
    record = {"prompt": turns, "responses": ["x", "y"], "scores": [1, 0], "answer": 10}
    run = run_of("--config.generate.temperature=0.5")  # no KL
    chat = "{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(run.tokenizer, "chat_template", chat)
    run.config.unlock()
    run.config.data.format = "chat"
    heldout = [run.encoder.record("f:1", record)]
    drawn = [[np.array([*ids_of("bc"), EOS]), np.array(ids_of("def"))]]
    monkeypatch.setattr(evaluate, "make_generator", lambda run: lambda *_: drawn)
    scorers = {"reward": Scorer(words), "judge": None}
    metrics, by_prompt, told = evaluate.sample_metrics(run, {}, {}, heldout, scorers)
    assert by_prompt["reward"] == by_prompt["reward_reference"] == [12.5]
    assert metrics["reward"] == metrics["reward_reference"] == 12.5
    assert metrics["reward_difference"] == 0 and "reward_difference_se" not in metrics
    assert told == [
        {"prompt": turns, "policy": ["bc", "def"], "policy_scores": [12.0, 13.0]}
        | {"reference": ["bc", "def"], "reference_scores": [12.0, 13.0]}
    ]


def test_the_interval_of_a_held_out_set_with_a_name_goes_by_its_own_prompts(
    config, tmp_path, monkeypatch, capsys
):
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    for name, few in (("a", lines[:3]), ("b", lines[3:8])):
        (tmp_path / f"{name}.jsonl").write_text("".join(few))
    for part in ("policy_params", "reference_params", "heldout_responses"):
        monkeypatch.setattr(evaluate, part, lambda *_: None)
    monkeypatch.setattr(evaluate, "fill_reference", lambda logps, params, batches: batches)
    monkeypatch.setattr(evaluate, "metrics_of", lambda *_: {"loss": 1.0})
    monkeypatch.setattr(evaluate, "values_of", lambda *_: {})
    monkeypatch.setattr(evaluate, "errors_of", lambda *_: {"loss_se": 0.1})
    sets = f"--config.data.eval_files=a={tmp_path}/a.jsonl,b={tmp_path}/b.jsonl"
    sets = (sets, "--config.data.eval_fraction=0")
    evaluate.main(["evaluate", *config, *sets, "--num_prompts=0", f"--out={tmp_path}/e.json"])
    said = capsys.readouterr().out.split("the responses in the data to ")[1:]
    assert [one.splitlines()[0] for one in said] == ["3 held-out prompts", "5 held-out prompts"]
    assert "a/loss" in said[0] and "0.5697 to 1.4303" in said[0]  # t of 2 degrees is 4.303
    assert "b/loss" in said[1] and "0.7224 to 1.2776" in said[1]  # of 4 it is 2.776
