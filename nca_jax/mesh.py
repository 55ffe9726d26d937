"""The device mesh, and arrays placed on it by the rules of `nca_jax.axes`."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nca_jax.axes import MESH_AXES, ROWS, flatten_paths, param_spec
from nca_jax.batch import Batch, Rows
from nca_jax.checks import UserError
from nca_jax.model_config import ModelConfig


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """Returns the mesh of `config.mesh`; one size may be -1, all the devices that remain.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    shape = [sizes[axis] for axis in MESH_AXES]
    known = int(np.prod([size for size in shape if size > 0]))
    num_devices = jax.device_count()
    if -1 in shape and num_devices % known == 0:
        shape[shape.index(-1)] = num_devices // known
    if int(np.prod(shape)) != num_devices:
        asked = ", ".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)
        raise UserError(
            f"config.mesh ({asked}) does not fill the {num_devices} devices; set one axis to -1."
        )
    return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def host_mesh() -> Mesh:
    """Returns a mesh of one CPU device: arrays on it are whole, in the host's memory."""
    device = np.array(jax.devices("cpu")[:1]).reshape((1,) * len(MESH_AXES))
    return Mesh(device, MESH_AXES)


def check_divides(mesh: Mesh, model_config: ModelConfig, rows: int) -> None:
    """Raises UserError, by name, where a split axis does not divide."""
    tensor, copies = mesh.shape["tensor"], mesh.shape["data"] * mesh.shape["fsdp"]
    c = model_config
    for name, size, parts in (
        ("query heads over mesh.tensor", c.num_heads, tensor),
        ("kv heads over mesh.tensor", c.num_kv_heads, tensor),
        ("MLP width over mesh.tensor", c.mlp_width, tensor),
        ("padded vocabulary over mesh.tensor", c.padded_vocab, tensor),
        ("model width over mesh.fsdp", c.width, mesh.shape["fsdp"]),
        ("data.rows over mesh.data * mesh.fsdp", rows, copies),
    ):
        if size % parts:
            raise UserError(f"{size} {name} = {parts} does not divide; change one of the two.")


def param_shardings(mesh: Mesh, abstract) -> object:
    """Returns a tree of NamedShardings for parameters, optimizer state or a whole TrainState."""
    specs = [param_spec(path, x.shape) for path, x in flatten_paths(abstract).items()]
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    return jax.tree.unflatten(jax.tree.structure(abstract), shardings)


def batch_shardings(mesh: Mesh) -> Batch:
    """Rows are split over data and fsdp; the small [B, K] arrays are everywhere."""
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, ROWS))
    return Batch(Rows(*[rows] * len(Rows._fields)), *[everywhere] * (len(Batch._fields) - 1))


def rows_shardings(mesh: Mesh) -> Rows:
    """The rows of one micro-batch, [R, ...]."""
    return Rows(*[NamedSharding(mesh, P(ROWS))] * len(Rows._fields))


def place(abstract: dict, shardings: dict, read: Mapping[str, Callable]) -> dict:
    """Returns parameters read shard by shard: `read[path](index)` is one slice, float32.

    Each device asks for its own slice, so the host never holds a whole copy beside the shards.
    """

    def one(path, array, sharding):
        return jax.make_array_from_callback(array.shape, sharding, read[path])

    flat = [
        one(path, array, sharding)
        for (path, array), sharding in zip(
            flatten_paths(abstract).items(), jax.tree.leaves(shardings), strict=True
        )
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), flat)
