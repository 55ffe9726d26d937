"""Mesh axes, and where every parameter and activation lives: one table each.

Mesh axes: "data" copies parameters, "fsdp" splits them, "tensor" splits heads, MLP and vocabulary,
"expert" splits the experts of a mixture, and whatever else "fsdp" splits. The rows of a batch are
split over all but "tensor".
"""

import re
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec as P

# Parameters: arrays in nested dicts, {"layers": {"attn": {"q": {"kernel": ...}}}}; a path is
# "layers/attn/q/kernel". Layers are stacked on a leading axis.
Params = dict[str, Any]
Tree = TypeVar("Tree")  # any pytree: a function of it gives one of the same structure

MESH_AXES = ("data", "fsdp", "tensor", "expert")
HOST_MEMORY = "pinned_host"  # the kind of memory of a host that its devices read and write
ROWS = ("data", "fsdp", "expert")  # rows of a micro-batch are split over all three
WIDTH = ("fsdp", "expert")  # where there are no experts to split, "expert" is more of "fsdp"

# The first pattern found in the "/"-joined path wins. An optimizer moment's path ends in that of
# its parameter, so one row serves both. No catch-all: a new parameter must say where it lives.
PARAM_RULES = (
    (r"embed/table$", P("tensor", WIDTH)),  # V D
    (r"head/kernel$", P(WIDTH, "tensor")),  # D V
    (r"attn/(q|k|v)/kernel$", P(None, WIDTH, "tensor", None)),  # L D N H (k, v: L D G H)
    (r"attn/(q|k|v)/bias$", P(None, "tensor", None)),  # L N H
    (r"attn/o/kernel$", P(None, "tensor", None, WIDTH)),  # L N H D
    (r"mlp/(gate|up)/kernel$", P(None, WIDTH, "tensor")),  # L D F
    (r"mlp/down/kernel$", P(None, "tensor", WIDTH)),  # L F D
    (r"moe/router/kernel$", P(None, WIDTH, None)),  # L D E
    (r"moe/(gate|up)/kernel$", P(None, "expert", "fsdp", "tensor")),  # L E D F
    (r"moe/down/kernel$", P(None, "expert", "tensor", "fsdp")),  # L E F D
    (r"(q_norm|k_norm|norm)/scale$", P()),  # small: copied
    (r"score/kernel$", P()),  # D S, small
    # A kernel in nf4, and its absmax: as the kernel is, its inputs in groups.
    (r"(attn/(q|k|v)|mlp/(gate|up))/(codes|absmax)$", P(None, WIDTH, None, "tensor")),
    (r"(attn/o|mlp/down)/(codes|absmax)$", P(None, "tensor", None, WIDTH)),
    (r"moe/(gate|up)/(codes|absmax)$", P(None, "expert", "fsdp", None, "tensor")),
    (r"moe/down/(codes|absmax)$", P(None, "expert", "tensor", None, "fsdp")),
    # Adapters: as their kernel is, the rank not split.
    (r"attn/(q|k|v)/lora/a$", P(None, WIDTH, None)),  # L D r
    (r"attn/(q|k|v)/lora/b$", P(None, None, "tensor", None)),  # L r N H
    (r"attn/(q|k|v)/lora/m$", P(None, "tensor", None)),  # L N H
    (r"attn/o/lora/a$", P(None, "tensor", None, None)),  # L N H r
    (r"mlp/(gate|up)/lora/a$", P(None, WIDTH, None)),  # L D r
    (r"mlp/(gate|up)/lora/b$", P(None, None, "tensor")),  # L r F
    (r"mlp/(gate|up)/lora/m$", P(None, "tensor")),  # L F
    (r"mlp/down/lora/a$", P(None, "tensor", None)),  # L F r
    (r"(attn/o|mlp/down)/lora/b$", P(None, None, WIDTH)),  # L r D
    (r"(attn/o|mlp/down)/lora/m$", P(None, WIDTH)),  # L D
    (r"moe/router/lora/a$", P(None, WIDTH, None)),  # L D r
    (r"moe/router/lora/b$", P()),  # L r E
    (r"moe/(gate|up)/lora/a$", P(None, "expert", "fsdp", None)),  # L E D r
    (r"moe/(gate|up)/lora/b$", P(None, "expert", None, "tensor")),  # L E r F
    (r"moe/down/lora/a$", P(None, "expert", "tensor", None)),  # L E F r
    (r"moe/down/lora/b$", P(None, "expert", None, "fsdp")),  # L E r D
)

# Logical names of activation axes; an axis without a name is not split.
ACTIVATION_RULES = {
    "rows": ROWS,
    "groups": "data",  # of rows: those of one copy of the parameters
    "width": WIDTH,
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def param_spec(path: str, shape: tuple[int, ...]) -> P:
    """Returns the PartitionSpec of one array of parameters or optimizer state by its "/" path."""
    if shape == ():  # step counters
        return P()
    for pattern, spec in PARAM_RULES:
        if re.search(pattern, path):
            if len(spec) not in (0, len(shape)):
                raise ValueError(
                    f"{path!r} has shape {shape}, but the rule {pattern!r} gives {spec}."
                )
            return spec
    raise ValueError(f"No rule for {path!r} of shape {shape}; add a row to PARAM_RULES.")


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins the sharding of an activation by logical axis names; outside a mesh it does nothing."""
    return pin(x, P(*(ACTIVATION_RULES[name] if name else None for name in logical)))


def pin(x: jax.Array, spec: P) -> jax.Array:
    """Pins the sharding of an array; outside a mesh it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def spec_in_use(path: str, shape: tuple[int, ...]) -> P:
    """Returns where one layer of a stacked parameter is when it is used: gathered along the width.

    Experts stay as they are kept: what computes them gathers them itself.
    """
    return P(*(None if axes == WIDTH else axes for axes in param_spec(path, shape)[1:]))


def constrain_params(params: Params) -> Params:
    """Pins the sharding of what has the paths and shapes of parameters, by PARAM_RULES."""
    if jax.sharding.get_abstract_mesh().empty:
        return params
    flat = flatten_paths(params)
    return nest_paths(
        {
            path: jax.lax.with_sharding_constraint(x, param_spec(path, x.shape))
            for path, x in flat.items()
        }
    )


def on_device(tree: Tree) -> Tree:
    """Brings what is in the host's memory to the device, inside a jitted function."""
    return jax.device_put(tree, jax.memory.Space.Device)


def flatten_paths(tree: Any) -> dict[str, Any]:
    """Returns {"a/b/c": leaf} of any pytree, in the order of its leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nest_paths(flat: dict[str, Any]) -> Params:
    """Returns the nested dicts that `flatten_paths` gives `flat` of."""
    nested: Params = {}
    for path, leaf in flat.items():
        *folders, last = path.split("/")
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = leaf
    return nested
