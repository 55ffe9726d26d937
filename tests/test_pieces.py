"""What takes long is kept piece by piece, and gone on with only by the command that began it."""

import json

import jax
import pytest
from helpers import write

from nca_jax import generate
from nca_jax.checks import UserError
from nca_jax.data import pieces

MADE_FROM = {"config": "a", "prompts": "b"}


def test_pieces_are_gone_on_with_behind_the_last_and_end_as_one_file(tmp_path):
    out, records = tmp_path / "out.jsonl", [{"n": n, "text": "a\u2028é"} for n in range(5)]
    assert pieces.begin(out, MADE_FROM) == []
    pieces.add(out, 0, records[:2])
    pieces.add(out, 2, records[2:4])
    assert pieces.begin(out, MADE_FROM) == records[:4]
    with pytest.raises(UserError, match="out.jsonl.pieces holds .* other config"):
        pieces.begin(out, MADE_FROM | {"config": "c"})
    assert pieces.begin(out, MADE_FROM) == records[:4]
    pieces.finish(out, records)
    assert [json.loads(line) for line in out.read_bytes().split(b"\n") if line] == records
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("content", [b"", b'{"n": 2}\n{"n"', b"\0\0\0"])
def test_a_piece_that_is_damaged_is_made_again_with_those_behind_it(tmp_path, content):
    out, records = tmp_path / "out.jsonl", [{"n": n} for n in range(6)]
    pieces.begin(out, MADE_FROM)
    for start in (0, 2, 4):
        pieces.add(out, start, records[start : start + 2])
    (tmp_path / "out.jsonl.pieces" / "000000002.jsonl").write_bytes(content)
    assert pieces.begin(out, MADE_FROM) == records[:2]
    pieces.add(out, 2, records[2:4])
    assert pieces.begin(out, MADE_FROM) == records


@pytest.mark.slow
def test_generate_goes_on_after_a_stop_to_the_same_responses(tmp_path, monkeypatch, capsys):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"Say {i}"} for i in range(20)])
    argv = ["generate", "--config=configs/jsonl.py:files=none,smoke", "--config.data.rows=8"]
    argv += ["--config.generate.max_new_tokens=3", "--config.generate.batch_size=8"]
    argv += ["--config.generate.scorer=length", f"--prompts={prompts}"]
    generate.main([*argv, f"--out={tmp_path / 'whole.jsonl'}"])

    out, add = tmp_path / "out.jsonl", pieces.add

    def add_and_stop(*args):
        add(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(pieces, "add", add_and_stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            generate.main([*argv, f"--out={out}"])
    monkeypatch.setattr(pieces, "add", add)
    with pytest.raises(UserError, match="other config"):
        generate.main([*argv, f"--out={out}", "--config.seed=1"])
    assert not out.exists()
    generate.main([*argv, f"--out={out}"])
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert "goes on after 16 of 20 prompts" in capsys.readouterr().out
    assert jax.device_count() == 8 and not (tmp_path / "out.jsonl.pieces").exists()
