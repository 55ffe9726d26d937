"""README as somebody new follows it: its commands, in their order, in one shell.

What the commands are given is here: HF_FOLDER is a tiny model with a chat template, rows.jsonl.gz
and prompts.jsonl are short texts. Nothing is put in place of what README says but SMALLER.
"""

import dataclasses
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import QUICK, ROOT, write_records

from nca_jax.infra.fingerprint import tokenizer_fingerprint
from nca_jax.model_config import MODELS
from nca_jax.models.formats import hf_export, names
from nca_jax.models.formats.pretrained import load_tokenizer

# Blocks that are not run, by how they begin.
LEFT_OUT = {
    "make test": "is what runs this",
    '{"prompt": "text, or': "records, not commands",
    "python -m nca_jax.prepare": "wants the hub",
    "python -m nca_jax.aot": "compiles a 7B model for 64 chips",
    "import nca_jax": "names what a loop of one's own has: test_fit, test_rollout",
    "nca_jax/\n": "the tree of files",
}
SMALLER = {"--seeds=3": "--seeds=1", "alpha=0.01,0.1,1;": "alpha=0.1;"}  # 2 runs, not 18

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def blocks() -> list[str]:
    """Returns README's indented blocks, without their indent."""
    found, lines = [], []
    for line in [*(ROOT / "README.md").read_text().splitlines(), ""]:
        if line.startswith("    "):
            lines.append(line.removeprefix("    "))
        elif lines:
            found.append("\n".join(lines) + "\n")
            lines = []
    return found


def is_left_out(block: str) -> bool:
    return any(block.startswith(beginning) for beginning in LEFT_OUT)


def chat_tokenizer(template: str | None = CHATML):
    """Returns a tokenizer of bytes, of which IM_END ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*alphabet, "<unk>", IM_START, IM_END])}
    text = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=text,
        eos_token=IM_END,
        additional_special_tokens=[IM_START],
        chat_template=template,
    )


def write_chat_model(folder: Path, **changes) -> None:
    """Writes a Hugging Face folder: the model `tiny`, random weights, and `chat_tokenizer`."""
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(folder)
    config = dataclasses.replace(MODELS["tiny"], eos_ids=(tokenizer.eos_token_id,), **changes)
    rng = np.random.default_rng(0)
    params = {
        path: names.Param(shape, (0.05 * rng.normal(size=shape)).astype(np.float32).__getitem__)
        for path, shape in names.param_shapes(config).items()
    }
    hf_export.write_hf(folder, config, params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns where README's commands have run."""
    where = tmp_path_factory.mktemp("readme")
    for name in ("configs", "experiments"):
        (where / name).symlink_to(ROOT / name)
    write_chat_model(where / "HF_FOLDER")
    records = write_records(where / "rows.jsonl")
    (where / "rows.jsonl.gz").write_bytes(gzip.compress(records.read_bytes()))
    asked = [{"prompt": f"What is {n} times 7?", "answer": 7 * n} for n in range(64)]
    (where / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    script = "\n".join(block for block in blocks() if not is_left_out(block))
    for said, smaller in SMALLER.items():
        assert said in script
        script = script.replace(said, smaller)
    here = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK,
    }
    run = subprocess.run(
        ["bash", "-exuo", "pipefail", "-c", script],
        cwd=where,
        env=os.environ | here,
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return where


def test_every_block_that_is_not_run_is_there():
    begun = [[b for b in blocks() if b.startswith(beginning)] for beginning in LEFT_OUT]
    assert [len(found) for found in begun] == [1] * len(LEFT_OUT)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_their_order(folder):
    assert (folder / "runs/mine/evaluation.json").exists()
    assert (folder / "report.html").exists()


@pytest.mark.slow
def test_the_second_round_trains_the_first_rounds_policy_on_what_it_sampled(folder):
    asked, scored = lines_of(folder / "prompts.jsonl"), lines_of(folder / "scored.jsonl")
    told = [{key: record[key] for key in ("prompt", "answer")} for record in scored]
    assert told == asked
    assert {len(record["responses"]) for record in scored} == {4}
    assert {len(record["scores"]) for record in scored} == {4}
    read_as_ids = tokenizer_fingerprint(load_tokenizer(str(folder / "HF_DIR")))
    assert {record["tokenizer"] for record in scored} == {read_as_ids}
    config = json.loads((folder / "runs/round2/config.json").read_text())
    assert (config["model.init_from"], config["data.files"]) == ("HF_DIR", "scored.jsonl")
    first = next(x for x in lines_of(folder / "runs/round2/metrics.jsonl") if x["split"] == "train")
    assert first["loss"] == pytest.approx(2 * np.log(2), abs=1e-5)
