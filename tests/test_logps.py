"""`nca-jax logps`: every response of every record, with what the method says of it."""

import json
import shutil

import jax
import numpy as np
import pytest
from old_run import FLAGS, OLD

from nca_jax import build, logps
from nca_jax.data.pipeline import eval_batches
from nca_jax.data.table import joined
from nca_jax.flags import parse_flags
from nca_jax.params import policy_params
from nca_jax.programs import jit_step_logps


@pytest.mark.slow
def test_logps_are_those_of_a_step_under_policy_and_reference(tmp_path):
    workdir, out = shutil.copytree(OLD / "workdir", tmp_path / "run"), tmp_path / "out.jsonl"
    logps.main(["logps", *FLAGS, f"--workdir={workdir}", f"--out={out}"])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record["split"] for record in records} == {"train", "eval"}

    config, _ = parse_flags(["x", *FLAGS])
    run, data = build.read_all(config)
    config = run.config
    examples = joined([data.training, data.heldout])
    assert [record["where"] for record in records] == [example.where for example in examples]
    some = examples[:8]
    with jax.set_mesh(run.mesh):
        step_logps = jit_step_logps(run)
        for name, of in (("logps", str(workdir)), ("ref_logps", "")):
            params = policy_params(run, of)
            batches = eval_batches(some, config.data)
            want = np.concatenate([step_logps(params, host.batch) for host in batches])
            got = [record[name] for record in records[:8]]
            np.testing.assert_allclose(got, want, atol=1e-4)
    assert [record["lengths"] for record in records[:8]] == [
        [len(ids) for ids in example.group.responses] for example in some
    ]
    assert records[0]["logps"] != pytest.approx(records[0]["ref_logps"], abs=1e-3)
