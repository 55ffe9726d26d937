"""Named sizes have as many parameters as their makers publish."""

import math

import pytest

from nca_jax.model_config import MODELS
from nca_jax.models.formats import names

# Billions, to the digits that are given: in the papers and model cards of Mistral, Mixtral, Llama 3
# and SmolLM, the Qwen3 report (tables 1, 2), the OLMo 2 and Olmo 3 cards, those of Phi, Granite's
# files. Gemma's layers have 2,024,517,888 and 8,324,201,984 (arXiv:2408.00118, table 2), 698M and
# 3,209M (arXiv:2503.19786, table 1); the embeddings are those of the files.
PUBLISHED = {
    "smollm2_135m": "0.135",
    "smollm3_3b": "3.08",
    "qwen3_0_6b": "0.6",
    "qwen3_8b": "8.2",
    "qwen3_30b_a3b": "30.5",
    "qwen3_235b_a22b": "235",
    "mistral_7b": "7.24",
    "mixtral_8x7b": "46.7",
    "llama3_8b": "8.03",
    "olmo2_1b": "1.48",
    "olmo2_7b": "7.3",
    "olmo3_7b": "7.3",
    "olmo3_32b": "32.2",
    "gemma2_2b": "2.61",
    "gemma2_9b": "9.24",
    "gemma3_1b": "1.00",
    "gemma3_4b": "3.88",
    "granite3_2b": "2.53",
    "granite3_8b": "8.17",
    "phi3_mini_4k": "3.82",
    "phi4": "14.7",
}


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("tiny")])
def test_a_named_size_has_as_many_parameters_as_is_published(name):
    config, sizes = MODELS[name], names.axis_sizes(MODELS[name])
    count = sum(
        math.prod(sizes[axis] for axis in entry.stacked) * math.prod(entry.tensor_shape(config))
        for entry in names.entries(config)
    )
    digits = len(PUBLISHED[name].partition(".")[2])
    assert f"{count / 1e9:.{digits}f}" == PUBLISHED[name]
