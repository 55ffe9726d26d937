"""What is kept in the memory of the devices' host changes no number."""

import jax
import numpy as np
import pytest
from helpers import id_record, make_encoder
from ml_collections import ConfigDict

from nca_jax import build, programs
from nca_jax.axes import HOST_MEMORY
from nca_jax.data.pipeline import Dataset
from nca_jax.data.table import table_of
from nca_jax.flags import parse_flags
from nca_jax.infra import checkpoint
from nca_jax.infra.mesh import put_batch
from nca_jax.train_step import Frozen

KEPT = ConfigDict({"keep_last": 1, "best_metric": ""})


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Some donated buffers")
@pytest.mark.parametrize("fsdp", [1, 4])
def test_moments_in_the_hosts_memory_are_saved_restored_and_give_the_same_bits(tmp_path, fsdp):
    flags = ["--config=configs/jsonl.py:files=x,smoke,k=3", f"--config.mesh.fsdp={fsdp}"]
    flags += [f"--config.data.rows={fsdp}", "--config.data.row_len=64", "--config.data.block=64"]
    flags += ["--config.loss.logits_chunk=64", "--config.data.max_prompt_len=16"]
    flags += ["--config.data.max_response_len=16"]

    def two_steps(moments: str):
        """Returns the state after two steps, saved and restored between them."""
        config, _ = parse_flags(["x", *flags, f"--config.optim.moments={moments}"])
        run = build.build_for(config, jax.devices()[:fsdp])
        encoder = make_encoder(run.config.data)
        examples = table_of(encoder.record(f"f:{i}", id_record(i)) for i in range(1, 9))
        dataset = Dataset([examples], run.config.data, seed=0)
        optimizer = programs.build_optimizer(run.config, 2)
        abstract, shardings = programs.abstract_state(run, optimizer.tx)
        with (
            jax.set_mesh(run.mesh),
            checkpoint.open_checkpoints(tmp_path / moments, KEPT) as checkpoints,
        ):
            step = programs.jit_train_step(run, optimizer, Frozen())
            init = jax.jit(run.model.init, out_shardings=shardings.params)
            state = programs.start_state(run, optimizer, init(jax.random.key(0)))
            for i in range(2):
                batch = put_batch(run.mesh, dataset.batch_at(i).batch, run.config.data.rows)
                state, _ = step(state, Frozen(), batch)
                checkpoint.save(checkpoints, state, None)
                checkpoints.wait_until_finished()
                state = checkpoint.restore_latest(
                    checkpoints, abstract, shardings, on_damage="stop"
                )
        return state

    want, got = two_steps("device"), two_steps("host")
    assert int(got.step) == 2
    for a, b in zip(*map(jax.tree.leaves, (want, got)), strict=True):
        np.testing.assert_array_equal(a, b)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(got.opt_state) if x.shape}
    assert kinds == {HOST_MEMORY}
