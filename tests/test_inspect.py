"""nca_jax.inspect shows what the model will see."""

import json
import re

import pytest

from nca_jax import inspect


@pytest.fixture
def shown(tmp_path, capsys):
    """The output for two rows, the first of which is shown."""
    rows = [
        {"prompt": "Say one:", "responses": ["sun", "a moon"], "scores": [1.0, 0.0]},
        {"prompt": "Say two:", "responses": ["wind", "salt"], "scores": [0.5, 0.25]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inspect.main(
        [
            "inspect",
            f"--config=configs/jsonl.py:files={path},k=2,alpha=1,smoke",
            "--rows=2",
            "--config.data.rows=8",
            "--config.data.batch_size=2",
            "--config.data.shuffle=False",
            "--config.data.eval_fraction=0",
            "--config.eval_every=0",
        ]
    )
    return capsys.readouterr().out


def test_inspect_shows_text_tokens_segments_scores_and_targets(shown):
    assert "rows.jsonl:1" in shown and "rows.jsonl:2" in shown
    assert "segment 1, the prompt; 8 tokens" in shown
    # Bytes are shifted by the 3 special ids; a response ends with </s> = 1.
    assert f"ids  {[ord(c) + 3 for c in 'Say one:']}" in shown
    assert f"ids  {[*(ord(c) + 3 for c in 'sun'), 1]}" in shown
    assert "Say one:" in shown and "a moon</s>" in shown
    assert "response 0: score 1, target 0.7311" in shown  # 1 / (1 + 1/e)
    assert "response 1: score 0, target 0.2689" in shown
    assert "positions 8..11, scored" in shown


def test_inspect_shows_packing_and_the_histogram_of_lengths(shown):
    assert "step 1: 1 micro-batches of 8 rows of 512 tokens" in shown
    assert "scored_tokens 21" in shown and "needed_tokens 37" in shown
    assert "=== prompts: 2, mean 8.0 tokens, longest 8" in shown
    assert "=== responses: 4, mean 5.2 tokens, longest 7" in shown
    assert "2 training prompts, 0 held out, 10 steps of 2 prompts (10 epochs) on" in shown


def test_inspect_says_what_a_step_sees_what_suits_the_data_and_what_memory_it_takes(shown):
    assert "each step sees 2 prompts with 2 responses each. Step 1 takes 8 rows of 512" in shown
    assert "config.data.row_len=256 (now 512): the longest prompt with its responses takes" in shown
    assert re.search(r"config\.loss\.alpha=[\d.]+ \(now 1\): the best response then has", shown)
    assert "config.data.batch_size=2: 1 step in a pass over 2 prompts" in shown
    places = ("1 CPU", "1 GPU", "8 GPUs", "1 TPU", "8 TPUs")
    assert all(f"\n{place} " in shown for place in places) and "fits v4, v5e, v5p, v6e" in shown
