"""Rewards that packages of the field check: IFEval's instructions, mathematical values."""

import sys

import pytest
from test_questions import IFEVAL

from nca_jax.checks import UserError
from nca_jax.rewards.scorers import get_scorer


@pytest.mark.torch  # of the extra eval, which is installed beside it
def test_ifeval_gives_the_share_of_the_instructions_that_are_followed():
    pytest.importorskip("langdetect")
    pytest.importorskip("lm_eval")
    scorer = get_scorer("ifeval")
    texts = ["word " * 300, "few words", "few, and a comma", ""]
    assert scorer([IFEVAL] * 4, texts).tolist() == [1, 0.5, 0, 0]
    with pytest.raises(UserError, match="IFEval has no instruction x:y"):
        scorer([IFEVAL | {"instruction_id_list": ["x:y"], "kwargs": [{}]}], ["a"])


@pytest.mark.torch
def test_math_compares_values_however_they_are_written():
    pytest.importorskip("math_verify")
    texts = ["So it is $0.5$.", r"Thus $\frac{1}{2}$.", "The answer is 2."]
    assert get_scorer("math")([{"answer": "1/2"}] * 3, texts).tolist() == [1, 1, 0]


@pytest.mark.parametrize("change", [{"kwargs": [{}]}, {"instruction_id_list": []}, {"prompt": []}])
def test_a_record_that_ifeval_cannot_check_is_refused_by_its_place(change):
    get_scorer("ifeval").check("f:1", IFEVAL)
    with pytest.raises(UserError, match="f:1: the scorer ifeval wants a prompt of text"):
        get_scorer("ifeval").check("f:1", IFEVAL | change)


@pytest.mark.parametrize(("name", "package"), [("ifeval", "lm_eval"), ("math", "math_verify")])
def test_without_the_extra_a_scorer_says_which_to_install(monkeypatch, name, package):
    for module in list(sys.modules):
        if module.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"needs: pip install 'nca_jax\[eval\]'"):
        get_scorer(name)([IFEVAL | {"answer": 1}], ["a"])
