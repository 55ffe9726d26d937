"""The device mesh, and arrays placed on it by the rules of `nca_jax.axes`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nca_jax.axes import HOST_MEMORY, MESH_AXES, ROWS, Params, Tree, flatten_paths, param_spec
from nca_jax.batch import Batch, Rows
from nca_jax.checks import UserError
from nca_jax.model_config import ModelConfig
from nca_jax.protocols import Device

# Part of an array by the slice of each axis, as `jax.make_array_from_callback` asks for it.
Read = Callable[[tuple[slice, ...]], np.ndarray]

LARGE = 2**24  # bytes: an array that must not be on every device by accident


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Device] | None = None) -> Mesh:
    """Returns the mesh of `config.mesh`; one size may be -1, all the devices that remain.

    Within a slice the axes follow the interconnect (ICI); over slices, which only the data centre's
    network (DCN) joins, lies `data`: one gradient a micro-batch crosses it.

    Args:
      sizes: of each axis.
      devices: those to use, which need not exist (ahead-of-time compilation); None: all there are.
    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` not to the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in MESH_AXES]
    known = int(np.prod([size for size in shape if size > 0]))
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    asked = ", ".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)
    if int(np.prod(shape)) != len(devices):
        raise UserError(
            f"config.mesh ({asked}) does not fill the {len(devices)} devices; set one axis to -1."
        )
    num_slices = len({slice_of(device) for device in devices})
    if shape[0] % num_slices:
        raise UserError(
            f"config.mesh ({asked}): the axis data lies over the {num_slices} slices of devices; "
            f"set config.mesh.data to a multiple of {num_slices}."
        )
    if num_slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // num_slices, *shape[1:]),
            (num_slices, *[1] * (len(shape) - 1)),
            devices,
            allow_split_physical_axes=True,
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def slice_of(device: Device) -> int:
    """The TPU slice of a device; devices of a single slice, and CPUs, do not say."""
    return getattr(device, "slice_index", 0)


def row_shards(mesh: Mesh) -> int:
    """Returns over how many devices the rows of a micro-batch are split."""
    return _row_shards(mesh.shape)


def _row_shards(sizes: Mapping[str, int]) -> int:
    return int(np.prod([sizes[axis] for axis in ROWS]))


def host_mesh() -> Mesh:
    """Returns a mesh of one CPU device: arrays on it are whole, in the host's memory."""
    device = np.array(jax.devices("cpu")[:1]).reshape((1,) * len(MESH_AXES))
    return Mesh(device, MESH_AXES)


def check_divides(sizes: Mapping[str, int], model_config: ModelConfig, rows: int) -> None:
    """Raises UserError, by name, where what a mesh of these sizes splits does not divide."""
    tensor, fsdp, expert = (sizes[axis] for axis in ("tensor", "fsdp", "expert"))
    c = model_config
    for name, size, parts in (
        ("query heads over mesh.tensor", c.num_heads, tensor),
        ("kv heads over mesh.tensor", c.num_kv_heads, tensor),
        ("MLP width over mesh.tensor", c.mlp_width, tensor),
        ("padded vocabulary over mesh.tensor", c.padded_vocab, tensor),
        ("model width over mesh.fsdp * mesh.expert", c.width, fsdp * expert),
        ("experts over mesh.expert", c.num_experts, expert),
    ):
        if size % parts:
            raise UserError(f"{size} {name} = {parts} does not divide; change one of the two.")
    shards = _row_shards(sizes)
    if rows % shards:
        raise UserError(
            f"{rows} data.rows over mesh.data * mesh.fsdp * mesh.expert = {shards} does not "
            f"divide; set config.data.rows={-(-rows // shards) * shards}."
        )


def check_split(mesh: Mesh, arrays: Any, shardings: Any, *, copied_over: str) -> None:
    """Raises ValueError, by name, if a large array has more copies than the mesh axis asks for.

    Args:
      arrays: a tree of shapes and dtypes; `shardings`: the same tree.
      copied_over: the one mesh axis along which copies are meant: "data" for parameters and
        moments, "tensor" for a batch.
    """

    def is_none(x) -> bool:
        return x is None

    given = jax.tree.leaves(shardings, is_leaf=is_none)
    for (keys, x), sharding in zip(
        jax.tree.leaves_with_path(arrays, is_leaf=is_none), given, strict=True
    ):
        if x is None or sharding is None:  # what a batch lacks, or the program does not read
            continue
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        num_bytes = x.size * x.dtype.itemsize
        parts = x.size // int(np.prod(sharding.shard_shape(x.shape)))
        copies = mesh.size // parts
        if num_bytes >= LARGE and copies > mesh.shape[copied_over]:
            raise ValueError(
                f"{path!r} of shape {x.shape} ({num_bytes / 2**20:.0f} MiB) has {copies} copies on "
                f"{dict(mesh.shape)}, wanted {mesh.shape[copied_over]}; split it in PARAM_RULES."
            )


def param_shardings(mesh: Mesh, abstract: Tree) -> Tree:
    """Returns a tree of NamedShardings for parameters, optimizer state or a whole TrainState."""
    specs = [param_spec(path, x.shape) for path, x in flatten_paths(abstract).items()]
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    return jax.tree.unflatten(jax.tree.structure(abstract), shardings)


def with_shardings(abstract: Tree, shardings: Tree) -> Tree:
    """Returns the shapes and dtypes with where each array goes."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def in_host(abstract: Tree, shardings: Tree) -> Tree:
    """Returns the shardings with the arrays in the memory of their devices' host; scalars stay."""

    def one(x, sharding: NamedSharding) -> NamedSharding:
        return sharding.with_memory_kind(HOST_MEMORY) if x.shape else sharding

    return jax.tree.map(one, abstract, shardings)


def batch_shardings(mesh: Mesh) -> Batch[NamedSharding]:
    """Rows are split over all axes but tensor; the small [B, K] arrays are everywhere."""
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, ROWS))
    return Batch(Rows(*[rows] * len(Rows._fields)), *[everywhere] * (len(Batch._fields) - 1))


def rows_shardings(mesh: Mesh) -> Rows[NamedSharding]:
    """The rows of one micro-batch, [R, ...]."""
    return Rows(*[NamedSharding(mesh, P(ROWS))] * len(Rows._fields))


def rows_here(mesh: Mesh, num_rows: int) -> list[int]:
    """Returns which of the rows of a micro-batch the devices of this process hold, ascending."""
    held = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((num_rows,)).values()
    return sorted({row for at in held if at is not None for row in range(num_rows)[at[0]]})


def put_rows(mesh: Mesh, rows: Rows[np.ndarray], num_rows: int) -> Rows[jax.Array]:
    """Puts rows on the devices of all processes.

    Args:
      rows: this process's `rows_here` of num_rows, leading axes [R_here] or [M, R_here].
    Returns:
      All rows, leading axes [R] or [M, R].
    """
    axis = rows.tokens.ndim - 2
    here = rows_here(mesh, num_rows)
    sharding = NamedSharding(mesh, P(*[None] * axis, ROWS))

    def put(x: np.ndarray) -> jax.Array:
        def read(index):
            wanted = range(num_rows)[index[axis]]
            start = here.index(wanted[0])
            return x[(*index[:axis], slice(start, start + len(wanted)), *index[axis + 1 :])]

        shape = (*x.shape[:axis], num_rows, *x.shape[axis + 1 :])
        return jax.make_array_from_callback(shape, sharding, read)

    return Rows(*map(put, rows))


def put_whole(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts an array that every process holds on the devices of all of them."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def put_batch(mesh: Mesh, batch: Batch[np.ndarray], num_rows: int) -> Batch[jax.Array]:
    """Puts a step on the devices: each process its rows, see `put_rows`; the rest is everywhere."""
    rows, everywhere = put_rows(mesh, batch.rows, num_rows), NamedSharding(mesh, P())

    def put(x: np.ndarray) -> jax.Array:
        return put_whole(x, everywhere)

    return Batch(
        rows,
        num_micro=put(batch.num_micro),
        micro_of_prompt=put(batch.micro_of_prompt),
        scores=put(batch.scores),
        mask=put(batch.mask),
        lengths=put(batch.lengths),
        ref_logps=None if batch.ref_logps is None else put(batch.ref_logps),
    )


def place(abstract: Params, shardings: Params, read: Mapping[str, Read]) -> Params:
    """Returns parameters read shard by shard: `read[path](index)` is one slice, float32.

    Each device asks for its own slice, so the host never holds a whole copy beside the shards.
    """

    def one(path, array, sharding):
        return jax.make_array_from_callback(array.shape, sharding, lambda at: read[path](at or ()))

    flat = [
        one(path, array, sharding)
        for (path, array), sharding in zip(
            flatten_paths(abstract).items(), jax.tree.leaves(shardings), strict=True
        )
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), flat)
