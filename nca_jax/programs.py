"""The jitted programs of a run, and the shapes and shardings of what they take."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped
from ml_collections import ConfigDict

from nca_jax.axes import Params
from nca_jax.batch import Batch, Rows
from nca_jax.build import Run
from nca_jax.checks import UserError
from nca_jax.data.group import Group
from nca_jax.data.pack import pack
from nca_jax.data.released import key_off_ids
from nca_jax.data.room import row_layout
from nca_jax.evaluators import HostLogps, score_responses
from nca_jax.infra.mesh import (
    batch_shardings,
    check_split,
    in_host,
    param_shardings,
    put_batch,
    put_whole,
    row_shards,
    rows_shardings,
    with_shardings,
)
from nca_jax.infra.optim import make_optimizer, make_schedule, merge_trained
from nca_jax.params import abstract_base
from nca_jax.sampling.draw import How
from nca_jax.sampling.refill import Programs
from nca_jax.sampling.sampler import lane_specs, make_sampler
from nca_jax.sampling.serving import serving_dtypes, serving_mesh
from nca_jax.train_step import Frozen, TrainState, make_logps, make_step_logps, make_train_step

# Log-probability of every response of groups, in order: -> [responses] float32 nats
GroupLogps = Callable[[Params, Sequence[Group]], np.ndarray]


class Optimizer(NamedTuple):
    tx: optax.GradientTransformation
    schedule: optax.Schedule


def build_optimizer(config: ConfigDict, steps: int, more_steps: Sequence[int] = ()) -> Optimizer:
    """Returns the optimizer of a run of so many steps, and its learning rate by step.

    Args:
      more_steps: of each extension, which goes through the schedule anew from its peak.
    """
    schedule = make_schedule(config.optim, steps)
    if more_steps:
        restarted = config.optim.copy_and_resolve_references()
        restarted.update(warmup_frac=0.0)  # Adam's moments are there
        parts = [schedule, *(make_schedule(restarted, n) for n in more_steps)]
        ends = itertools.accumulate([steps, *more_steps[:-1]])
        schedule = optax.join_schedules(parts, list(ends))
    ratio = config.lora.b_lr_ratio if "lora" in config else 1.0
    return Optimizer(make_optimizer(config.optim, schedule, b_lr_ratio=ratio), schedule)


def abstract_state(run: Run, tx: optax.GradientTransformation) -> tuple[TrainState, TrainState]:
    """Returns the shapes of a TrainState, and their shardings."""
    shapes = jax.eval_shape(functools.partial(_new_state, tx), run.model.abstract_trained())
    shardings = param_shardings(run.mesh, shapes)
    large = shapes if run.model.lora is None else run.model.base.abstract_params()
    check_split(run.mesh, large, param_shardings(run.mesh, large), copied_over="data")
    if run.config.optim.moments == "host":
        shardings = shardings._replace(opt_state=in_host(shapes.opt_state, shardings.opt_state))
    return shapes, shardings


def abstract_policy(run: Run) -> Params:
    """Returns the shapes and shardings of what a model is given: with adapters, also their base."""
    shapes = _policy_shapes(run)
    return with_shardings(shapes, param_shardings(run.mesh, shapes))


def _policy_shapes(run: Run) -> Params:
    return merge_trained(run.model.abstract_trained(), abstract_base(run) or {})


def serving_run(run: Run) -> Run:
    """Returns the run on the mesh of `config.generate.mesh`: what sampling programs are jitted for.

    Its parameters come from `serving_params`. It is the run itself where the meshes are one.
    """
    weights = serving_dtypes(_policy_shapes(run), run.model.dtype)
    asked = run.config.generate.mesh
    return run._replace(mesh=serving_mesh(asked, run.mesh, run.model.config, weights))


def abstract_served(run: Run) -> Params:
    """Returns the shapes and shardings of what samples, on the mesh of a `serving_run`."""
    shapes = serving_dtypes(_policy_shapes(run), run.model.dtype)
    return with_shardings(shapes, param_shardings(run.mesh, shapes))


def abstract_batch(run: Run, *, has_ref_logps: bool) -> Batch[jax.ShapeDtypeStruct]:
    """Returns the shapes of every batch of a run, with or without a cached reference's."""
    data = run.config.data
    b, k, layout = data.batch_size, data.num_responses, row_layout(data)
    one_row, _, _ = pack(
        [], dataclasses.replace(layout, rows=1), slots=[], num_slots=b * k, num_micro=1
    )
    num_micro = -(-b // layout.rows)

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    return Batch(
        Rows(*(shape(x.dtype, num_micro, layout.rows, *x.shape[2:]) for x in one_row)),
        num_micro=shape(jnp.int32),
        micro_of_prompt=shape(jnp.int32, b),
        scores=shape(jnp.float32, b, k),
        mask=shape(jnp.bool, b, k),
        lengths=shape(jnp.int32, b, k),
        ref_logps=shape(jnp.float32, b, k) if has_ref_logps else None,
    )


def _new_state(tx: optax.GradientTransformation, params: Params) -> TrainState:
    return TrainState(jnp.int32(0), params, tx.init(params))


def start_state(run: Run, optimizer: Optimizer, params: Params) -> TrainState:
    """Returns the state before the first update, sharded; the parameters are donated to it."""
    _, shardings = abstract_state(run, optimizer.tx)
    make = functools.partial(_new_state, optimizer.tx)
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)


def renewed(optimizer: Optimizer, state: TrainState) -> TrainState:
    """Returns a state with new moments, whose learning rate goes on where it was."""
    fresh = jax.jit(optimizer.tx.init, out_shardings=jax.tree.map(lambda x: x.sharding, state[2]))(
        state.params
    )

    def is_schedule(x: object) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    def one(new, old):
        return old if is_schedule(new) else new

    return state._replace(opt_state=jax.tree.map(one, fresh, state.opt_state, is_leaf=is_schedule))


def jit_step_logps(run: Run) -> HostLogps:
    """Returns `step_logps(params, batch) -> [B, K]` of a batch on the host; see `train_step`."""
    step_logps = jax.jit(
        make_step_logps(run.model, run.config),
        in_shardings=(None, batch_shardings(run.mesh)),
        out_shardings=NamedSharding(run.mesh, P()),
        compiler_options=run.compiler_options,
    )
    num_rows = run.config.data.rows
    return lambda params, batch: step_logps(params, put_batch(run.mesh, batch, num_rows))


def jit_rows_logps(run: Run, num_slots: int) -> Wrapped:
    """Returns `logps(params, rows) -> [1, num_slots]` of one micro-batch, jitted."""
    return jax.jit(
        make_logps(run.model, run.config, shape=(1, num_slots)),
        in_shardings=(None, rows_shardings(run.mesh)),
        out_shardings=NamedSharding(run.mesh, P()),
        compiler_options=run.compiler_options,
    )


def make_group_logps(run: Run, num_slots: int) -> GroupLogps:
    """Returns `logps(params, groups) -> [responses]`, so many responses packed together."""
    of_rows, layout = jit_rows_logps(run, num_slots), row_layout(run.config.data)

    def logps(params: Params, groups: Sequence[Group]) -> np.ndarray:
        return score_responses(
            lambda rows: np.asarray(of_rows(params, rows))[0],
            groups,
            layout,
            num_slots=num_slots,
            mesh=run.mesh,
        )

    return logps


def jit_train_step(run: Run, optimizer: Optimizer, frozen: Frozen) -> Wrapped:
    """Returns `train_step(state, frozen, batch)`, jitted over the mesh; see `train_step`.

    The state is donated. Of `frozen` only the shapes count here.
    """
    _, state = abstract_state(run, optimizer.tx)
    return jax.jit(
        make_train_step(run.model, optimizer.tx, optimizer.schedule, run.config),
        in_shardings=(state, param_shardings(run.mesh, frozen), batch_shardings(run.mesh)),
        out_shardings=(state, NamedSharding(run.mesh, P())),
        donate_argnums=0,
        compiler_options=run.compiler_options,
    )


def prompts_at_once(run: Run) -> int:
    """Returns N: what `config.generate.batch_size` asks for, rounded up to fill every device."""
    how, shards = run.config.generate, row_shards(run.mesh)
    return -(-max(1, how.batch_size // how.num_samples) // shards) * shards


def drawn_how(run: Run) -> How:
    """Returns how `config.generate` has tokens drawn."""
    how = run.config.generate
    return How(how.temperature, how.top_k, how.top_p, how.min_p)


def jit_sampler(run: Run) -> Programs:
    """Returns sampling as `config.generate` says, jitted over the mesh; see `sampling.sampler`.

    Raises:
      UserError: the model is a reward model.
    """
    if run.model.config.num_labels:
        raise UserError("config.model.head='reward' writes no responses; sample from a policy.")
    how, num_lanes, shards = run.config.generate, prompts_at_once(run), row_shards(run.mesh)
    sampler = make_sampler(
        run.model,
        num_samples=how.num_samples,
        max_new_tokens=how.max_new_tokens,
        how=drawn_how(run),
        eos_ids=run.eos_ids,
        key_off_ids=(
            key_off_ids(run.tokenizer, run.eos_ids) if run.config.data.format == "released" else ()
        ),
        logps=how.logps,
    )
    everywhere = NamedSharding(run.mesh, P())
    lanes = jax.tree.map(
        lambda spec: NamedSharding(run.mesh, spec), lane_specs(), is_leaf=lambda x: isinstance(x, P)
    )
    jit = functools.partial(jax.jit, compiler_options=run.compiler_options)
    empty = functools.partial(sampler.empty, num_lanes)
    return Programs(
        empty=jax.jit(empty, static_argnums=0, out_shardings=lanes),
        resize=jax.jit(
            sampler.resize, static_argnums=1, in_shardings=(lanes,), out_shardings=lanes
        ),
        prefill=jit(
            sampler.prefill,
            in_shardings=(None, lanes, everywhere, everywhere, everywhere, None),
            out_shardings=lanes,
            donate_argnums=1,
        ),
        decode=jit(
            sampler.decode,
            in_shardings=(None, lanes, everywhere),
            out_shardings=(lanes, everywhere),
            donate_argnums=1,
        ),
        put=lambda x: put_whole(x, everywhere),
        num_lanes=num_lanes,
        num_samples=how.num_samples,
        at_once=max(1, num_lanes // (4 * shards)) * shards,
    )
