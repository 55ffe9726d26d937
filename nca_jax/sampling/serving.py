"""Where parameters are while they sample: a mesh of its own, and the dtype of the activations.

A training mesh splits parameters over `fsdp`, and a layer is gathered where it is used. That is
little of a step over thousands of tokens, and nearly all of the work for one token: each turn of
the token loop would send every matrix. Here heads, MLP and vocabulary are split over `tensor`, so
that devices send each other activations alone, and prompts over what remains.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped

from nca_jax.axes import MESH_AXES, Params, flatten_paths, nest_paths, pin
from nca_jax.checks import UserError
from nca_jax.chips import CHIPS
from nca_jax.field import parse_pairs
from nca_jax.infra.mesh import check_divides, param_shardings, slice_of
from nca_jax.model_config import ModelConfig
from nca_jax.models import nf4

Sizes = dict[str, int]  # of the axes of a mesh
Made = TypeVar("Made")

AUTO, SAME = "auto", "same"  # chosen by `default_sizes`; the mesh of the run
CAST = ("kernel", "table", "bias")  # what is cast to the activations' dtype wherever it is used
READ = 2**30  # bytes of weights on a device from which on it is worth to split them further
SHARE = 0.75  # of a device's memory, the most that weights may take


def serving_mesh(asked: str, mesh: Mesh, model: ModelConfig, weights: Params) -> Mesh:
    """Returns the mesh that `config.generate.mesh` asks for: the run's devices, in the run's order.

    Being in one order, parameters are moved between the two meshes by one program. Neighbours in it
    are neighbours in a slice, and slices lie over the outermost axis, `data`.

    Args:
      asked: "auto", "same", or sizes as in "data=-1,tensor=8"; an axis that is not named is 1.
      mesh: of the run.
      weights: shapes of all parameters, and the dtypes in which they sample.
    Raises:
      UserError: these are no sizes of a mesh, or they do not divide the model.
    """
    devices = mesh.devices.reshape(-1)
    chip = CHIPS.get(devices[0].device_kind)
    if asked == SAME or mesh.size == 1 or (asked == AUTO and chip is None):
        return mesh
    num_slices = len({slice_of(device) for device in devices})

    def check(sizes: Sizes) -> None:
        rows = math.prod(sizes.values()) // sizes["tensor"]
        check_divides(sizes, model, rows)
        nf4.check_blocks(weights, sizes)

    if asked == AUTO and chip is not None:
        memory, num_bytes = int(chip.memory_gib * 2**30), bytes_of(weights)
        sizes = default_sizes(len(devices) // num_slices, num_slices, num_bytes, memory, check)
    else:
        sizes = parse_sizes(asked, len(devices))
        try:
            check(sizes)
        except UserError as error:
            raise UserError(f"config.generate.mesh={asked!r}: {error}") from error
        if sizes["data"] % num_slices:
            raise UserError(
                f"config.generate.mesh={asked!r}: the axis data lies over the {num_slices} slices "
                f"of devices; make it a multiple of {num_slices}."
            )
    if sizes == dict(mesh.shape):
        return mesh
    grid = devices.reshape([sizes[axis] for axis in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=mesh.axis_types)


def default_sizes(
    chips: int, num_slices: int, num_bytes: int, memory: int, check: Callable[[Sizes], None]
) -> Sizes:
    """Returns the sizes of the mesh for sampling.

    A token is a read of all weights on a device, so they are split over `tensor` until READ bytes
    are left on each, as far as the model divides; a small model is copied. Where that is more than
    SHARE of the memory, the copies are split over `fsdp` as well, and gathered for every token.

    Args:
      chips: devices in a slice.
      num_bytes: of all weights.
      memory: of a device, in bytes.
      check: raises UserError for sizes that do not divide the model.
    Raises:
      UserError: whatever the sizes.
    """

    def sizes_of(tensor: int, fsdp: int = 1) -> Sizes:
        data = num_slices * chips // (tensor * fsdp)
        return {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": 1}

    def divides(sizes: Sizes) -> bool:
        try:
            check(sizes)
        except UserError:
            return False
        return True

    parts = [n for n in range(1, chips + 1) if chips % n == 0]
    ways = [n for n in parts if divides(sizes_of(n))]
    tensor = next((n for n in ways if num_bytes <= n * READ), max(ways, default=1))
    whole = [sizes_of(tensor, n) for n in parts if chips % (tensor * n) == 0]
    room = SHARE * memory
    fits = [sizes for sizes in whole if num_bytes <= room * tensor * sizes["fsdp"]]
    sizes = next(filter(divides, [*fits, whole[-1]]), whole[0])
    check(sizes)
    return sizes


def parse_sizes(asked: str, num_devices: int) -> Sizes:
    """Returns the sizes of all axes of "data=-1,tensor=8"; one may be -1, what remains.

    Raises:
      UserError: they do not multiply to the number of devices.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    sizes |= {axis: int(size) for axis, size in parse_pairs(asked).items()}
    known = math.prod(size for size in sizes.values() if size > 0)
    sizes = {axis: size if size > 0 else num_devices // known for axis, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise UserError(
            f"config.generate.mesh={asked!r} does not fill the {num_devices} devices; set one axis "
            "to -1."
        )
    return sizes


def on_mesh(mesh: Mesh, made: Iterator[Made]) -> Iterator[Made]:
    """Yields what `made` yields, which sees this mesh; who takes it keeps the mesh that is set."""
    while True:
        with jax.set_mesh(mesh):
            try:
                one = next(made)
            except StopIteration:
                return
        yield one


def bytes_of(weights: Params) -> int:
    """Returns the bytes of all arrays, each counted once."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))


def serving_dtypes(params: Params, dtype: jnp.dtype) -> Params:
    """Returns the shapes of parameters with the dtypes in which they sample, the numbers the same.

    A matrix has that of the activations: it is cast to it wherever it is used, but where DoRA takes
    its norm. Norms, adapters and 4-bit codes stay as they are.
    """
    flat = flatten_paths(params)

    def one(path: str, x: jax.Array) -> jax.ShapeDtypeStruct:
        folder, _, last = path.rpartition("/")
        stays = last not in CAST or f"{folder}/lora/m" in flat
        return jax.ShapeDtypeStruct(x.shape, x.dtype if stays else dtype)

    return nest_paths({path: one(path, x) for path, x in flat.items()})


def serving_params(mesh: Mesh, dtype: jnp.dtype, params: Params) -> Params:
    """Returns parameters as they sample: cast as `serving_dtypes` says, split over the mesh.

    They are the same arrays where nothing changes, and else copies, to be kept while they sample.

    Args:
      mesh: of `serving_mesh`; params: on the devices of this mesh, in its order.
      dtype: of the activations.
    """
    wanted = serving_dtypes(params, dtype)
    now, then = jax.tree.leaves(params), jax.tree.leaves(wanted)
    shardings = jax.tree.leaves(param_shardings(mesh, wanted))
    if all(
        x.dtype == y.dtype and x.sharding.is_equivalent_to(sharding, x.ndim)
        for x, y, sharding in zip(now, then, shardings, strict=True)
    ):
        return params
    paths = tuple(flatten_paths(wanted))
    move = _moves(paths, tuple(x.dtype for x in then), tuple(shardings))
    with jax.set_mesh(mesh):
        return jax.tree.unflatten(jax.tree.structure(params), move(now))


@functools.cache
def _moves(
    paths: tuple[str, ...], dtypes: tuple[jnp.dtype, ...], shardings: tuple[NamedSharding, ...]
) -> Wrapped:
    """Returns the program that casts and moves a list of arrays, one for all calls of a run.

    What XLA finds no way to move it makes whole on every device first. So stacked layers move one
    at a time, and each by way of a place that it does find ways to and from: split over `data` too.
    """

    def move(arrays: list[jax.Array]) -> list[jax.Array]:
        each = zip(arrays, paths, dtypes, shardings, strict=True)
        return [_moved(*of_array) for of_array in each]

    return jax.jit(move, out_shardings=list(shardings))


def _moved(x: jax.Array, path: str, dtype: jnp.dtype, sharding: NamedSharding) -> jax.Array:
    is_stacked = path.startswith("layers/")
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))][int(is_stacked) :]
    by_way_of = [("data", *_axes(axes)) if "fsdp" in _axes(axes) else axes for axes in spec]

    def one(x: jax.Array) -> jax.Array:
        sizes = [math.prod(sharding.mesh.shape[a] for a in _axes(axes)) for axes in by_way_of]
        if all(n % size == 0 for n, size in zip(x.shape, sizes, strict=True)):
            x = pin(x, P(*by_way_of))
        return pin(x, P(*spec))

    x = x.astype(dtype)
    return jax.lax.map(one, x) if is_stacked else one(x)


def _axes(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()
