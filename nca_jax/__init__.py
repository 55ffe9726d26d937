"""nca_jax: align language models with explicit rewards by NCA and InfoNCA (arXiv:2402.05369).

    import nca_jax
    nca_jax.losses.nca(implicit_rewards, targets)   # a pure function; also LOSSES, Loss, Responses
    nca_jax.metrics.alignment_metrics(...)          # what a step reports
    nca_jax.Model                                   # the decoder
    nca_jax.fit(...), nca_jax.rollout(...)          # the training loop, and sampling from a policy

Each is imported when it is asked for: a loss in a training loop of one's own needs jax alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nca_jax import signals

if TYPE_CHECKING:
    from nca_jax import fit, losses, metrics, rollout
    from nca_jax.models.decoder import Model

__version__ = "0.1.0"
__all__ = ["Model", "fit", "losses", "metrics", "rollout"]

signals.while_importing(__name__)


def __getattr__(name: str) -> Any:
    if name == "Model":
        return importlib.import_module("nca_jax.models.decoder").Model
    if name in __all__:
        return importlib.import_module(f"nca_jax.{name}")
    raise AttributeError(f"module 'nca_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
