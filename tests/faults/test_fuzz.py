"""Whatever a record or a config.json holds, it is read as it says, or refused."""

import json

import pytest
from helpers import CONFIGS, data_config, hf_json, make_encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from nca_jax.checks import UserError
from nca_jax.data.sources import JsonlSource
from nca_jax.model_config import ModelConfig
from nca_jax.models.formats.hf import parse_config

TEXT = st.text(max_size=8) | st.sampled_from(["", " ", "\n", "</s>", "a\x00b", "\ud800"])
SCALAR = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT
    | st.sampled_from([10**400, -1, 0, 1e39, "7.5", "nan"])
)  # fmt: skip
JSON = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", ""]) | TEXT
MESSAGE = st.fixed_dictionaries({"role": ROLE | JSON, "content": TEXT | JSON})
CONVERSATION = st.lists(MESSAGE, max_size=4)
ANSWER = TEXT | CONVERSATION | JSON
ASKED = [{"role": "user", "content": "q"}]
SOUND = [
    {"prompt": "q", "responses": ["a", "b"], "scores": [1, 0.5]},
    {"prompt": ASKED, "responses": ["a", "bc"], "scores": [1, 0]},
    {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 7, "score_rejected": 3},
    {"prompt": "q", "chosen": [*ASKED, {"role": "assistant", "content": "a"}],
     "rejected": [*ASKED, {"role": "assistant", "content": "b"}]},
    {"chosen": [*ASKED, {"role": "assistant", "content": "a"}],
     "rejected": [*ASKED, {"role": "assistant", "content": "b"}]},
    {"prompt_ids": [5, 6], "response_ids": [[7, 1], [8, 1]], "scores": [0, 1]},
    {"prompt": "q", "responses": ["a", ""], "scores": [1, 0], "prompt_ids": [5],
     "response_ids": [[7], [1]], "finished": [False, True], "tokenizer": "none"},
]  # fmt: skip
CHANGE = st.fixed_dictionaries(
    {},
    optional={
        "prompt": TEXT | CONVERSATION | JSON,
        "responses": st.lists(ANSWER, max_size=4) | JSON,
        "scores": st.lists(SCALAR, max_size=4) | st.lists(st.floats(0, 1), max_size=4) | JSON,
        "chosen": ANSWER,
        "rejected": ANSWER,
        "score_chosen": SCALAR,
        "score_rejected": SCALAR,
        "prompt_ids": st.lists(st.integers(-1, 300), max_size=4) | JSON,
        "response_ids": st.lists(st.lists(st.integers(-1, 300), max_size=3), max_size=4) | JSON,
        "finished": st.lists(st.booleans(), max_size=4) | JSON,
        "tokenizer": st.sampled_from(["none", "other"]) | JSON,
        "answer": JSON,
    },
)
# A sound record with one or two of its values changed, or as many as there are.
FEW = st.tuples(CHANGE, st.randoms()).map(
    lambda drawn: dict(drawn[1].sample(sorted(drawn[0].items()), min(2, len(drawn[0]))))
)
RECORD = st.builds(lambda sound, change: sound | change, st.sampled_from(SOUND), FEW | CHANGE)
# Fields of which every other value that is accepted is another model.
CHANGES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_with(template: str | None) -> ByT5Tokenizer:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("format", ("plain", "chat", "released"))
def test_any_record_is_read_as_it_says_or_refused(format, tries, seed, tally, tmp_path):
    tokenizer = tokenizer_with(TEMPLATE)
    limits = dict(max_prompt_len=64, max_response_len=64, row_len=512)
    encoder = make_encoder(data_config(format=format, **limits), tokenizer, vocab_size=259)

    @with_seed(seed)
    @settings(max_examples=20 * tries, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(RECORD)
    def check(record):
        # As it comes from a file: what JSON cannot hold is not in one.
        record = json.loads(json.dumps(record))
        try:
            example = encoder.record("f:1", record)
        except UserError as error:
            assert str(error)
            tally.refused(f"any record, {format}")
            return
        texts = record.get("responses")
        is_text = record.keys() == {"prompt", "responses", "scores"} and all(
            isinstance(text, str) and "</s>" not in text for text in texts
        )
        if format == "plain" and is_text:
            said = [bytes(i - 3 for i in ids if i >= 3) for ids in example.group.responses]
            assert said == [text.encode() for text in texts if text]  # an empty one is left out
        tally.survived(f"any record, {format}")

    check()


def test_any_line_of_a_file_is_a_record_or_refused(tries, seed, tally, tmp_path):
    path = tmp_path / "f.jsonl"

    @with_seed(seed)
    @settings(max_examples=10 * tries, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.binary(max_size=40) | st.sampled_from(["[", '{"a":', "1"]))
    def check(line):
        path.write_bytes((line if isinstance(line, bytes) else line.encode() * 100_000) + b"\n")
        try:
            source = JsonlSource(str(path))
            records = [source[i] for i in range(len(source))]
        except UserError as error:
            assert str(error)
            tally.refused("any line of a file")
            return
        assert all(isinstance(record, dict) for _, record in records)
        tally.survived("any line of a file")

    check()


@pytest.mark.parametrize("family", CONFIGS)
def test_any_config_json_of_a_model_is_read_as_it_says_or_refused(family, tries, seed, tally):
    sound = hf_json(family, CONFIGS[family])
    base = parse_config(dict(sound), {})
    fields = st.sampled_from([*sound, "rope_scaling", "rope_parameters", "layer_types", "mlp_bias"])
    rope = st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "low_freq_factor",
                         "high_freq_factor", "original_max_position_embeddings"]),
        st.sampled_from(["llama3", "default", "yarn"]) | SCALAR,
    )  # fmt: skip

    @with_seed(seed)
    @settings(max_examples=10 * tries, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(fields, JSON | rope | st.integers(1, 64), JSON)
    def check(field, value, generation):
        raw = dict(sound) | {field: value}
        try:
            found = parse_config(raw, {"eos_token_id": generation})
        except UserError as error:
            assert str(error)
            tally.refused("any config.json of a model")
            return
        assert isinstance(found, ModelConfig)
        if field in CHANGES and value not in (None, sound[field]):
            assert found != base, f"{field}={value!r} changed nothing"
        tally.survived("any config.json of a model")

    check()
