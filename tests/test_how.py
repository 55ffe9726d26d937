"""docs/how.md: its recipes run as they stand there, one after the other, and name what exists."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import QUICK, ROOT, metric_lines, write_records

from nca_jax.fields import FIELDS
from nca_jax.flags import parse_flags

HOW = (ROOT / "docs/how.md").read_text()
# Commands that are not run, by how they begin.
LEFT_OUT = {
    "WANDB_MODE=offline": "wants the extra wandb",
    "wandb sync": "wants an account",
    "python -m experiments.sweep": "three runs: test_sweep",
    "python -m nca_jax.score --rows=sampled": "wants a reward model: test_reward_model",
    "python -m nca_jax.lm_eval --workdir": "wants the extra eval: test_lm_eval",
    "python -m nca_jax.lm_eval --config": "the same",
    "python -m nca_jax.evaluate --workdir=runs/mine --num_prompts=4": "the same: test_wins",
    "python -m nca_jax.evaluate --config": "the same",
}
# What recipes ask the hub for.
HUB = {
    "ORG/NAME": [{"question": "Say a.", "answers": ["a", "b"], "ratings": [1, 2]}],
    "openai/gsm8k": [{"question": f"{n} + 1 =", "answer": f"So\n#### {n + 1}"} for n in range(4)],
}


def commands() -> list[str]:
    """Returns the shell commands of all recipes; a Python file is the command that writes it."""
    blocks = re.findall(r"(?:^    .*\n(?:\n(?=    ))*)+", HOW, re.M)
    found = []
    for block in blocks:
        text = re.sub(r"^    ", "", block, flags=re.M)
        for part in re.split(r"^(?=# \w+\.py$)|\n\n(?=python |SMALL=)", text, flags=re.M):
            if name := re.match(r"# (\w+\.py)\n", part):
                found.append(f"cat > {name[1]} <<'END'\n{part.rstrip()}\nEND")
            else:
                found += re.sub(r"\\\n\s*", "", part).strip().splitlines()
    return [command for command in found if command]


def is_left_out(command: str) -> bool:
    return any(command.startswith(beginning) for beginning in LEFT_OUT)


def test_every_field_and_flag_of_a_recipe_is_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert set(re.findall(r"--config\.([\w.]+)=", HOW)) <= FIELDS.keys()
    values, checked = {}, 0
    for command in commands():
        if assigned := re.match(r"(CONFIG|SMALL)=(.*)", command):
            values[f"${assigned[1]}"] = assigned[2].strip('"')
        for name, value in values.items():
            command = command.replace(name, value)
        flags = [] if "<<" in command else shlex.split(command)
        if flags := [flag for flag in flags if flag.startswith("--config")]:
            parse_flags(["x", *flags], sections=("generate",))
            checked += 1
    assert checked >= 15


def test_what_is_not_run_is_there():
    begun = [sum(x.startswith(beginning) for x in commands()) for beginning in LEFT_OUT]
    assert begun == [1] * len(LEFT_OUT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns where the recipes have run."""
    where = tmp_path_factory.mktemp("how")
    (where / "configs").symlink_to(ROOT / "configs")
    write_records(where / "records.jsonl")
    for name in ("easy", "hard"):
        text = write_records(where / f"{name}.jsonl", num_rows=3).read_text()
        (where / f"{name}.jsonl").write_text(text.replace("Say", f"Say {name}"))
    answered = [json.dumps({"prompt": f"Say {i}", "response": "sun"}) for i in range(40)]
    (where / "conversations.jsonl").write_text("\n".join(answered))
    (where / "answers.csv").write_text(
        "prompt,response,score\n"
        + "".join(f'"Say {i}, please",word {j},{j}\n' for i in range(30) for j in range(4))
    )
    asked = [{"instruction": f"Say {i}.", "output": "theirs"} for i in range(3)]
    (where / "alpaca_eval.json").write_text(json.dumps(asked))
    followed = {"key": 1, "prompt": "Say.", "instruction_id_list": [], "kwargs": []}
    (where / "input_data.jsonl").write_text(json.dumps(followed))
    (where / "datasets.py").write_text(
        f"HUB = {HUB!r}\n\n\ndef load_dataset(name, *_, split):\n    return HUB[name]\n"
    )
    here = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK,
    }
    script = "\n".join(command for command in commands() if not is_left_out(command))
    run = subprocess.run(
        ["bash", "-exuo", "pipefail", "-c", f"{script}\npython from_hub.py\npython own_loop.py"],
        cwd=where,
        env=os.environ | here,
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    (where / "said.txt").write_text(run.stdout)
    return where


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.long
@pytest.mark.slow
def test_the_recipes_for_data_write_records(folder):
    csv, hub = lines_of(folder / "from_csv.jsonl"), lines_of(folder / "from_hub.jsonl")
    words = [f"word {j}" for j in range(4)]
    assert len(csv) == 30
    assert csv[0] == {"prompt": "Say 0, please", "responses": words, "scores": [0, 1, 2, 3]}
    assert hub == [{"prompt": "Say a.", "responses": ["a", "b"], "scores": [1, 2]}]


@pytest.mark.long
@pytest.mark.slow
def test_the_recipes_for_scores_and_samples_write_what_is_asked(folder):
    record = lines_of(folder / "scored.jsonl")[0]
    assert record["scores"] == [-abs(len(text) - 80) for text in record["responses"]]
    assert [x["answer"] for x in lines_of(folder / "solved.jsonl")] == ["1", "2", "3", "4"]
    assert lines_of(folder / "mine.jsonl")[0].keys() == {"prompt", "response"}
    outputs = json.loads((folder / "mine.json").read_text())
    assert [x["instruction"] for x in outputs] == ["Say 0.", "Say 1.", "Say 2."]
    assert len(lines_of(folder / "logps.jsonl")) == 24


@pytest.mark.long
@pytest.mark.slow
def test_the_recipes_for_training_do_what_they_say(folder):
    runs = folder / "runs"
    rates = [line["lr"] for line in metric_lines(runs / "wsd", "train")]
    assert rates[0] == rates[7] == 2 * rates[9] > 0
    splits = {line["split"] for line in metric_lines(runs / "two")}
    assert splits == {"train", "eval/easy", "eval/hard"}
    for name in ("many", "frozen", "early", "small"):
        assert metric_lines(runs / name, "train")
    assert [line["round"] for line in metric_lines(runs / "rounds", "rounds")] == [1, 2]
    first, *_, last = metric_lines(runs / "sft", "eval")
    assert last["perplexity"] < first["perplexity"]
    exported = json.loads((folder / "REWARD_FOLDER" / "config.json").read_text())
    assert exported["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.long
@pytest.mark.slow
def test_the_loss_in_a_loop_of_ones_own_falls_and_the_best_response_becomes_likelier(folder):
    loss, best = re.findall(r"^([\d.]+) \[\[\s*(\S+)", (folder / "said.txt").read_text(), re.M)[-1]
    assert float(loss) < 2 * math.log(2) and float(best) > math.log(1 / 4)
