"""Where the parameters of a run come from: a checkpoint, a pretrained model, or a seed."""

import dataclasses
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nca_jax.axes import Params, flatten_paths, nest_paths
from nca_jax.build import Run
from nca_jax.checks import UserError
from nca_jax.files import AnyPath, as_path
from nca_jax.infra.checkpoint import restore_params
from nca_jax.infra.fingerprint import array_digests, text_fingerprint
from nca_jax.infra.finite import not_finite
from nca_jax.infra.mesh import Read, host_mesh, param_shardings, place
from nca_jax.infra.optim import merge_trained
from nca_jax.infra.progress import phase
from nca_jax.infra.records import check_known
from nca_jax.infra.steps import best_step, saved_step, saved_steps
from nca_jax.metrics import IS_BETTER_HIGH
from nca_jax.models import nf4
from nca_jax.models.formats.names import Param, of_arrays
from nca_jax.models.formats.pretrained import open_adapter, open_pretrained
from nca_jax.models.lora import Lora


def start_params(run: Run, init_from: str, *, dtype: str = "float32") -> Params:
    """Returns sharded parameters: of `init_from`, or random ones from the seed for "".

    They are a model's own: adapters are not among them.

    Args:
      run: the model and the mesh.
      init_from: as `open_pretrained` takes it.
      dtype: float32, for what is trained; for what is frozen also bfloat16, or "": each parameter
        in the dtype that it has in its file. That is half the memory of a bfloat16 model, and the
        same numbers, as kernels are cast where they are used. Random ones are float32 for "".
        nf4: the layers' matrices in 4 bits, tensor by tensor, the others in their own dtype.
    Raises:
      UserError: there is no such model, or one of another architecture, or it is not finite.
    """
    model = run.model.base
    abstract = abstract_start(run, dtype)
    shardings = param_shardings(run.mesh, abstract)
    if not init_from and dtype == "nf4":
        return place(abstract, shardings, _readers(_random_weights(run), dtype))
    if not init_from:
        init = jax.jit(
            lambda key: _cast(model.init(key), dtype or "float32"), out_shardings=shardings
        )
        with phase("drawing random weights"):
            return init(jax.random.key(run.config.seed))
    found, weights = open_pretrained(init_from)
    ours = model.config  # an exported policy may end its turns by more ids than its start does
    if ours.num_labels and not found.num_labels:  # a reward model that begins here
        found = dataclasses.replace(found, num_labels=ours.num_labels)
        weights = weights | of_arrays(ours, {"score/kernel": np.zeros((ours.width, 1), np.float32)})
    ids = {"bos_id": ours.bos_id, "eos_ids": ours.eos_ids, "pad_id": ours.pad_id}
    if dataclasses.replace(found, **ids) != ours:
        raise UserError(
            f"{init_from!r} is not of the policy's architecture: {found} there, {ours} here."
        )
    return _load(run, abstract, weights, init_from, dtype)


def abstract_start(run: Run, dtype: str) -> Params:
    """Returns the shapes of `start_params`; their dtypes but for nf4 are those of the file.

    Raises:
      UserError: the model, or a part of it on a device, is not whole blocks of nf4.
    """
    if dtype != "nf4":
        return run.model.base.abstract_params()
    abstract = run.model.base.abstract_nf4()
    nf4.check_blocks(abstract, run.mesh.shape)
    return abstract


def _readers(weights: Mapping[str, Param], dtype: str) -> dict[str, Read]:
    """Returns what reads each parameter in a dtype, as `start_params` has it."""
    if dtype != "nf4":
        return {path: weight.reader(dtype) for path, weight in weights.items()}
    read = {}
    for path, weight in weights.items():
        if weight.nf4 is None:
            read[path] = weight.reader("")
        else:
            folder = path.removesuffix("kernel")
            read[f"{folder}codes"] = weight.nf4.codes.read
            read[f"{folder}absmax"] = weight.nf4.absmax.read
    return read


def _random_weights(run: Run) -> dict[str, Param]:
    """Returns random ones in the memory of this host, each of whose processes draws the same."""
    model = run.model.base
    here = param_shardings(host_mesh(), model.abstract_params())
    arrays = jax.jit(model.init, out_shardings=here)(jax.random.key(run.config.seed))
    return of_arrays(model.config, jax.device_get(flatten_paths(arrays)))


def copy_to_train(frozen: Params) -> Params:
    """Returns float32 copies of parameters, sharded alike: a policy that starts at its reference.

    They equal those that `start_params` would read from the same place.
    """
    with phase("copying the reference's weights to the policy"):
        return jax.block_until_ready(jax.jit(lambda params: _cast(params, "float32"))(frozen))


def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda x: jnp.array(x, dtype), params)


def open_base(run: Run) -> Params | None:
    """Returns what the run's adapters sit on, sharded; None: it has none.

    Raises:
      UserError: as `start_params`.
    """
    if run.model.lora is None:
        return None
    where = run.config.model.init_from
    dtype = run.config.lora.base_dtype or ("nf4" if where and _is_nf4(where) else "")
    return start_params(run, where, dtype=dtype)


def _is_nf4(init_from: str) -> bool:
    """Whether the layers' matrices of a model are nf4 in its file.

    Raises:
      UserError: some are, and some are not.
    """
    kernels = [weight.nf4 for weight in open_pretrained(init_from)[1].values() if weight.nf4]
    stored, tensors = sum(k.num_stored for k in kernels), sum(k.num_tensors for k in kernels)
    if 0 < stored < tensors:
        raise UserError(
            f"{init_from!r} has {stored} of {tensors} matrices of its layers in 4 bits: set "
            "config.lora.base_dtype=nf4 to quantise the others too, or bfloat16 to have none so."
        )
    return stored > 0


def base_fingerprint(base: Params) -> str:
    """Returns what run.json keeps of a base: one changed value changes it."""
    return text_fingerprint(json.dumps(array_digests(base), sort_keys=True))


def abstract_base(run: Run) -> Params | None:
    """Returns the shapes of `open_base`, without opening a file: its dtype is the usual one."""
    if run.model.lora is None:
        return None
    usual = usual_dtype(run.config.model.init_from)
    dtype = run.config.lora.base_dtype or usual
    if dtype != "nf4":
        return with_dtype(run.model.base.abstract_params(), dtype)
    return with_dtype(abstract_start(run, dtype), usual)


def usual_dtype(init_from: str) -> str:
    """Returns the dtype that a model's file is expected to have; of random weights their own."""
    return "bfloat16" if init_from else "float32"


def with_dtype(abstract: Params, dtype: str) -> Params:
    """Returns the same shapes in another dtype; what is nf4 stays so."""

    def one(path: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return x if path.endswith(("/codes", "/absmax")) else jax.ShapeDtypeStruct(x.shape, dtype)

    return nest_paths({path: one(path, x) for path, x in flatten_paths(abstract).items()})


def start_trained(run: Run, base: Params | None, *, dtype: str = "float32") -> Params:
    """Returns what a run trains, at its start: the adapters on `base`, or all parameters.

    Args:
      dtype: of all parameters, as `start_params` takes it.
    Raises:
      UserError: as `start_params`.
    """
    if run.model.config.num_labels > 1:
        raise UserError(
            f"{run.config.model.init_from!r} is a reward model of {run.model.config.num_labels} "
            "labels; one of one label is trained."
        )
    if base is None or run.model.lora is None:
        return start_params(run, run.config.model.init_from, dtype=dtype)
    if run.config.lora.init_from:
        return _continued(run, run.model.lora, run.config.lora.init_from)
    shardings = param_shardings(run.mesh, run.model.abstract_trained())
    with phase("drawing the adapters"):
        init = jax.jit(run.model.init_adapters, out_shardings=shardings)
        return init(jax.random.key(run.config.seed), base)


def _continued(run: Run, wanted: Lora, init_from: str) -> Params:
    """Returns the adapters of a PEFT folder, sharded; UserError where they are not the config's."""
    found = open_adapter(init_from, run.model.config)
    there, here = (
        dataclasses.asdict(lora) | {"targets": ",".join(lora.targets)}
        for lora in (found.lora, wanted)
    )
    differs = [
        f"--config.lora.{name}={value} (it is {here[name]})"
        for name, value in there.items()
        if value != here[name]
    ]
    if differs:
        raise UserError(
            f"config.lora.init_from={init_from!r} holds other adapters than config.lora says; set "
            f"{', '.join(differs)}."
        )
    return _load(run, run.model.abstract_trained(), found.params, init_from, "float32")


def _load(
    run: Run, abstract: Params, weights: dict[str, Param], init_from: str, dtype: str
) -> Params:
    """Returns sharded parameters out of a folder. UserError if they are not finite."""
    with phase(f"loading the weights of {init_from}"):
        shardings = param_shardings(run.mesh, abstract)
        params = place(abstract, shardings, _readers(weights, dtype))
        bad = not_finite(params)
    if bad:
        raise UserError(f"{init_from!r}: {bad} hold NaN or infinity; fetch or make it again.")
    return params


def policy_params(run: Run, workdir: str, step: str = "", *, dtype: str = "float32") -> Params:
    """Returns the params of a checkpoint of a run, or of its start for workdir "".

    Of a run with adapters they are the base and the adapters.

    Args:
      dtype: of a start without adapters, as `start_params` takes it; a checkpoint is float32.
    Raises:
      UserError: as `start_params`, `chosen_step` or `restore_params`, or the adapters are of
        another base.
    """
    base = open_base(run)
    if not workdir:
        if step:
            raise UserError(f"--step={step} is one of a run: give its --workdir too.")
        return merge_trained(start_trained(run, base, dtype=dtype), base or {})
    folder = as_path(workdir)
    number = chosen_step(run.config, folder, step)
    if base is not None:
        check_known(workdir, {"base": base_fingerprint(base)})
    trained = restore_params(folder, run.model.abstract_trained(), run.mesh, step=number)
    return merge_trained(trained, base or {})


def chosen_step(config: ConfigDict, workdir: AnyPath, step: str) -> int:
    """Returns the step of the checkpoint that --step names: N, "best", or "" for the latest.

    Raises:
      UserError: there is no such checkpoint; names those that are there.
    """
    if step == "best":
        found = best_step(workdir, config.checkpoint, best_is_high=best_is_high(config))
        if found is None:
            metric = config.checkpoint.best_metric
            raise UserError(
                f"{workdir} has no best checkpoint: config.checkpoint.best_metric is {metric!r}, "
                f"and none was saved with such a metric. It has those of {saved_steps(workdir)}."
            )
        return found
    if step and not step.isdecimal():
        raise UserError(f"--step={step}: wanted the number of a step, or best.")
    return saved_step(workdir, int(step or 0))


def best_is_high(config: ConfigDict) -> bool:
    """Whether the best checkpoint is that whose metric is highest."""
    return IS_BETTER_HIGH.get(config.checkpoint.best_metric, True)


def reference_init_from(config: ConfigDict) -> str:
    """Where the frozen reference first came from; the policy's start unless the config says."""
    return config.reference.init_from or config.model.init_from


def starts_at_reference(config: ConfigDict) -> bool:
    """Whether the untrained policy is the reference; adapters that go on are not at their base."""
    if config.reference.kind == "base":
        return not config.lora.init_from
    return reference_init_from(config) == config.model.init_from
