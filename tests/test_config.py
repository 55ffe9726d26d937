"""One table of fields: defaults, documents, errors, and the config.json of older runs."""

import json
import typing

import pytest
from ml_collections import ConfigDict

from nca_jax import protocols
from nca_jax.checks import UserError
from nca_jax.config import (
    choose_loss,
    default_config,
    fields_of,
    flatten,
    section,
)
from nca_jax.config_check import check_config
from nca_jax.config_doc import describe
from nca_jax.field import COUNT, FLAG, FRACTION, NOT_NEGATIVE, POSITIVE, TEXT, Check, Field
from nca_jax.fields import FIELDS, OPTIONAL
from nca_jax.flags import load_config, parse_flags
from nca_jax.losses import ALPHA, BETA, LOSSES
from nca_jax.other_names import OTHER_NAMES
from nca_jax.saved_config import VERSION, check_same_run, config_json, read_saved

SMOKE = "--config=configs/jsonl.py:files=x.jsonl,smoke"


def smoke(*flags: str) -> ConfigDict:
    return parse_flags(["train", SMOKE, *flags])[0]


@pytest.mark.parametrize("name", FIELDS)
def test_the_default_of_every_field_is_a_value_that_it_accepts(name):
    assert FIELDS[name].check.accepts(FIELDS[name].default)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (COUNT, [1, 7], [0, 1.0, True, "1"]),
        (POSITIVE, [1, 0.5], [0, float("nan"), float("inf"), True, "1"]),
        (POSITIVE, [3e38, 2e-38], [1e39, 10**400, 1e-38, 1e-50]),  # as float32: infinite, or 0
        (NOT_NEGATIVE, [0, 0.0], [1e-50, -1e-50]),
        (FRACTION, [0, 0.999], [1 - 1e-12]),  # 1 in float32
        (FLAG, [True, False], [0, 1, "True"]),
        (TEXT, ["", "a"], [None, 1]),
    ],
)
def test_a_check_tells_kinds_and_ranges(check, good, bad):
    assert all(map(check.accepts, good)) and not any(map(check.accepts, bad))


def test_the_default_config_has_the_sections_of_every_run_and_no_other():
    found = flatten(default_config())
    wanted = {name: x.default for name, x in FIELDS.items() if name.split(".")[0] not in OPTIONAL}
    own = {f"loss.{name}": field.default for name, field in LOSSES["nca"].fields.items()}
    assert found == wanted | own


def test_docs_config_md_is_printed_from_the_table():
    said = "run: python -m nca_jax.config > docs/config.md"
    assert open("docs/config.md", encoding="utf-8").read() == describe(), said


def test_help_config_prints_the_table_and_needs_nothing_else(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_flags(["train", "--help_config"])
    assert stopped.value.code == 0 and capsys.readouterr().out == describe()


# Losses


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_brings_its_own_fields_and_no_others(name):
    config = default_config()
    choose_loss(config, name, k=4, alpha=0.7, beta=0.2)
    given = {ALPHA: 0.7, BETA: 0.2}  # what losses share; others have a beta of another meaning
    own = {x: given.get(field, field.default) for x, field in LOSSES[name].fields.items()}
    assert dict(config.loss) == {"name": name, "logits_chunk": 128} | own
    assert config.data.num_responses == (LOSSES[name].usual_k or LOSSES[name].nearest_k(4))


def test_a_value_that_was_asked_for_is_that_of_any_loss():
    assert load_config("configs/jsonl.py:algo=simpo").loss.beta == 2.5
    assert load_config("configs/jsonl.py:algo=simpo,beta=10").loss.beta == 10


def test_a_loss_of_pairs_has_two_responses_or_as_many_as_were_asked_for():
    assert load_config("configs/jsonl.py:algo=ipo").data.num_responses == 2
    assert load_config("configs/jsonl.py:algo=ipo,k=4").data.num_responses == 4


def test_a_field_that_the_loss_does_not_have_is_refused_by_name():
    with pytest.raises(UserError, match="config.loss.alpha is no field.*The loss is 'dpo'"):
        parse_flags(["x", "--config=configs/jsonl.py:files=x,algo=dpo", "--config.loss.alpha=1"])


@pytest.mark.parametrize("file", ["jsonl", "torch_parity", "ultrafeedback"])
def test_an_argument_that_the_loss_does_not_read_is_refused_where_it_is_given(file):
    said = "algo=dpo does not read alpha; it takes beta.*: leave alpha out.*nca, infonca"
    with pytest.raises(UserError, match=said):
        load_config(f"configs/{file}.py:algo=dpo,alpha=0.1")
    assert "alpha" not in load_config(f"configs/{file}.py:algo=dpo,beta=0.5").loss


def test_a_k_that_the_loss_does_not_take_is_refused_where_it_is_given():
    with pytest.raises(UserError, match="algo=dpo takes 2 or more responses a prompt, not k=1"):
        load_config("configs/jsonl.py:algo=dpo,k=1")
    with pytest.raises(UserError, match="algo=nca takes 2 or more responses a prompt, not k=1"):
        load_config("configs/jsonl.py:k=1")
    for arg in ("algo=dpo", "algo=dpo,k=2"):
        assert load_config(f"configs/jsonl.py:{arg}").data.num_responses == 2


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("margin_weight=1", "set config.loss.margin to difference or log"),
        ("margin=log", "set config.loss.margin_weight"),
        ("robust=True", "set config.loss.label_smoothing"),
    ],
)
def test_a_field_that_would_change_nothing_is_refused(flag, said):
    with pytest.raises(UserError, match=said):
        parse_flags(["x", f"{SMOKE},algo=dpo", f"--config.loss.{flag}"])


def test_no_reference_is_opened_for_a_loss_that_reads_none(monkeypatch):
    monkeypatch.setitem(LOSSES, "mine", LOSSES["nca"]._replace(reads=("scores",)))
    config = default_config()
    choose_loss(config, "mine")
    assert config.reference.kind == "none"


@pytest.mark.parametrize("name", LOSSES)
def test_a_reference_is_there_by_default_where_the_loss_reads_one_and_nowhere_else(name):
    reads = "ref_logps" in LOSSES[name].reads
    assert (load_config(f"configs/jsonl.py:algo={name}").reference.kind != "none") == reads


def test_a_loss_that_reads_a_reference_must_have_one():
    with pytest.raises(UserError, match="'nca' compares with a reference"):
        smoke("--config.reference.kind=none")


@pytest.mark.parametrize(
    ("change", "metric"), [({"floor": None}, "excess"), ({"reads": ()}, "chosen_logp_drift")]
)
def test_a_best_metric_that_the_run_does_not_have_is_refused(monkeypatch, change, metric):
    monkeypatch.setitem(LOSSES, "mine", LOSSES["nca"]._replace(**change))
    with pytest.raises(UserError, match="config.checkpoint.best_metric"):
        parse_flags(["x", f"{SMOKE},algo=mine", f"--config.checkpoint.best_metric={metric}"])


# Sections


def with_later(monkeypatch) -> None:
    """Adds a section that configs do not have, as a later version would."""
    monkeypatch.setitem(FIELDS, "later.number", Field(1, COUNT, "of them"))
    monkeypatch.setitem(FIELDS, "later.steps", Field(5, COUNT, "steps of each"))
    for module in ("config", "config_check", "flags", "saved_config"):
        monkeypatch.setattr(f"nca_jax.{module}.OPTIONAL", (*OPTIONAL, "later"))


def test_an_override_brings_its_section_in_with_the_defaults_of_the_table(monkeypatch):
    with_later(monkeypatch)
    assert "later" not in smoke()
    assert dict(smoke("--config.later.number=2").later) == {"number": 2, "steps": 5}
    with pytest.raises(UserError, match="config.later.number must be a whole number"):
        smoke("--config.later.number=0")
    with pytest.raises(
        UserError, match="config.later.nmber is no field.*Did you mean config.later.number"
    ):
        smoke("--config.later.nmber=2")


def test_a_command_that_reads_a_section_finds_it_in_every_config():
    arg = "--config=configs/torch_parity.py:model=x,rows=x.jsonl"
    assert "generate" not in parse_flags(["train", arg])[0]
    config, _ = parse_flags(["generate", arg], sections=("generate",))
    assert dict(config.generate) == dict(section("generate"))


# Files


def test_a_config_of_the_project_has_a_name_wherever_it_is_installed(tmp_path, monkeypatch):
    want = flatten(smoke())
    monkeypatch.chdir(tmp_path)
    got = parse_flags(["train", "--config=nca_jax:jsonl:files=x.jsonl,smoke"])[0]
    assert flatten(got) == want
    with pytest.raises(UserError, match="nca_jax:jsnl: wanted one of jsonl, reward_model"):
        parse_flags(["train", "--config=nca_jax:jsnl"])


def test_an_exception_inside_a_config_file_keeps_its_file_and_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config(arg=None):\n    return {}['lr']\n")
    with pytest.raises(KeyError) as error:
        parse_flags(["train", f"--config={path}"])
    last = error.traceback[-1]
    assert str(last.path) == str(path) and last.lineno + 1 == 2
    path.write_text("from nca_jax.checks import UserError\nraise UserError('Set LR.')\n")
    with pytest.raises(UserError, match=r"^Set LR.$"):
        parse_flags(["train", f"--config={path}"])
    path.write_text("lr = 1\n")
    with pytest.raises(UserError, match=r"broken.py has no function get_config"):
        parse_flags(["train", f"--config={path}"])


def test_a_field_of_another_trainer_in_a_config_file_is_named_with_ours(tmp_path):
    path = tmp_path / "mine.py"
    source = open("configs/jsonl.py").read()
    path.write_text(source.replace("    return c", "    c.optim.learning_rate = 1.0\n    return c"))
    with pytest.raises(
        UserError, match=r"\['optim.learning_rate'\].*Did you mean config.optim.lr?"
    ):
        parse_flags(["train", f"--config={path}:files=x.jsonl,smoke"])


def test_every_name_of_another_trainer_stands_for_what_there_is():
    known = {f"config.{name}" for loss in LOSSES for name in fields_of(loss)} | {"workdir", "out"}
    assert known >= {ours for names in OTHER_NAMES.values() for ours in names.split()}


# Steps and epochs


def test_what_the_command_line_gives_of_steps_and_epochs_wins_over_the_config(capsys):
    by_epochs = "--config=configs/jsonl.py:files=x.jsonl,model=tiny"
    config, _ = parse_flags(["train", by_epochs, "--config.steps=7"])
    assert (config.steps, config.epochs) == (7, 0.0)
    assert "--config.steps=7 wins over the config's epochs=1.0" in capsys.readouterr().out
    config = smoke("--config.epochs=2")
    assert (config.steps, config.epochs) == (0, 2.0)
    with pytest.raises(UserError, match="set one of config.steps and config.epochs"):
        smoke("--config.epochs=2", "--config.steps=7")


# config.json


def test_a_command_with_a_workdir_takes_the_config_of_the_run_there(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json(smoke())))
    argv = ["evaluate", f"--workdir={tmp_path}", "--config.generate.temperature=0"]
    config, flags = parse_flags(argv, sections=("generate",), workdir="")
    wanted = flatten(smoke()) | {"generate.temperature": 0.0}
    assert flatten(config) == wanted and flags.workdir == str(tmp_path)
    assert parse_flags([*argv, SMOKE, "--config.seed=3"], workdir="")[0].seed == 3


def test_a_config_json_carries_its_version_and_is_read_as_it_was(tmp_path):
    config = smoke()
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    assert json.loads((tmp_path / "config.json").read_text())["version"] == VERSION
    assert flatten(read_saved(tmp_path / "config.json")) == flatten(config)
    check_same_run(config, tmp_path / "config.json")


def saved_without(tmp_path, config: ConfigDict, *names: str, **more) -> object:
    """Writes the config.json of an older run, which lacks some fields and has others."""
    saved = {x: value for x, value in flatten(config).items() if x not in names} | more
    (tmp_path / "config.json").write_text(json.dumps(saved))
    return tmp_path / "config.json"


def test_a_field_that_is_newer_than_a_run_means_as_before(tmp_path, monkeypatch):
    newer = Field(2.0, POSITIVE, "new", since=VERSION, before=1.0)
    monkeypatch.setitem(FIELDS, "optim.new", newer)
    config = ConfigDict(smoke().to_dict())
    file = saved_without(tmp_path, config, "optim.new")
    assert check_same_run(config, file).optim.new == 1.0
    config.optim.new = 3.0  # asked for, and not the table's default
    with pytest.raises(UserError, match="optim.new: 1.0 there, 3.0 here"):
        check_same_run(config, file)
    assert read_saved(file).optim.new == 1.0


def test_an_older_run_encoded_responses_apart_and_goes_on_so(tmp_path):
    file = saved_without(tmp_path, smoke(), "data.join", version=2)
    assert read_saved(file).data.join == "apart"
    assert check_same_run(smoke(), file).data.join == "apart"
    file.write_text(
        file.read_text()
        .replace('"version": 2', '"version": 3')
        .replace("{", '{"data.join": "apart",', 1)
    )
    with pytest.raises(UserError, match="data.join: 'apart' there, 'together' here"):
        check_same_run(smoke(), file)


def test_a_field_that_meant_nothing_in_an_older_run_is_left_out_and_no_other(tmp_path):
    config, _ = parse_flags(["x", f"{SMOKE},algo=dpo"])
    check_same_run(config, saved_without(tmp_path, config, **{"loss.alpha": 0.0}))
    with pytest.raises(UserError, match="loss.alpha: 0.5 there, None here"):
        check_same_run(config, saved_without(tmp_path, config, **{"loss.alpha": 0.5}))


def test_a_config_json_of_a_newer_version_is_refused(tmp_path):
    file = saved_without(tmp_path, smoke(), version=VERSION + 1)
    with pytest.raises(UserError, match="written by a newer nca_jax"):
        read_saved(file)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"version": "2"}, "version '2'"),
        ({"optim.lr": "fast"}, "optim.lr lacking or wrong"),
        ({"loss.name": None}, "loss.name lacking or wrong"),
        ({"data.rows": [1]}, "data.rows lacking or wrong"),
    ],
)
def test_a_damaged_config_json_is_named(tmp_path, damage, said):
    file = saved_without(tmp_path, smoke(), **damage)
    with pytest.raises(UserError, match=f"{file} is damaged .{said}.*; restore it, or use a new"):
        check_same_run(smoke(), file)
    file.write_text('{"steps": 10}')
    with pytest.raises(UserError, match=f"{file} is damaged .*lacking or wrong"):
        read_saved(file)


@pytest.mark.parametrize(
    "flag",
    [
        "data.rows=4",
        "data.block=32",
        "loss.logits_chunk=64",
        "mesh.data=2",
        "model.scan_layers=True",
        "model.attention=pairs",
        "log_every=5",
    ],
)
def test_the_layout_of_a_run_may_change_when_it_is_resumed(tmp_path, flag):
    check_same_run(smoke(f"--config.{flag}"), saved_without(tmp_path, smoke()))


@pytest.mark.parametrize("flag", ["optim.lr=1.0", "data.row_len=1024", "seed=3", "loss.beta=1.0"])
def test_what_a_run_means_may_not_change_when_it_is_resumed(tmp_path, flag):
    with pytest.raises(UserError, match=f"{flag.split('=')[0]}: "):
        check_same_run(smoke(f"--config.{flag}"), saved_without(tmp_path, smoke()))


def test_a_new_field_is_one_line_of_the_table(monkeypatch):
    monkeypatch.setitem(FIELDS, "optim.new", Field(0.5, Check(float, bool, "not 0"), "a trial"))
    config = default_config()
    config.model.name, config.data.files = "tiny", "x.jsonl"
    assert config.optim.new == 0.5
    check_config(config)
    config.optim.new = 0.0
    with pytest.raises(UserError, match="config.optim.new must be not 0; it is 0.0"):
        check_config(config)
    assert "| new | `0.5` | not 0 | a trial |" in describe()


@pytest.mark.parametrize(
    ("name", "of_section"),
    [
        ("data", protocols.DataSection),
        ("model", protocols.ModelSection),
        ("optim", protocols.OptimSection),
        ("checkpoint", protocols.CheckpointSection),
        ("log", protocols.LogSection),
    ],
)
def test_the_types_of_sections_are_those_of_the_table(name, of_section):
    """A ConfigDict has no types of its own, so no type checker would see that they differ."""
    kinds = {x: field.check.kind for x, field in FIELDS.items()}
    said = typing.get_type_hints(of_section)
    assert said == {x: kinds.get(f"{name}.{x}") for x in said}
