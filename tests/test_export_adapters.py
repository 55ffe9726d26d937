"""Adapters out of a run and into another: export --merge, lora.init_from, model.init_from."""

import jax
import numpy as np
import pytest
from families import packed_logits, read_params, write_family
from helpers import id_record, read_all, write
from test_peft import random_adapters
from test_repo import CONFIG_FILES, load_config

from nca_jax import build, export, train
from nca_jax.axes import flatten_paths
from nca_jax.checks import UserError
from nca_jax.config import default_config, section
from nca_jax.flags import parse_flags
from nca_jax.infra.mesh import make_mesh
from nca_jax.models.formats import hf, peft, pretrained
from nca_jax.models.formats.merge import merge
from nca_jax.models.lora import Lora, split_adapters
from nca_jax.params import policy_params

LORA = Lora(3, 6.0, ("q", "o", "up"), rslora=True)


def write_base(tmp_path):
    (tmp_path / "base").mkdir()
    return write_family(tmp_path / "base", "mistral")


def write_adapter(tmp_path, base, lora=LORA):
    config, _ = hf.open_hf(base)
    folder = tmp_path / "adapter"
    peft.write_peft(folder, config, lora, random_adapters(config, lora), base=str(base))
    return folder


# What a config says


def lora_config(base: str = "", **fields):
    config = default_config()
    config.model.init_from, config.lora = base, section("lora")
    config.lora.update(fields)
    return config


def test_what_is_merged_has_a_default_where_base_and_files_agree(tmp_path):
    base = str(write_base(tmp_path))
    assert export.chosen_merge(default_config(), "", "float32") == ""
    for dtype in ("", "float32"):
        config = lora_config(base, base_dtype=dtype)
        assert export.chosen_merge(config, "", "bfloat16") == "dequantised"
    for dtype in ("bfloat16", "nf4"):  # its files have float32
        config = lora_config(base, base_dtype=dtype)
        with pytest.raises(UserError, match=f"trained on a base in {dtype}: give --merge=deq"):
            export.chosen_merge(config, "", "float32")
        for asked in export.MERGES:
            assert export.chosen_merge(config, asked, "float32") == asked


@pytest.mark.parametrize(
    ("asked", "dtype", "message"),
    [
        ("all", "float32", "must be one of none, dequantised, original; it is 'all'"),
        ("none", "bfloat16", "--dtype=bfloat16 is of merged weights"),
        ("none", "float32", "is an adapter too"),
    ],
)
def test_a_merge_that_cannot_be_is_one_line(tmp_path, asked, dtype, message):
    where = write_base(tmp_path)
    where = write_adapter(tmp_path, where) if message == "is an adapter too" else where
    with pytest.raises(UserError, match=message):
        export.chosen_merge(lora_config(str(where)), asked, dtype)
    with pytest.raises(UserError, match=f"--merge={asked} is of adapters"):
        export.chosen_merge(default_config(), asked, "float32")


def test_adapters_on_parts_of_one_tensor_are_merged_alone(tmp_path):
    """As `phi3` is the config of a `mistral`, but for what its folder calls the tensors."""
    config = lora_config(str(write_family(tmp_path, "phi3")))
    assert export.chosen_merge(config, "", "float32") == "dequantised"
    with pytest.raises(UserError, match="--merge=none: .* has q, k and v in one tensor"):
        export.chosen_merge(config, "none", "float32")


PARITY = next(path for path in CONFIG_FILES if path.name == "torch_parity.py")
RELEASE = next(path for path in CONFIG_FILES if path.name == "ultrafeedback.py")


def test_the_parity_config_is_what_a_folder_of_adapters_says(tmp_path):
    base = write_base(tmp_path)
    folder = write_adapter(tmp_path, base)
    arg = f"model={base},rows=x.jsonl,lora={folder}"
    config = load_config(PARITY, arg)
    assert (config.lora.rank, config.lora.alpha, config.lora.rslora) == (3, 6.0, True)
    assert (config.lora.targets, config.lora.init_from) == ("q,o,up", str(folder))
    assert config.reference.kind == "base"
    with pytest.raises(UserError, match="says its lora_alpha, rank itself"):
        load_config(PARITY, f"{arg},rank=4,lora_alpha=8")
    new = load_config(PARITY, f"model={base},rows=x.jsonl,rank=4,base_dtype=nf4").lora
    assert (new.rank, new.alpha, new.init_from, new.base_dtype) == (4, 16.0, "", "nf4")


def test_the_releases_recipe_adapts_a_mixtures_attention_alone():
    told = {model: load_config(RELEASE, f"model={model},recipe=qlora") for model in
            ("mistral_7b", "mixtral_8x7b")}  # fmt: skip
    assert told["mixtral_8x7b"].lora.targets == "q,k,v,o"
    config = told["mistral_7b"]
    assert (config.lora.rank, config.lora.alpha, config.lora.base_dtype) == (16, 16.0, "nf4")
    assert config.lora.targets == "q,k,v,o,gate,up,down" and config.reference.kind == "base"
    assert (config.optim.lr, config.data.format, config.data.choose) == (5e-6, "released", "all")
    with pytest.raises(UserError, match="recipe=lora: wanted full or qlora"):
        load_config(RELEASE, "recipe=lora")


# Runs


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(build, "make_mesh", lambda sizes, _: make_mesh(sizes, jax.devices()[:1]))


def flags_of(tmp_path, base, more: str, *flags: str) -> list[str]:
    rows = write(tmp_path / "rows.jsonl", [id_record(i, 4) for i in range(1, 5)])
    config = f"configs/torch_parity.py:model={base},rows={rows},steps=2,batch_size=2,lr=1e-2,{more}"
    sizes = ("--config.data.row_len=64", "--config.loss.logits_chunk=64")
    return [f"--config={config}", *sizes, *flags]


def start_of(flags: list[str]):
    run = build.build(parse_flags(["prog", *flags])[0])
    with jax.set_mesh(run.mesh):
        return run, policy_params(run, "")


def test_adapters_that_go_on_are_those_of_their_folder(tmp_path, one_device):
    base = write_base(tmp_path)
    folder = write_adapter(tmp_path, base)
    flags = flags_of(tmp_path, base, f"lora={folder}")
    run, params = start_of(flags)
    expected = read_all(pretrained.open_adapter(str(folder), run.model.config).params)
    found = flatten_paths(split_adapters(params)[0])
    assert run.model.lora == LORA and found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)
    with pytest.raises(UserError, match=r"set --config.lora.rank=3 \(it is 5\), --config.lora.tar"):
        start_of([*flags, "--config.lora.rank=5", "--config.lora.targets=q"])


@pytest.mark.slow
def test_a_run_on_nf4_is_exported_as_adapters_and_merged_into_either_base(
    tmp_path, one_device, capsys
):
    base = write_base(tmp_path)
    flags = flags_of(tmp_path, base, "rank=4,base_dtype=nf4")
    workdir = tmp_path / "run"
    train.main(["train", *flags, f"--workdir={workdir}"])
    with pytest.raises(UserError, match="trained on a base in nf4"):
        export.main(["export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}"])
    for merging in export.MERGES:
        out = tmp_path / merging
        export.main(["export", f"--workdir={workdir}", f"--out={out}", f"--merge={merging}"])
    assert "this is not the model that was trained" in capsys.readouterr().out

    run = build.build(parse_flags(["prog", *flags])[0])
    with jax.set_mesh(run.mesh):
        policy = policy_params(run, str(workdir))
    trained = packed_logits(run.model, policy)
    merged = packed_logits(*read_params(tmp_path / "dequantised"))
    np.testing.assert_allclose(merged, trained, rtol=0, atol=1e-4)
    original = packed_logits(*read_params(tmp_path / "original"))
    assert np.abs(original - trained).max() > 0.01

    config, weights = hf.open_hf(base)
    adapter = pretrained.open_adapter(str(tmp_path / "none"), config)
    saved = flatten_paths(split_adapters(policy)[0])
    for path, x in read_all(adapter.params).items():
        np.testing.assert_array_equal(x, saved[path], err_msg=path)
    expected = read_all(merge(weights, adapter.lora, adapter.params))
    for path, x in read_all(hf.open_hf(tmp_path / "original")[1]).items():
        np.testing.assert_array_equal(x, expected[path], err_msg=path)

    cards = {merging: (tmp_path / merging / "README.md").read_text() for merging in export.MERGES}
    assert "library_name: peft" in cards["none"] and "not merged" in cards["none"]
    assert "base in nf4 that they were trained on" in cards["dequantised"]
    assert "the metrics below are not of this model" in cards["original"]
    with jax.set_mesh(run.mesh):  # on an adapter as the model, quantised once more
        again = [*flags_of(tmp_path, tmp_path / "none", "rank=2,base_dtype=nf4")]
        assert "codes" in start_of(again)[1]["layers"]["attn"]["q"]
