"""What the compiler of large programs is asked for: one table by kind of device, and the config.

`config.compiler_options` is laid over the table, "NAME=VALUE,..." with true, false or numbers.
Nothing here changes what is computed. docs/scaling.md has what each option of the table does to
compiled programs ("When memory is the bound" and "Overlap"); none was timed on a TPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nca_jax.checks import UserError
from nca_jax.field import parse_pairs

Options = dict[str, str | bool]


class Option(NamedTuple):
    name: str
    value: str | bool
    does: str


# The TensorCore of v5p and v6e waits for a collective of the layers' loops that is no part of a
# product, unless the sparse cores, which nothing else here needs, take it. v5e has none.
SPARSE_CORES = (
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_all_gather",
        True,
        "parameters are gathered by the sparse cores while layers compute",
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
        True,
        "so are gradients summed and scattered",
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce",
        True,
        "and gradients summed over copies",
    ),
)
CASTS_STAY = Option(
    "xla_jf_bf16_propagation",
    False,
    "parameters are cast to bfloat16 a layer at a time, where else those of all layers are first",
)
OPTIONS: dict[str, tuple[Option, ...]] = {  # by the name that JAX has for a device
    "TPU v5 lite": (CASTS_STAY,),
    "TPU v5": (*SPARSE_CORES, CASTS_STAY),
    "TPU v6 lite": (*SPARSE_CORES, CASTS_STAY),
}


def compiler_options(mesh: Mesh, dtype: jax.typing.DTypeLike, asked: str) -> Options:
    """Returns the options that every large program is compiled with.

    On CPU only matrix products go to XLA's YNN kernels: its sums of products over a middle axis
    took thirty times as long as XLA's own (measured with jax 0.10.2: 9.7 against 0.3 ms for
    [1, 2560, 576] over the tokens, an eighth of a training step). Products of bfloat16 do not go
    there: XLA leaves them in bfloat16 for YNN, and on some processors then has no kernel for those
    that YNN does not take ("Unsupported element type for DotThunk::Execute").

    Args:
      dtype: of the activations.
      asked: `config.compiler_options`.
    """
    device = mesh.devices.flat[0]
    chosen: Options = {option.name: option.value for option in OPTIONS.get(device.device_kind, ())}
    if device.platform == "cpu":
        is_float32 = jnp.dtype(dtype) == jnp.float32
        kind = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT" if is_float32 else "LIBRARY_FUSION_TYPE_INVALID"
        chosen["xla_cpu_experimental_ynn_fusion_type"] = kind
    return chosen | _parse(asked)


def check_options(mesh: Mesh, asked: str) -> None:
    """Raises UserError where the compiler does not take `config.compiler_options`, with its words.

    A program of nothing is compiled with each of them.
    """
    for name, value in _parse(asked).items():
        nothing = jax.jit(
            lambda x: x, in_shardings=NamedSharding(mesh, P()), compiler_options={name: value}
        )
        try:
            nothing.lower(jax.ShapeDtypeStruct((), jnp.float32)).compile()
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"config.compiler_options: the compiler of {mesh.devices.flat[0].device_kind!r} "
                f"does not take {name}={value} ({str(error).splitlines()[0]}); wanted are options "
                "of this XLA, as in xla_tpu_scoped_vmem_limit_kib=65536."
            ) from error


def _parse(asked: str) -> Options:
    flags = {"true": True, "false": False}
    return {name: flags.get(value.lower(), value) for name, value in parse_pairs(asked).items()}
