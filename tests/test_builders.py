"""The data sets of the paper, built from small files in the layouts that the hub has them in."""

import copy
import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import command
from helpers import data_config, make_encoder, write

from nca_jax import prepare
from nca_jax.checks import UserError
from nca_jax.data.encode import Example
from nca_jax.data.load import load_examples
from nca_jax.data.sources import list_files, parse, stream
from nca_jax.data.tfds_source import TfdsSource
from nca_jax.infra.fingerprint import files_fingerprint
from nca_jax.models.formats.pretrained import load_tokenizer

# The schemas of the data cards
MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
REWARD = pa.schema(
    [(f"A{k}", MESSAGES) for k in range(4)] + [(f"score_A{k}", pa.float64()) for k in range(4)]
)
BINARIZED = pa.schema(
    [("prompt", pa.string()), ("prompt_id", pa.string()), ("chosen", MESSAGES)]
    + [("rejected", MESSAGES), ("messages", MESSAGES)]
    + [("score_chosen", pa.float64()), ("score_rejected", pa.float64())]
)
TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
INTERACT = pa.schema(
    [("task", pa.string()), ("dataset", pa.string()), ("trajectory", TURNS)]
    + [(name, pa.string()) for name in ("chosen", "rejected", "id", "parent_id")]
)


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.fixture
def build(tmp_path, data_dir, capsys):
    """Returns a function that builds a data set and gives what was printed."""

    def run(name: str, *flags: str) -> str:
        prepare.main(["prepare", f"--name={name}", f"--raw={tmp_path / 'raw'}", *flags])
        return capsys.readouterr().out

    (tmp_path / "raw" / "data").mkdir(parents=True)
    return run


def write_parquet(tmp_path, name: str, rows: list[dict], schema: pa.Schema | None) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "raw" / "data" / name)


def read(entry: str) -> list[dict]:
    return [parse(raw)[1] for raw in stream(entry)]


def chat(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rewards(i: int) -> dict:
    conversations = {f"A{k}": chat(f"Question {i}?", f"Answer {i}.{k}") for k in range(4)}
    return conversations | {f"score_A{k}": 9.5 - i - 2 * k for k in range(4)}


# The layouts


def test_the_rewards_of_the_paper_keep_their_order_and_scores(build, tmp_path):
    (tmp_path / "raw" / "data" / "test_prefs").mkdir()
    for name, indices in (
        ("train_prefs-00000-of-00002.parquet", range(3)),
        ("train_prefs-00001-of-00002.parquet", range(3, 5)),
        ("test_prefs/0000.parquet", range(5, 7)),
    ):
        write_parquet(tmp_path, name, [rewards(i) for i in indices], REWARD)
    printed = build("ultrafeedback_reward")
    assert "tfds:ultrafeedback_reward:train_prefs: 5 records kept, 0 dropped" in printed
    assert "tfds:ultrafeedback_reward:test_prefs: 2 records kept, 0 dropped" in printed
    train, test = (read(f"tfds:ultrafeedback_reward:{x}_prefs") for x in ("train", "test"))
    for i, row in enumerate(train + test):
        assert row["prompt"] == f"Question {i}?"
        assert row["responses"] == [f"Answer {i}.{k}" for k in range(4)]
        assert row["scores"] == [9.5 - i - 2 * k for k in range(4)]
    assert train[4]["from"] == "train_prefs-00001-of-00002.parquet:2"


def completion(response, overall, ratings) -> dict:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    annotations = {
        name: {"Rating": x, "Rationale": "."} for name, x in zip(aspects, ratings, strict=True)
    }
    return {
        "response": response, "model": "m", "annotations": annotations,
        "overall_score": overall, "fine-grained_score": 0.0,
    }  # fmt: skip


RAW = [
    {"source": "s", "instruction": "Why?", "completions": [
        completion("a", 7.0, ("4", "N/A", "2", "3")),
        completion("b", 8.5, ("1", "5", "5", "4")),
        completion("c", 7.0, ("N/A", "N/A", "N/A", "N/A")),
        completion("d", 9.0, ("5", "4", "4", "5")),
    ]},
    {"source": "s", "instruction": "How?", "completions": [
        completion("a", None, ("4", "4", "4", "4")),
        completion("b", "N/A", ("2", "3", "N/A", "1")),
    ]},
    {"source": "s", "instruction": "Who?", "completions": []},
]  # fmt: skip


def write_raw(tmp_path, kind: str) -> None:
    """Writes RAW as the hub's JSON lines, as parquet, or with the lists of older files."""
    rows = copy.deepcopy(RAW)
    for one in (one for row in rows for one in row["completions"]):
        if kind == "lists":
            one["annotations"] = {name: [x] for name, x in one["annotations"].items()}
        if kind == "parquet" and one["overall_score"] == "N/A":
            one["overall_score"] = float("nan")
    if kind == "parquet":
        write_parquet(tmp_path, "0000.parquet", rows, None)
    else:
        write(tmp_path / "raw" / "evol_instruct.jsonl", rows)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "lists"])
@pytest.mark.parametrize(
    ("score", "responses", "scores"),
    [
        ("overall", ["d", "b", "a", "c"], [9.0, 8.5, 7.0, 7.0]),
        ("fine-grained", ["d", "b", "a"], [4.5, 3.75, 3.0]),
        ("honesty", ["b", "d"], [5.0, 4.0]),
    ],
)
def test_raw_ultrafeedback_is_scored_as_asked_with_the_best_first(
    build, tmp_path, kind, score, responses, scores
):
    write_raw(tmp_path, kind)
    build("ultrafeedback_reward", f"--score={score}")
    row = read(f"tfds:ultrafeedback_reward/{score}:train")[0]
    assert (row["prompt"], row["responses"], row["scores"]) == ("Why?", responses, scores)


def test_what_is_not_rated_is_left_out_and_counted(build, tmp_path):
    write_raw(tmp_path, "parquet")
    printed = build("ultrafeedback_reward", "--score=fine-grained")
    assert "2 records kept, 1 dropped (1 fewer than 2 responses)" in printed
    assert "left out of records that stay (6 ratings N/A, 1 responses not rated)" in printed
    printed = build("ultrafeedback_reward", "--score=overall")
    assert "1 records kept, 2 dropped (2 fewer than 2 responses)" in printed


def pairs() -> list[dict]:
    one = {"prompt": "Q", "prompt_id": "x", "score_chosen": 8.0, "score_rejected": 8.0}
    return [
        one | {"chosen": chat("Q", "good"), "rejected": chat("Q", "bad")},
        one | {"chosen": chat("Q", "same"), "rejected": chat("Q", "same")},
        one | {"chosen": chat("Q", "good"), "rejected": chat("Other", "bad")},
        one | {"chosen": chat("Q", "good"), "rejected": chat("Q", " ")},
        one | {"chosen": chat("Q", "good"), "rejected": chat("Q", "bad")[:1]},
    ]


def test_a_pair_is_one_and_zero_or_as_scored_also_in_the_binarized_layout(build, tmp_path):
    for name in ("train_prefs-00000-of-00001.parquet", "train_sft-00000-of-00001.parquet"):
        write_parquet(tmp_path, name, pairs(), BINARIZED)
    printed = build("ultrafeedback_preference")
    for reason in ("1 same response", "1 prompts differ", "1 empty response", "1 role"):
        assert reason in printed
    assert "train_sft" not in printed
    build("ultrafeedback_preference", "--score=given")
    for entry, scores in (("", [1.0, 0.0]), ("/given", [8.0, 8.0])):
        (row,) = read(f"tfds:ultrafeedback_preference{entry}:train_prefs")
        assert (row["prompt"], row["responses"], row["scores"]) == ("Q", ["good", "bad"], scores)


def trajectory(*turns: tuple[str, str]) -> dict:
    turns = [{"from": who, "value": value} for who, value in turns]
    ids = {"task": "Math_PoT", "dataset": "MATH", "id": "x_1", "parent_id": "x_0"}
    return ids | {"trajectory": turns, "chosen": "Step 1", "rejected": "Step 2"}


def test_a_trajectory_becomes_a_prompt_of_messages(build, tmp_path):
    turns = (("user", "Solve."), ("assistant", "Step 0"), ("user", "Observation: wrong"))
    rows = [trajectory(*turns), trajectory(*turns[:1])]
    rows += [trajectory(*turns[:2]), trajectory(("critic", "hm"))]
    write_parquet(tmp_path, "0000_pair.parquet", rows, INTERACT)
    assert "2 records kept, 2 dropped (2 role)" in build("ultra_interact_pair")
    long, short = read("tfds:ultra_interact_pair:train")
    assert long["prompt"] == [{"role": role, "content": text} for role, text in turns]
    assert short["prompt"] == "Solve."
    assert (long["responses"], long["scores"]) == (["Step 1", "Step 2"], [1.0, 0.0])


def test_rows_of_ones_own_may_have_any_number_of_responses(build, tmp_path):
    answers = {"responses": ["a", "é\0", "c"], "scores": [0, "0.5", -2]}
    rows = [{"prompt": "P"} | answers, {"prompt": chat("P", "no")[:1]} | answers]
    bad = [{"prompt": "P", "responses": ["a", "\ud800"], "scores": [0, 1]}, [], "not json"]
    bad += [{"prompt": "P", "responses": ["a", "b"], "scores": [0, None]}, {"prompt": ["x"]}]
    bad.append({"prompt": "P"} | answers | {"finished": [True, False, True]})
    write(tmp_path / "raw" / "train.jsonl", [*rows, *bad])
    write(tmp_path / "raw" / "test.jsonl", [{"prompt": "P", "chosen": "a", "rejected": "b"}])
    printed = build("scored_jsonl")
    assert "2 records kept, 6 dropped (1 text, 2 json, 1 scores, 1 keys, 1 not finished)" in printed
    first, second = read("tfds:scored_jsonl:train")
    assert first["responses"] == ["a", "é\0", "c"] and first["scores"] == [0.0, 0.5, -2.0]
    assert first["prompt"] == second["prompt"] == "P"  # one user turn is what a text means
    assert read("tfds:scored_jsonl:test")[0]["scores"] == [1.0, 0.0]


# Reading


def load(files: str):
    config = data_config(max_response_len=32)
    return load_examples(files, make_encoder(config, load_tokenizer("byte")))


def same(a: Example, b: Example) -> bool:
    arrays = [(e.group.prompt, *e.group.responses, e.scores) for e in (a, b)]
    equal = all(np.array_equal(x, y) for x, y in zip(*arrays, strict=True))
    return equal and a.prompt_hash == b.prompt_hash


def test_a_data_set_gives_the_same_examples_as_its_json_lines_and_mixes_with_them(build, tmp_path):
    rows = [
        {"prompt": f"P{i}", "responses": ["a" * (i + 1), "b"], "scores": [i / 3, 0.1]}
        for i in range(20)
    ]
    path = write(tmp_path / "raw" / "train.jsonl", rows)
    build("scored_jsonl")
    prepared, lines = load(f"tfds:scored_jsonl:train,{path}").sources
    assert len(prepared) == len(lines) == 20
    assert all(map(same, prepared, lines))
    assert prepared[3].where == "tfds:scored_jsonl:train:3"
    assert "tensorflow" not in sys.modules


def test_rows_are_read_at_random_and_a_split_may_be_a_slice(build, tmp_path):
    write(tmp_path / "raw" / "train.jsonl", [json.dumps(own(i)) for i in range(9)])
    build("scored_jsonl")
    source = TfdsSource("tfds:scored_jsonl:train")
    assert [source[i][1]["prompt"] for i in (8, 0, 4)] == ["P8", "P0", "P4"]
    assert [row["prompt"] for row in read("tfds:scored_jsonl:train[2:4]")] == ["P2", "P3"]


def own(i: int) -> dict:
    return {"prompt": f"P{i}", "responses": ["a", "b"], "scores": [1, 0]}


def test_a_cache_goes_stale_when_the_data_set_is_built_from_other_rows(build, tmp_path):
    def fingerprint(num_rows: int, out: str) -> str:
        write(tmp_path / "raw" / "train.jsonl", [own(i) for i in range(num_rows)])
        build("scored_jsonl", f"--out={tmp_path / out}")
        (tmp_path / "tfds").unlink(missing_ok=True)
        (tmp_path / "tfds").symlink_to(tmp_path / out)
        return files_fingerprint(list_files("tfds:scored_jsonl:train"))

    assert fingerprint(3, "a") == fingerprint(3, "b") != fingerprint(4, "c")


def test_the_newest_version_is_read(build, tmp_path, data_dir):
    write(tmp_path / "raw" / "train.jsonl", [own(0)])
    build("scored_jsonl")
    (data_dir / "scored_jsonl" / "1.0.0").rename(data_dir / "scored_jsonl" / "9.0.0")
    write(tmp_path / "raw" / "train.jsonl", [own(1)])
    build("scored_jsonl")
    (data_dir / "scored_jsonl" / "1.0.0").rename(data_dir / "scored_jsonl" / "10.0.0")
    assert read("tfds:scored_jsonl:train")[0]["prompt"] == "P1"


# Errors


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("tfds:scored_jsonl:valid", "wanted one of the splits train"),
        ("tfds:scored_jsonl", "is not of the form tfds:NAME"),
        ("tfds:other/config:train", "nca_jax.prepare --name=other, or set TFDS_DATA_DIR"),
    ],
)
def test_an_entry_that_is_not_there_is_named(build, tmp_path, entry, said):
    write(tmp_path / "raw" / "train.jsonl", [own(0)])
    build("scored_jsonl")
    with pytest.raises(UserError, match=said):
        load(entry)


def test_prepare_names_what_is_wrong(build, tmp_path, data_dir):
    def said(*flags: str) -> str:
        with pytest.raises(UserError) as error:
            prepare.main(["prepare", f"--out={data_dir}", *flags])
        return str(error.value)

    raw = f"--raw={tmp_path / 'raw'}"
    assert "--name=x is none of ultrafeedback_reward" in said("--name=x")
    assert "takes overall, fine-grained" in said("--name=ultrafeedback_reward", "--score=best")
    assert "takes none" in said("--name=scored_jsonl", "--score=best")
    assert "Unknown argument" in said("--name=scored_jsonl", "x")
    assert "Give --raw" in said("--name=scored_jsonl")
    assert "is not there" in said("--name=scored_jsonl", "--raw=nowhere")
    assert "has no file train*, test*" in said("--name=scored_jsonl", raw)
    assert "did not give 'openbmb/UltraInteract_pair'" in said("--name=ultra_interact_pair")
    write(tmp_path / "raw" / "train.parquet", ["no parquet"])
    assert "train.parquet: cannot be read" in said("--name=scored_jsonl", raw)
    (tmp_path / "raw" / "train.parquet").unlink()
    write(tmp_path / "raw" / "train.jsonl", ["no json"])
    assert "No record of split 'train' is left: 1 dropped (1 json)" in said(
        "--name=scored_jsonl", raw
    )
    write(tmp_path / "raw" / "train.jsonl", [own(0)])
    build("scored_jsonl")
    assert "is already there" in said("--name=scored_jsonl", raw)


def test_the_command_fails_in_one_line_with_status_2():
    process = command("prepare", "--name=nothing")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: --name=nothing") and err.count("\n") == 1


# The rows with ten responses


def test_alpaca_rows_have_the_preference_above_one_as_score_and_a_quarter_held_back(tmp_path):
    script = Path(__file__).parent.parent / "experiments" / "data" / "alpaca_rewards.py"
    make = runpy.run_path(script)
    prompts = [f"Prompt {i} é" for i in range(40)]
    for m, model in enumerate(make["MODELS"]):
        items = [
            {"instruction": p, "output_2": f"{model} {p}", "preference": 1.00000049 + 0.1 * m}
            for p in prompts
        ]
        items[-1]["preference"] = None if m == 3 else 2.5
        path = tmp_path / make["ANNOTATIONS"].format(model=model)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(items))
    out = tmp_path / "rows.jsonl.gz"
    command = [sys.executable, script, f"--repo={tmp_path}", f"--out={out}"]
    printed = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    kept = sorted(p for p in prompts[:-1] if hashlib.sha256(p.encode()).digest()[0] >= 64)
    held_back = len(prompts) - 1 - len(kept)
    assert f"{len(kept)} prompts; {held_back} held back, 1 without" in printed
    rows = read(str(out))
    assert [row["prompt"] for row in rows] == kept
    for row in rows:
        assert row["responses"] == [f"{model} {row['prompt']}" for model in make["MODELS"]]
        assert row["scores"] == [round(0.1 * m, 6) for m in range(10)]
