r"""A peer's DPO step, compiled for TPUs that are not there: what `nca_jax.aot` says of ours.

    PYTHON -m experiments.pods.peers.peer_step --peer=tunix --json=FILE --topology=v6e:4x4 \
        --pairs=1 --dtype=float32 --program=train [--layers=32] [--code]

Run by a Python of its own that has requirements.txt. Both peers train by Tunix's DPOTrainer, of
which a step is two programs: `reference`, which it calls where it prepares a batch, and `train`.
Compiled are the trainer's own jitted functions, for Llama-3-8B with the peer's own sharding, all
chips in `fsdp`, every layer computed again in the backward pass. A pair is two rows of 512 + 512
tokens.

    --peer   tunix: its Llama 3 class; maxtext: MaxText's decoder, as its train_dpo.py has it
    --pairs  a chip
    --dtype  of weights, and so of gradients and moments
    --code   generates code too, as of `nca_jax.aot`
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.interpreters import pxla
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.models.llama3 import model as llama3
from tunix.sft.dpo import dpo_trainer

from nca_jax.compiled.program import program_report
from nca_jax.compiled.topology import topology_devices
from nca_jax.files import write_json

PROMPT_LEN, RESPONSE_LEN = 512, 512  # tokens


class Peer(NamedTuple):
    """A model, to be made under `nnx.eval_shape`, and where it is put."""

    make: Callable[[], nnx.Module]
    mesh: Mesh
    shardings: Callable[[nnx.State], nnx.State]
    context: Callable[[], AbstractContextManager]  # in which it is made and traced


def tunix(args: argparse.Namespace, devices: Sequence[jax.Device]) -> Peer:
    config = dataclasses.replace(
        llama3.ModelConfig.llama3p1_8b(),
        num_layers=args.layers,
        remat_config=llama3.RematConfig.DECODER,
    )
    mesh = Mesh(np.array(devices).reshape(-1, 1), ("fsdp", "tp"))
    llama3.shard = constrain

    def make() -> nnx.Module:
        model = llama3.Llama3(config, rngs=nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda x: x.astype(args.dtype), nnx.state(model)))
        return model

    def shardings(state: nnx.State) -> nnx.State:
        specs = nnx.get_partition_spec(state)
        return jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), state, specs)

    return Peer(make, mesh, shardings, lambda: mesh)


def constrain(x: jax.Array, spec: tuple[str | None, ...]) -> jax.Array:
    """Does what `llama3.shard` does on a TPU; that one asks the live backend, a CPU here."""
    mesh = pxla.thread_resources.env.physical_mesh
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def maxtext(args: argparse.Namespace, devices: Sequence[jax.Device]) -> Peer:
    import maxtext as package
    from flax.core.spmd import logical_axis_rules
    from maxtext.configs import pyconfig
    from maxtext.integration.tunix.tunix_adapter import TunixMaxTextAdapter
    from maxtext.utils import maxtext_utils, model_creation_utils, sharding

    fields = {
        "model_name": "llama3.1-8b",
        "override_model_config": True,
        "base_num_decoder_layers": args.layers,
        "weight_dtype": args.dtype,
        "max_target_length": PROMPT_LEN + RESPONSE_LEN,
        "per_device_batch_size": 2 * args.pairs,
        "compile_topology": f"{args.topology.partition(':')[0]}-{len(devices)}",
        "compile_topology_num_slices": 1,
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
        "run_name": "peer",
        "base_output_directory": str(args.json.parent),  # nothing is written
    }
    dpo = Path(package.__file__).parent / "configs/post_train/dpo.yml"
    config = pyconfig.initialize_pydantic(["", str(dpo), *(f"{k}={v}" for k, v in fields.items())])
    placed = maxtext_utils.create_device_mesh(config, devices)
    auto = (jax.sharding.AxisType.Auto,) * len(config.mesh_axes)
    mesh = Mesh(placed, config.mesh_axes, axis_types=auto)
    create = model_creation_utils.get_nnx_create_model_fn(config, mesh)

    def context() -> AbstractContextManager:
        stack = ExitStack()
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(logical_axis_rules(config.logical_axis_rules))
        return stack

    return Peer(
        lambda: TunixMaxTextAdapter(base_model=create(), pad_id=0),
        mesh,
        lambda state: sharding.nnx_construct_named_sharding(state, mesh),
        context,
    )


PEERS = {"tunix": tunix, "maxtext": maxtext}


def on_mesh(node: Any, peer: Peer) -> Any:
    """Returns a model or an optimizer of shapes, each with the sharding that its metadata names."""
    graphdef, state = nnx.split(node)

    def place(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return nnx.merge(graphdef, jax.tree.map(place, state, peer.shardings(state)))


def make_example(pairs: int, mesh: Mesh) -> dpo_trainer.TrainExample:
    """Returns the shapes of what the trainer prepares of a batch."""
    rows, length = 2 * pairs, PROMPT_LEN + RESPONSE_LEN
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))

    def shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    return dpo_trainer.TrainExample(
        input_ids=shape(jnp.int32, rows, length),
        positions=shape(jnp.int32, rows, length),
        attention_mask=shape(jnp.bool_, rows, length, length),
        ref_chosen_logps=shape(jnp.float32, pairs),
        ref_rejected_logps=shape(jnp.float32, pairs),
        completion_mask=shape(jnp.int32, rows, RESPONSE_LEN),
        logits_to_keep=RESPONSE_LEN,
    )


def lower_train(peer: Peer, example: dpo_trainer.TrainExample) -> jax.stages.Lowered:
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(5e-6, b1=0.9, b2=0.999, weight_decay=0.0)
    )
    training = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, beta=0.1)
    trainers = []

    def make() -> tuple[nnx.Module, nnx.Optimizer]:
        model = peer.make()
        trainers.append(dpo_trainer.DPOTrainer(model, None, optimizer, training))
        return model, trainers[0].optimizer

    with peer.context():
        model, state = (on_mesh(node, peer) for node in nnx.eval_shape(make))
    step, _ = trainers[0].jit_train_and_eval_step()  # in a mesh it would place what is a shape
    with peer.context():
        return step.func.lower(model, state, example).lowered


def lower_reference(peer: Peer, x: dpo_trainer.TrainExample) -> jax.stages.Lowered:
    inputs = (x.input_ids, x.positions, x.attention_mask, x.logits_to_keep, x.completion_mask)
    with peer.context():
        model = on_mesh(nnx.eval_shape(peer.make), peer)
        return dpo_trainer.compute_logps.lower(model, *inputs).lowered


LOWER = {"train": lower_train, "reference": lower_reference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--peer", required=True, choices=PEERS)
    parser.add_argument("--topology", default="v6e:4x4")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--program", required=True, choices=LOWER)
    parser.add_argument("--code", action="store_true")
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = "--xla_dump_hlo_module_re=.*"  # MaxText's own would leave ours out
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # as `program_report` wants it
    devices = topology_devices(args.topology, 1)
    start = time.perf_counter()
    peer = PEERS[args.peer](args, devices)
    lowered = LOWER[args.program](peer, make_example(args.pairs * peer.mesh.size, peer.mesh))
    slices = [0] * peer.mesh.size
    report = program_report(lowered, devices[0].device_kind, slices, with_code=args.code)
    write_json(args.json, report | {"compile_seconds": time.perf_counter() - start})
    os._exit(0)  # the compiler would go on, and make code


if __name__ == "__main__":
    main()
