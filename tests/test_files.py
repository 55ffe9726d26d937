"""A run's files on gs:// are those of a local run: by the real clients, on a bucket in memory."""

import errno
import functools
import json
import os

import memory_gcs
import numpy as np
import pytest
from commands import metric_lines, write_records
from helpers import read_all, stopping, write, write_hf

from nca_jax import export, files, generate, precompute, prepare, train
from nca_jax.checks import UserError
from nca_jax.data.sources import JsonlSource, list_files
from nca_jax.data.sources import write_records as write_jsonl
from nca_jax.data.tfds_source import TfdsSource
from nca_jax.infra.fingerprint import files_fingerprint
from nca_jax.infra.log import LOG, logged
from nca_jax.models.formats.pretrained import open_pretrained


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An empty gs://bucket; copies of what is on it go to tmp_path/copies."""
    monkeypatch.setenv("NCA_JAX_CACHE", str(tmp_path / "copies"))
    return memory_gcs.serve(monkeypatch)


@pytest.fixture(params=["local", "gs"])
def place(request, tmp_path, bucket):
    return bucket if request.param == "gs" else tmp_path / "place"


def test_rows_are_written_found_and_read_alike(place):
    files.as_path(place).mkdir(exist_ok=True)
    rows = [{"prompt": "é", "responses": ["a"]}, {"prompt": "b", "responses": []}]
    write_jsonl(f"{place}/b.jsonl", rows[1:])
    write_jsonl(f"{place}/a.jsonl", rows[:1])
    assert files.find_files(f"{place}/*.jsonl") == [f"{place}/a.jsonl", f"{place}/b.jsonl"]
    assert files.find_files(f"{place}/a.jsonl") == [f"{place}/a.jsonl"]
    assert list_files(f"{place}/b.jsonl,{place}/a.jsonl") == [
        f"{place}/b.jsonl",
        f"{place}/a.jsonl",
    ]
    source = JsonlSource(f"{place}/*.jsonl")
    found = [source[i] for i in range(len(source))]
    assert found == [(f"{place}/a.jsonl:1", rows[0]), (f"{place}/b.jsonl:1", rows[1])]
    assert not list(files.as_path(place).glob("*partial*"))


def test_a_gz_file_is_read_from_both_and_has_one_fingerprint(tmp_path, bucket):
    local = write_records(tmp_path / "rows.jsonl", 3)
    os.system(f"gzip -k {local}")
    (bucket / "rows.jsonl.gz").write_bytes((tmp_path / "rows.jsonl.gz").read_bytes())
    there, here = f"{bucket}/rows.jsonl.gz", str(local) + ".gz"
    assert JsonlSource(there)[2][1] == JsonlSource(str(local))[2][1]
    assert files_fingerprint([there]) == files_fingerprint([here])


@pytest.mark.parametrize(
    ("name", "message"),
    [("s3://bucket/x", "local or on gs://"), ("gs://bucket/**/x", "for a local disk")],
)
def test_what_is_neither_local_nor_on_gs_is_refused(bucket, name, message):
    with pytest.raises(UserError, match=message):
        files.find_files(name)


def test_without_its_client_gs_is_refused_with_what_to_install(monkeypatch):
    def lacks(name):
        raise ImportError(name)

    monkeypatch.setattr("fsspec.get_filesystem_class", lacks)
    files._check_gcs.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'nca_jax\[gcs\]'"):
        files.as_path("gs://bucket/run")


def test_a_folder_is_there_whole_or_not_at_all(place):
    with pytest.raises(ZeroDivisionError), files.whole_folder(place / "out") as folder:
        (folder / "a.txt").write_text("a")
        raise ZeroDivisionError
    assert not (place / "out").exists()
    with files.whole_folder(place / "out") as folder:
        (folder / "b").mkdir()
        (folder / "b" / "c.txt").write_text("c")
    assert (place / "out" / "b" / "c.txt").read_text() == "c"
    assert [x.name for x in (place / "out").iterdir()] == ["b"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_what_could_not_be_made_whole_leaves_nothing_and_what_was_there_stays(
    tmp_path, monkeypatch, error
):
    files.write_whole(tmp_path / "file", b"before")

    def refuse(descriptor):
        raise error

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(type(error)) as refused:
        files.write_whole(tmp_path / "file", b"after")
    if isinstance(error, OSError):
        assert refused.value.filename == str(tmp_path / "file")
    with pytest.raises(type(error)), files.whole_folder(tmp_path / "folder") as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_a_file_and_its_folder_are_synced_around_the_rename(tmp_path, monkeypatch):
    synced = []

    def note(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert (tmp_path / "file").exists() == (synced[-1] == str(tmp_path))

    monkeypatch.setattr("os.fsync", note)
    files.write_whole(tmp_path / "file", b"content")
    assert synced == [f"{tmp_path}/file.partial", str(tmp_path)]


@pytest.mark.parametrize("check", [files.out_file, files.out_folder, files.new_folder])
def test_a_place_that_refuses_is_said_before_work_and_one_that_lacks_is_made(
    check, tmp_path, monkeypatch
):
    assert check(tmp_path / "a" / "b" / "out") == tmp_path / "a" / "b" / "out"
    assert (tmp_path / "a" / "b").is_dir()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="its folder cannot be made"):
        check(tmp_path / "file" / "out" / "x")
    with pytest.raises(UserError, match="--flag=/dev/full"):
        check("/dev/full", "--flag")
    with pytest.raises((UserError, OSError), match="File name too long"):
        check(tmp_path / ("x" * 300))

    def refuse(path, content):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    with pytest.raises(UserError, match=r"out cannot be written \(Read-only file system\)"):
        check(tmp_path / "out")


def test_a_model_on_gs_is_copied_once_and_again_when_it_has_changed(tmp_path, bucket):
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf")
    files.copy_into(tmp_path / "hf", bucket / "hf")
    (bucket / "hf" / "pytorch_model.bin").write_bytes(b"not wanted")
    config, params = open_pretrained(f"{bucket}/hf")
    want_config, want = open_pretrained(str(tmp_path / "hf"))
    assert config == want_config
    for path, value in read_all(want).items():
        np.testing.assert_array_equal(read_all(params)[path], value)
    (copy,) = (tmp_path / "copies").iterdir()
    assert sorted(x.name for x in copy.iterdir()) == ["config.json", "model.safetensors"]
    files.local_copy(bucket / "hf", ["*.json", "*.safetensors"])
    assert len(list((tmp_path / "copies").iterdir())) == 1
    weights = bucket / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])  # of the same size
    files.local_copy(bucket / "hf", ["*.json", "*.safetensors"])
    assert len(list((tmp_path / "copies").iterdir())) == 2
    with pytest.raises(UserError, match="gs://bucket/none is not there"):
        open_pretrained(f"{bucket}/none")


def test_a_prepared_data_set_is_read_from_gs_but_not_written_there(tmp_path, bucket, monkeypatch):
    rows = [{"prompt": f"p {i}", "responses": ["a", "b"], "scores": [0.0, 1.0]} for i in range(5)]
    raw = write(tmp_path / "train.jsonl", rows)
    flags = ["prepare", "--name=scored_jsonl", f"--raw={raw}"]
    with pytest.raises(UserError, match="gcloud storage cp"):
        prepare.main([*flags, f"--out={bucket}/tfds"])
    prepare.main([*flags, f"--out={tmp_path / 'tfds'}"])
    files.copy_into(tmp_path / "tfds", bucket / "tfds")
    monkeypatch.setenv("TFDS_DATA_DIR", f"{bucket}/tfds")
    source = TfdsSource("tfds:scored_jsonl:train")
    assert [source[i][1]["prompt"] for i in range(len(source))] == [x["prompt"] for x in rows]


@pytest.mark.slow
def test_a_run_on_gs_stopped_and_resumed_is_the_local_run(tmp_path, bucket, monkeypatch):
    rows = write_records(tmp_path / "rows.jsonl")
    write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i}:"} for i in range(3)])
    for name in (rows.name, "prompts.jsonl"):
        (bucket / name).write_bytes((tmp_path / name).read_bytes())
    for place in (tmp_path, bucket):
        config = [
            f"--config=configs/jsonl.py:files={place}/rows.jsonl,smoke",
            "--config.data.rows=8",
            "--config.data.row_len=256",
            "--config.reference.kind=cached",
            f"--config.reference.cache={place}/cache",
            "--config.generate.max_new_tokens=8",
        ]
        workdir = f"--workdir={place}/run"
        steps = ["--config.steps=5", "--config.save_every=2", "--config.optim.lr=1e-3"]
        precompute.main(["precompute", *config])
        asked = iter([False, place == bucket, *[False] * 8])
        monkeypatch.setattr(train, "stop_asked", stopping(functools.partial(next, asked)))
        train.main(["train", *config, *steps, workdir])
        if place == bucket:  # it was stopped after step 2
            assert len(metric_lines(place / "run", "train")) == 2
            train.main(["train", *config, *steps, workdir, "--profile=4:4"])
        generate.main(
            ["generate", *config, workdir, f"--prompts={place}/prompts.jsonl"]
            + [f"--out={place}/out.jsonl"]
        )
        export.main(["export", workdir, f"--out={place}/exported"])
    assert metric_lines(bucket / "run") == metric_lines(tmp_path / "run")
    assert (bucket / "out.jsonl").read_text() == (tmp_path / "out.jsonl").read_text()
    here, there = (read_all(open_pretrained(f"{x}/exported")[1]) for x in (tmp_path, bucket))
    for path in here:
        np.testing.assert_array_equal(there[path], here[path])
    assert list((bucket / "run" / "tensorboard").iterdir())
    assert list((bucket / "run" / "profile" / "plugins" / "profile").iterdir())
    assert json.loads((bucket / "run" / "run.json").read_text())["steps"] == 5
    assert (bucket / "run" / LOG).read_text().count("outputs in") == 2


def test_the_log_of_a_run_is_there_once_it_ends_unless_another_run_has_the_workdir(place):
    files.as_path(place / "run").mkdir(parents=True, exist_ok=True)
    for word in ("first", "second"):
        with logged(place / "run", lambda: None):
            print(word)
    said = [line.split("  ")[1] for line in (place / "run" / LOG).read_text().splitlines()]
    assert said == ["first", "second"]


def test_a_run_that_has_lost_its_workdir_on_gs_leaves_the_log_to_the_other(bucket):
    def taken_over() -> None:
        raise UserError("taken over")

    with pytest.raises(UserError, match="taken over"), logged(bucket / "run", taken_over):
        print("lost")
    assert not (bucket / "run" / LOG).exists()
