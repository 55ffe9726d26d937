"""Scorers score what they say, and generate, score, train is a loop of three commands."""

import json
import sys

import pytest
from commands import command, finish, metric_lines, write_records
from helpers import data_config, make_encoder

from nca_jax import score
from nca_jax.checks import UserError
from nca_jax.data.load import load_examples
from nca_jax.models.formats.pretrained import load_tokenizer
from nca_jax.rewards.scorers import SCORERS, get_scorer

ROW = {"prompt": "6 * 7 =", "answer": 42}


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(tmp_path, scorer: str, *rows: dict) -> list[dict]:
    """Returns what the command writes."""
    rows_file, out = write(tmp_path / "rows.jsonl", *rows), tmp_path / "scored.jsonl"
    score.main(["score", f"--rows={rows_file}", f"--out={out}", f"--scorer={scorer}"])
    return [json.loads(line) for line in out.read_text(encoding="utf-8").strip("\n").split("\n")]


@pytest.mark.parametrize(
    ("want", "text", "is_right"),
    [
        (42, "6 * 7 is 42.", True),
        (42, "42, since 6 * 7 = 42", True),
        (42, "42 is not 43", False),
        ("42", "It is 42.0", True),
        (42, "142", False),
        (2, "7-5=2, not 7-2", True),
        (-5, "The answer is -5", True),
        (5, "The answer is -5", False),
        (1000, "about 1,000", True),
        (42, "forty-two", False),
        (42, "", False),
        ("Paris", "Let me think.\n'paris'.\n", True),
        ("Paris", "Paris is the capital.", False),
        ("olleh", "olleh", True),
    ],
)
def test_an_answer_is_right_where_the_response_ends_in_it(want, text, is_right):
    assert SCORERS["answer"]([{"prompt": "?", "answer": want}], [text]).tolist() == [is_right]


def test_length_counts_words():
    assert SCORERS["length"]([{}] * 3, ["a  b\nc", "", "one"]).tolist() == [3, 0, 1]


def test_vader_tells_praise_from_blame():
    pytest.importorskip("vaderSentiment")
    good, bad = SCORERS["vader"]([{}] * 2, ["A wonderful film.", "A terrible, boring film."])
    assert -1 <= bad < 0 < good <= 1


def test_every_response_gets_its_score_and_other_keys_stay(tmp_path):
    rows = [ROW | {"responses": ["42", "41", "So 42"]}, ROW | {"responses": ["7"], "id": "b"}]
    scored = run(tmp_path, "answer", *rows)
    assert scored == [rows[0] | {"scores": [1, 0, 1]}, rows[1] | {"scores": [0]}]


def test_a_command_of_ones_own_reads_each_row_with_its_response_and_writes_scores(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    row = json.loads(line)\n"
        "    assert 'responses' not in row\n"
        "    print(json.dumps({'score': len(row['response']) + row['answer'] / 100}))\n"
    )
    rows = [ROW | {"responses": ["a", "é\u2028b"]}, ROW | {"prompt": [{"role": "user"}]}]
    rows[1]["responses"] = ["four"]
    scored = run(tmp_path, f"command:{sys.executable} {tmp_path / 'mine.py'}", *rows)
    assert [row["scores"] for row in scored] == [[1.42, 3.42], [4.42]]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('no weights')", "stopped with status 1: no weights"),
        ("print('{}')", "wrote 1 lines for 2 responses"),
        ("print('{}\\n{}')", "wrote '{}' as line 1; wanted"),
        ("print('[1]\\n2')", "as line 1; wanted"),
        ("""print('{"score": NaN}\\n{}')""", "a finite number"),
    ],
)
def test_a_command_that_fails_or_writes_no_scores_is_named(tmp_path, program, said):
    (tmp_path / "mine.py").write_text(program)
    with pytest.raises(UserError) as error:
        run(
            tmp_path,
            f"command:{sys.executable} {tmp_path / 'mine.py'}",
            ROW | {"responses": ["a", "b"]},
        )
    assert said in str(error.value) and "mine.py" in str(error.value)


@pytest.mark.parametrize(
    ("scorer", "row", "said"),
    [
        ("vadr", ROW | {"responses": ["a"]}, "'vadr' is not one of vader, length, answer"),
        ("", ROW | {"responses": ["a"]}, "--scorer"),
        ("length", ROW, "rows.jsonl:1: wanted a list of 'responses'"),
        ("length", {"responses": ["a"]}, "rows.jsonl:1: wanted a 'prompt'"),
        ("length", ROW | {"responses": [["a"]]}, "rows.jsonl:1: a response is not text"),
        ("answer", {"prompt": "q", "responses": ["a"]}, "rows.jsonl:1: the scorer wants"),
        ("command:no-such-program -x", ROW | {"responses": ["a"]}, "cannot be started"),
        ("command:", ROW | {"responses": ["a"]}, "names no command"),
    ],
)
def test_what_cannot_be_scored_is_said(tmp_path, scorer, row, said):
    with pytest.raises(UserError) as error:
        run(tmp_path, scorer, row)
    assert said in str(error.value)
    assert not (tmp_path / "scored.jsonl").exists()


STOPS_ONCE = """
import json, pathlib, sys
asked = pathlib.Path(sys.argv[1])
for line in sys.stdin:
    text = json.loads(line)["response"]
    asked.write_text(asked.read_text() + text + " ")
    if asked.read_text().count(" ") == 4:
        sys.exit("stopped")
    print(json.dumps({"score": int(text)}), flush=True)
"""


def test_score_goes_on_after_a_stop_and_refuses_what_another_scorer_began(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "PIECE", 1)
    (tmp_path / "mine.py").write_text(STOPS_ONCE)
    (asked := tmp_path / "asked.txt").write_text("")
    scorer = f"command:{sys.executable} {tmp_path / 'mine.py'} {asked}"
    rows = [ROW | {"responses": [str(2 * n), str(2 * n + 1)]} for n in range(3)]
    monkeypatch.setattr(score, "files_of", lambda scorer: [str(tmp_path / "mine.py")])
    with pytest.raises(UserError, match="stopped with status 1: stopped"):
        run(tmp_path, scorer, *rows)
    scored = run(tmp_path, scorer, *rows)
    assert [row["scores"] for row in scored] == [[0, 1], [2, 3], [4, 5]]
    assert asked.read_text() == "0 1 2 3 2 3 4 5 "
    assert not (tmp_path / "scored.jsonl.pieces").exists()
    asked.write_text("")
    with pytest.raises(UserError, match="stopped with status 1"):
        run(tmp_path, scorer, *rows)
    (tmp_path / "mine.py").write_text(STOPS_ONCE + "# mended")
    with pytest.raises(UserError, match="had other scorer"):
        run(tmp_path, scorer, *rows)


def test_nothing_names_no_scorer():
    assert get_scorer("") is None


def test_what_is_scored_is_what_train_reads(tmp_path):
    run(tmp_path, "length", *[ROW | {"responses": ["a", "b c"]}] * 3)
    encoder = make_encoder(data_config(num_responses=2), load_tokenizer("byte"))
    (examples,), counts = load_examples(str(tmp_path / "scored.jsonl"), encoder)
    assert [example.scores.tolist() for example in examples] == [[1, 2]] * 3 and not counts


@pytest.mark.slow
def test_generate_score_train_is_a_loop_of_three_commands(tmp_path):
    rows = write_records(tmp_path / "first.jsonl", num_rows=6)
    config = f"--config=configs/jsonl.py:files={rows},smoke,k=3"
    small = ("--config.generate.num_samples=3", "--config.generate.max_new_tokens=8")
    prompts = write(tmp_path / "prompts.jsonl", *[ROW | {"prompt": f"{i} + 1 ="} for i in range(6)])
    out, scored = tmp_path / "out.jsonl", tmp_path / "scored.jsonl"
    finish(command("generate", config, *small, f"--prompts={prompts}", f"--out={out}"))
    said = finish(command("score", f"--rows={out}", f"--out={scored}", "--scorer=length"))
    assert "6 prompts, 18 responses" in said
    lines = [json.loads(line) for line in scored.read_text().splitlines()]
    assert all(row["answer"] == 42 and len(row["scores"]) == 3 for row in lines)
    finish(
        command(
            "train",
            f"--config=configs/jsonl.py:files={scored},smoke,k=3",
            f"--workdir={tmp_path / 'run'}",
            "--config.steps=1",
            "--config.eval_every=0",
            "--config.data.eval_fraction=0",
        )
    )
    assert [line["step"] for line in metric_lines(tmp_path / "run", "train")] == [1]
