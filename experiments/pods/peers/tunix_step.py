r"""Tunix's DPO step, compiled for TPUs that are not there: what `nca_jax.aot` says of ours.

    PYTHON -m experiments.pods.peers.tunix_step --json=FILE --topology=v6e:4x4 --pairs=1 \
        --dtype=float32 --remat=DECODER --program=train [--layers=32]

Run by a Python of its own that has google-tunix 0.1.7 and libtpu. A step of its DPOTrainer is two
programs: `reference`, which it calls where it prepares a batch, and `train`. Compiled are the
trainer's own jitted functions, for Llama-3-8B with its default sharding, all chips in `fsdp`. A
pair is two rows of 512 + 512 tokens.

    --pairs  a chip
    --dtype  of weights, and so of gradients and moments; the reference is in bfloat16
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

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


def constrain(x: jax.Array, spec: tuple[str | None, ...]) -> jax.Array:
    """Does what `llama3.shard` does on a TPU; that one asks the live backend, a CPU here."""
    mesh = pxla.thread_resources.env.physical_mesh
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def make_model(layers: int, dtype: str, remat: str) -> nnx.Module:
    config = dataclasses.replace(
        llama3.ModelConfig.llama3p1_8b(),
        num_layers=layers,
        remat_config=llama3.RematConfig[remat],
    )
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
    return model


def on_mesh(node: Any, mesh: Mesh) -> Any:
    """Returns a model or an optimizer of shapes, each with the sharding that its metadata names."""
    graphdef, state = nnx.split(node)
    specs = nnx.get_partition_spec(state)

    def place(x: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return nnx.merge(graphdef, jax.tree.map(place, state, specs))


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


def lower_train(args: argparse.Namespace, mesh: Mesh) -> jax.stages.Lowered:
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(5e-6, b1=0.9, b2=0.999, weight_decay=0.0)
    )
    training = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, beta=0.1)
    trainers = []

    def make() -> tuple[nnx.Module, nnx.Optimizer]:
        model = make_model(args.layers, args.dtype, args.remat)
        trainers.append(dpo_trainer.DPOTrainer(model, None, optimizer, training))
        return model, trainers[0].optimizer

    model, state = (on_mesh(node, mesh) for node in nnx.eval_shape(make))
    step, _ = trainers[0].jit_train_and_eval_step()
    with mesh:
        return step.func.lower(model, state, make_example(args.pairs * mesh.size, mesh)).lowered


def lower_reference(args: argparse.Namespace, mesh: Mesh) -> jax.stages.Lowered:
    model = on_mesh(nnx.eval_shape(lambda: make_model(args.layers, "bfloat16", args.remat)), mesh)
    x = make_example(args.pairs * mesh.size, mesh)
    inputs = (x.input_ids, x.positions, x.attention_mask, x.logits_to_keep, x.completion_mask)
    with mesh:
        return dpo_trainer.compute_logps.lower(model, *inputs).lowered


LOWER = {"train": lower_train, "reference": lower_reference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--topology", default="v6e:4x4")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", default="DECODER", choices=[x.name for x in llama3.RematConfig])
    parser.add_argument("--program", required=True, choices=LOWER)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # as `program_report` wants it
    llama3.shard = constrain
    devices = topology_devices(args.topology, 1)
    mesh = Mesh(np.array(devices).reshape(-1, 1), ("fsdp", "tp"))
    start = time.perf_counter()
    lowered = LOWER[args.program](args, mesh)
    report = program_report(lowered, devices[0].device_kind, [0] * mesh.size, with_code=False)
    write_json(args.json, report | {"compile_seconds": time.perf_counter() - start})
    os._exit(0)  # the compiler would go on, and make code


if __name__ == "__main__":
    main()
