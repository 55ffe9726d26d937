"""Beside bitsandbytes itself: folders that transformers quantised with it, read as they are."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from families import VOCAB, packed_logits, read_params  # noqa: E402  (torch may not be there)
from make_families import torch_logits  # noqa: E402
from make_nf4_folder import dense, dequantised, make  # noqa: E402

from nca_jax.models.formats import names  # noqa: E402
from nca_jax.models.formats.hf import open_hf, tensor_names  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("model_type, double", [("mistral", False), ("qwen3", True)])
def test_a_folder_of_4_bits_gives_the_values_and_logits_of_its_model(tmp_path, model_type, double):
    theirs = make(tmp_path, double=double, model_type=model_type)
    folder = tmp_path / "quantised"
    config, params = open_hf(folder)
    held = names.places(config, tensor_names(model_type))
    for name, value in dequantised(theirs).items():
        ours = names.read_tensor(config, params, held[name])
        np.testing.assert_array_equal(ours, value.numpy(), err_msg=name)
    logits = packed_logits(*read_params(folder))
    np.testing.assert_allclose(
        logits, torch_logits(dense(theirs, tmp_path))[:, :VOCAB], rtol=0, atol=1e-4
    )


def test_what_is_quantised_here_is_what_bitsandbytes_makes_of_the_same_model(tmp_path):
    make(tmp_path, double=False)
    whole, stored = (open_hf(tmp_path / name)[1] for name in ("whole", "quantised"))
    for path, param in whole.items():
        here, there = param.nf4, stored[path].nf4
        if here is None or there is None:
            assert here is there
            continue
        assert (here.num_stored, there.num_stored) == (0, 2)
        for ours, theirs in ((here.codes, there.codes), (here.absmax, there.absmax)):
            index = (slice(None),) * len(ours.shape)
            np.testing.assert_array_equal(ours.read(index), theirs.read(index), err_msg=path)
