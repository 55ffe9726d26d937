"""Supervised fine-tuning beside transformers' own loss, on the same tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

from families import VOCAB, read_params, write_family  # noqa: E402  (torch may not be there)
from helpers import data_config, encode_one  # noqa: E402
from make_families import load  # noqa: E402

from nca_jax.batch import Rows  # noqa: E402
from nca_jax.data.pipeline import Dataset  # noqa: E402
from nca_jax.data.table import table_of  # noqa: E402
from nca_jax.flags import parse_flags  # noqa: E402
from nca_jax.losses import LOSSES  # noqa: E402
from nca_jax.metrics import prompt_weights  # noqa: E402
from nca_jax.train_step import make_logps, responses_of  # noqa: E402

pytestmark = pytest.mark.torch
NUM = 5


def conversations(config) -> list:
    """Examples of random ids, of whose tokens half are scored."""
    rng, found = np.random.default_rng(0), []
    for i in range(NUM):
        record = {
            "prompt_ids": rng.integers(3, VOCAB, 3 + i).tolist(),
            "response_ids": [rng.integers(3, VOCAB, 6 + 2 * i).tolist()],
            "scores": [0],
        }
        example = encode_one(record, config, least_responses=1)
        scored = rng.random(6 + 2 * i) < 0.5
        group = example.group._replace(scored=(scored | (np.arange(len(scored)) == 1),))
        found.append(dataclasses.replace(example, group=group))
    return found


def test_a_step_has_the_loss_and_the_gradient_of_transformers(tmp_path):
    config = data_config(
        num_responses=1, batch_size=NUM, rows=1, max_response_len=32, shuffle=False
    )
    examples = conversations(config)
    batch = Dataset([table_of(examples)], config, seed=0).batch_at(0).batch
    rows = Rows(*(jnp.asarray(x).reshape(-1, *x.shape[2:]) for x in batch.rows))
    model, params = read_params(write_family(tmp_path, "mistral"))
    theirs = load(tmp_path)

    run = parse_flags(["x", "--config=configs/sft.py:files=x,model=tiny"])[0]
    run = run.copy_and_resolve_references()
    with run.unlocked():
        run.data.block, run.loss.logits_chunk = config.block, 16
    loss, fields = LOSSES["likelihood"], {x: run.loss[x] for x in LOSSES["likelihood"].fields}

    def step_loss(params):
        logps = make_logps(model, run, shape=(NUM, 1))(params, rows)
        given = responses_of(batch, logps, None)
        weights = prompt_weights(loss, given, fields)
        return (weights * loss.per_prompt(given, fields)).sum() / weights.sum()

    found, gradient = jax.jit(jax.value_and_grad(step_loss))(params)
    length = max(len(x.group.prompt) + len(x.group.responses[0]) for x in examples)
    ids, labels = np.zeros((NUM, length), int), np.full((NUM, length), -100)
    there = np.zeros((NUM, length), int)
    for b, example in enumerate(examples):
        prompt, (response,), _, (scored,) = example.group
        end = len(prompt) + len(response)
        ids[b, :end], there[b, :end] = [*prompt, *response], 1
        labels[b, len(prompt) : end] = np.where(scored, response, -100)
    wanted = theirs(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(there), labels=torch.tensor(labels)
    ).loss
    wanted.backward()
    wanted_norm = torch.sqrt(sum((p.grad**2).sum() for p in theirs.parameters()))
    np.testing.assert_allclose(found, wanted.item(), rtol=1e-5)
    np.testing.assert_allclose(optax.tree.norm(gradient), wanted_norm.item(), rtol=1e-4)
