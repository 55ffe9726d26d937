"""What people typically get wrong in their first hours: each is one line that says what to do."""

import json

import pytest
from commands import write_records
from helpers import write

GOOD = {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}
TRAIN = "--config=configs/jsonl.py:files={dir}/rows.jsonl,smoke --workdir={dir}/run"
TRAIN += " --config.data.rows=8"

# {mistake: (the flags of `train` beside those above, what its line says)}
FLAGS = {
    # names of other trainers
    "learning_rate": ("--config.optim.learning_rate=1", "Did you mean config.optim.lr?"),
    "learning_rate, no value": ("--config.optim.learning_rate", "Did you mean config.optim.lr?"),
    "learning_rate, a space": ("--config.optim.learning_rate 1", "Did you mean config.optim.lr?"),
    "a flag learning_rate": ("--learning_rate=1", "Did you mean --config.optim.lr?"),
    "a flag lr": ("--lr=1", "Did you mean --config.optim.lr?"),
    "max_length": ("--config.data.max_length=9", "max_prompt_len and config.data.max_response_len"),
    "batch size": ("--per_device_train_batch_size=4", "Did you mean --config.data.batch_size?"),
    "max_steps": ("--config.max_steps=9", "Did you mean config.steps?"),
    "epochs": ("--num_train_epochs=3", "Did you mean --config.epochs?"),
    "warmup_ratio": ("--config.optim.warmup_ratio=0", "Did you mean config.optim.warmup_frac?"),
    "recomputation": ("--config.gradient_checkpointing=1", "Did you mean config.model.remat?"),
    "bf16": ("--bf16", "Did you mean --config.model.dtype?"),
    "model": ("--model_name_or_path=x", "Did you mean --config.model.init_from?"),
    "output_dir": ("--output_dir=x", "Did you mean --workdir?"),
    "algo": ("--config.algo=dpo", "Did you mean config.loss.name?"),
    "resume": ("--resume_from_checkpoint=x", "Did you mean --workdir?"),
    # slips
    "no section": ("--config.batch_size=4", "Did you mean config.data.batch_size?"),
    "another section": ("--config.data.lr=1", "Did you mean config.optim.lr?"),
    "a slip in the field": ("--config.optim.lrr=1", "config.optim has b1, b2, "),
    "a slip in the section": ("--config.optm.lr=1", "Did you mean config.optim.lr?"),
    "a slip in config": ("--confg.steps=1", "Did you mean --config.steps?"),
    "a slip in a flag": ("--wrkdir=x", "Did you mean --workdir?"),
    "one dash": ("-config.optim.lrr=1", "Did you mean config.optim.lr?"),
    "no dashes": ("config.optim.lr=1", "flags are --name=value"),
    "a field of another loss": ("--config.loss.tau=1", "The loss is 'nca'"),
    "another loss": ("--config.loss.name=dpo", "chosen by the argument `algo`"),
    # values
    "a word for a number": ("--config.optim.lr=fast", "must be a number above 0"),
    "no value": ("--config.optim.lr=", "must be a number above 0"),
    "None": ("--config.optim.lr=None", "must be a number above 0"),
    "1e3 steps": ("--config.steps=1e3", "must be a whole number of at least 0"),
    "maybe": ("--config.data.shuffle=maybe", "must be True or False"),
    "below 0": ("--config.optim.lr=-1", "must be a number above 0"),
    "all for warmup": ("--config.optim.warmup_frac=1", "must be a number in [0, 1)"),
    "fp16": ("--config.model.dtype=fp16", "must be one of 'auto', 'float32', 'bfloat16'"),
    "a model by its family": ("--config.model.name=llama", "'llama3_8b'"),
    "steps and epochs": ("--config.steps=5 --config.epochs=1", "set one of config.steps and"),
    "neither steps nor epochs": ("--config.steps=0", "set one of config.steps and config.epochs"),
    "a block that does not divide": ("--config.data.block=100", "divide config.data.row_len"),
    "a chunk that does not divide": ("--config.loss.logits_chunk=7", "divide config.data.row_len"),
    "a slip in a value": ("--config.data.format=releasd", "must be one of 'chat'"),
    "a loss's slip": ("--config.loss.name=ncaa", "config.loss.name must be one of 'nca'"),
    "beyond float32": ("--config.optim.lr=1e39", "a number above 0 in float32"),
    "0 in float32": ("--config.loss.alpha=1e-50", "a number of at least 0 in float32"),
    "devices that are left": ("--config.mesh.tensor=3", "does not fill the 8 devices"),
    "heads over devices": ("--config.mesh.tensor=8", "does not divide"),
    "another kernel": ("--config.model.attention=splash", "config.data.block in multiples of 128"),
    "rows of fewer devices": ("--config.data.rows=12", "set config.data.rows=16"),
    "held out twice": ("--config.data.eval_files=x", "set config.data.eval_fraction=0 with it"),
    "sizes of another kernel": ("--config.model.splash=block_q=512", "splash attention alone"),
    "no option of the compiler": ("--config.compiler_options=xla_x=1", "does not take xla_x=1"),
    "more devices": ("--config.mesh.fsdp=16", "the 8 devices"),
    "gradients rounded in float32": (
        "--config.optim.grad_dtype=bfloat16",
        "wants config.model.dtype='bfloat16'",
    ),
    "remat of unrolled layers": ("--config.model.remat=full", "set config.model.scan_layers=True"),
    "one response": ("--config.data.num_responses=1", "set config.data.num_responses=2"),
    "nothing held out": ("--config.data.eval_fraction=0", "set config.data.eval_fraction"),
    "no model there": ("--config.model.init_from=no/model", "no/model"),
    "a model that is records": ("--config.model.init_from={dir}/rows.jsonl", "rows.jsonl"),
    "a model without files": ("--config.model.init_from={dir}", "config.json"),
    "no cache": ("--config.reference.kind=cached", "config.reference.cache"),
    "an empty cache": (
        "--config.reference.kind=cached --config.reference.cache={dir}",
        "nca_jax.precompute",
    ),
    "no files there": ("--config.data.files={dir}/more.jsonl", "No file matches"),
    "a folder of files": ("--config.data.files={dir}", "a folder's are"),
    "another cloud": ("--config.data.files=s3://b/x.jsonl", "s3://b/x.jsonl"),
    "a workdir on another cloud": ("--workdir=s3://b/run", "files are local or on gs://"),
    "more steps of no run": ("--more_steps=5", "there is none in --workdir"),
    "more steps in words": ("--more_steps=ten", "--more_steps=ten"),
    "a profile of one number": ("--profile=3", "is not N:M"),
    "a profile backwards": ("--profile=3:2", "is not N:M"),
    "a profile from 0": ("--profile=0:2", "is not N:M"),
    "a profile beyond the run": ("--profile=9:11", "--profile=9:11, but the run has 10 steps"),
    "help of a field": ("--config.optim.lr --help_me", "must be a number above 0"),
}

# {mistake: (a whole command, what its line says)}
COMMANDS = {
    "no config": ("train --workdir={dir}/new", "Give --config=FILE[:args], see configs/"),
    "no workdir": ("train --config=configs/jsonl.py:files=x,smoke", "Give --workdir="),
    "no such config": ("inspect --config=configs/nothing.py", "configs/nothing.py"),
    "a config without .py": ("inspect --config=configs/jsonl", "Did you mean configs/jsonl.py?"),
    "a config by its name": ("inspect --config=jsonl", "Did you mean nca_jax:jsonl?"),
    "a config of another kind": ("inspect --config={dir}/rows.jsonl", "is no Python file"),
    "two files by a comma": (
        "inspect --config=configs/jsonl.py:files=a.jsonl,b.jsonl",
        "files=A.jsonl+B.jsonl",
    ),
    "a field as an argument": ("inspect --config=configs/jsonl.py:lr=1", "--config.section.field"),
    "a slip in an argument": ("inspect --config=configs/jsonl.py:file=x", "Did you mean files?"),
    "an argument in words": ("inspect --config=configs/jsonl.py:k=four", "a whole number"),
    "an argument apart": ("inspect --config=configs/jsonl.py files=x", "--config=FILE:name=value"),
    "an argument without value": ("inspect --config=configs/jsonl.py:files", "give files=VALUE"),
    "no model": ("inspect --config=configs/jsonl.py:files=x", "set config.model.name"),
    "no such loss": ("inspect --config=configs/jsonl.py:files=x,algo=ppo", "wanted one of nca"),
    "a run that is not there": ("evaluate --workdir={dir}/none", "none has no config.json"),
    "a step of no run": (
        "evaluate --step=3 --config=configs/jsonl.py:files={dir}/rows.jsonl,smoke"
        " --config.data.rows=8 --config.data.eval_fraction=0.3",
        "give its --workdir",
    ),
    "no such scorer": (
        "evaluate --config=configs/jsonl.py:files=x,smoke --config.generate.scorer=gpt4",
        "is not one of vader",
    ),
    "more responses than there are": (
        "inspect --config=configs/jsonl.py:files={dir}/rows.jsonl,smoke --config.data.rows=8"
        " --config.data.num_responses=9",
        "no record has more than 4 responses",
    ),
    "no prompts": ("generate --config=configs/jsonl.py:files=x,smoke --out=x", "Give --prompts"),
    "prompts by another key": (
        "generate --config=configs/jsonl.py:files=x,smoke --config.data.rows=8"
        " --prompts={dir}/questions.jsonl --out={dir}/out.jsonl",
        "questions.jsonl:1: wanted a 'prompt'",
    ),
    "an export of no run": (
        "export --workdir={dir}/none --out={dir}/hf",
        "none has no config.json",
    ),
    "rows to score by another key": (
        "score --rows={dir}/questions.jsonl --out={dir}/out.jsonl --scorer=length",
        "questions.jsonl:1",
    ),
    "no scorer": ("score --rows={dir}/rows.jsonl --out={dir}/out.jsonl", "Give --scorer"),
    "a scorer's slip": (
        "score --rows={dir}/rows.jsonl --out={dir}/out.jsonl --scorer=lenght",
        "is not one of vader, length",
    ),
    "a scorer of no command": (
        "score --rows={dir}/rows.jsonl --out={dir}/out.jsonl --scorer=command:",
        "write command:CMD",
    ),
    "a scorer that is not there": (
        "score --rows={dir}/rows.jsonl --out={dir}/out.jsonl --scorer=command:./mine.py",
        "cannot be started",
    ),
    "no answer": (
        "score --rows={dir}/rows.jsonl --out={dir}/out.jsonl --scorer=answer",
        'wants an "answer"',
    ),
    "no such data set": ("prepare --name=ultrafeedback", "ultrafeedback_reward"),
    "a data set's other score": (
        "prepare --name=ultrafeedback_reward --score=best",
        "fine-grained",
    ),
}

# {mistake: (a line of a file of records, what is said of it)}
RECORDS = {
    "other keys": ({"instruction": "a", "output": "b"}, "prompt"),
    "one response": (GOOD | {"responses": ["b"], "scores": [1]}, "give 2 or more"),
    "a score too few": (GOOD | {"scores": [1]}, "scores"),
    "scores in words": (GOOD | {"scores": ["good", "bad"]}, "score"),
    "a score that is null": (GOOD | {"scores": [1, None]}, "score"),
    "NaN": ('{"prompt": "a", "responses": ["b", "c"], "scores": [1, NaN]}', "score"),
    "an empty response": (GOOD | {"responses": ["b", ""]}, "response 1"),
    "a response that is null": (GOOD | {"responses": ["b", None]}, "wanted text, got NoneType"),
    "one text for responses": (GOOD | {"responses": "b"}, "responses"),
    "no prompt": (GOOD | {"prompt": ""}, "prompt"),
    "a list in one line": (json.dumps([GOOD, GOOD]), "wanted a JSON object, got list"),
    "a list in many lines": ("[\n" + json.dumps(GOOD) + "\n]", "a JSON object on each line"),
    "a line that is cut": ("{", "not JSON"),
    "quotes of Python": ("{'prompt': 'a'}", "not JSON"),
    "comma-separated values": ("prompt,response,score", "not JSON"),
    "a rejected that lacks": ({"prompt": "a", "chosen": "b"}, "rejected"),
}


def test_a_file_of_another_encoding_is_said_to_be_so(fails, folder):
    (folder / "wide.jsonl").write_text(json.dumps(GOOD) + "\n", encoding="utf-16")
    error = fails("train", *words(TRAIN, folder), f"--config.data.files={folder}/wide.jsonl")
    assert f"{folder}/wide.jsonl:1: not UTF-8" in error


def test_a_file_without_records_is_named(fails, folder):
    (folder / "empty.jsonl").touch()
    error = fails("train", *words(TRAIN, folder), f"--config.data.files={folder}/empty.jsonl")
    assert f"{folder}/empty.jsonl: has no records" in error


@pytest.fixture
def folder(tmp_path):
    """A folder with rows.jsonl, and with questions.jsonl, which are no prompts."""
    write_records(tmp_path / "rows.jsonl")
    write(tmp_path / "questions.jsonl", [{"question": "a"}])
    return tmp_path


def words(text: str, folder) -> list[str]:
    return text.format(dir=folder).split()


@pytest.mark.parametrize("mistake", FLAGS)
def test_a_mistake_in_the_flags_of_a_run_is_one_line(fails, folder, mistake):
    flags, said = FLAGS[mistake]
    assert said in fails("train", *words(TRAIN, folder), *words(flags, folder))


@pytest.mark.parametrize("mistake", COMMANDS)
def test_a_mistake_in_a_command_is_one_line(fails, folder, mistake):
    command, said = COMMANDS[mistake]
    assert said in fails(*words(command, folder))


@pytest.mark.parametrize("mistake", RECORDS)
def test_a_mistake_in_a_record_is_one_line_that_says_where(fails, folder, mistake):
    line, said = RECORDS[mistake]
    rows = write(folder / "broken.jsonl", [GOOD, line])
    error = fails("train", *words(TRAIN, folder), f"--config.data.files={rows}")
    assert said in error and f"{rows}:2" in error
