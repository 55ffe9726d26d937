"""Every family computes what PyTorch does; its numbers are in data/families.npz."""

import numpy as np
import pytest
from families import FAMILIES, GOLDEN, families, greedy, packed_logits, read_params, write_family


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


FAST = (*list(FAMILIES)[:10], "olmo3", "phi3 with longrope", "gemma2")


@pytest.mark.parametrize("name", families(but=FAST, mark="slow"))
def test_logits_of_packed_rows_and_greedy_tokens_are_pytorchs(tmp_path, golden, name):
    model, params = read_params(write_family(tmp_path, name))
    found = packed_logits(model, params)
    np.testing.assert_allclose(found, golden[f"{name}/logits"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(greedy(model, params), golden[f"{name}/greedy"])


def test_the_golden_file_has_every_family_and_no_other(golden):
    assert {key.split("/")[0] for key in golden} == set(FAMILIES)
