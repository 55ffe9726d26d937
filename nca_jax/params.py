"""Where the parameters of a run come from: a checkpoint, a pretrained model, or a seed."""

import jax

from nca_jax.build import Run
from nca_jax.checks import UserError
from nca_jax.files import as_path
from nca_jax.infra.checkpoint import restore_params
from nca_jax.infra.mesh import param_shardings, place
from nca_jax.models.formats.pretrained import open_pretrained


def start_params(run: Run, init_from: str) -> dict:
    """Returns sharded float32 parameters: of `init_from`, or random ones from the seed for ""."""
    abstract = run.model.abstract_params()
    shardings = param_shardings(run.mesh, abstract)
    if not init_from:
        init = jax.jit(run.model.init, out_shardings=shardings)
        return init(jax.random.key(run.config.seed))
    found, weights = open_pretrained(init_from)
    if found != run.model.config:
        raise UserError(
            f"{init_from!r} is not of the policy's architecture: {found} there, "
            f"{run.model.config} here."
        )
    return place(abstract, shardings, {path: weight.read for path, weight in weights.items()})


def policy_params(run: Run, workdir: str) -> dict:
    """Returns the params of the latest checkpoint of a run, or of `config.model.init_from` for "".

    Raises:
      UserError: the workdir has no checkpoint, or one of another model.
    """
    if not workdir:
        return start_params(run, run.config.model.init_from)
    return restore_params(as_path(workdir), run.model.abstract_params(), run.mesh)


def reference_init_from(config) -> str:
    """Where the frozen reference first came from; the policy's start unless the config says."""
    return config.reference.init_from or config.model.init_from


def starts_at_reference(config) -> bool:
    """Whether the untrained policy is the reference."""
    return reference_init_from(config) == config.model.init_from
