"""The config of a run: made from one table, `nca_jax.fields`, that says everything about a field.

    python -m nca_jax.config > docs/config.md

A config file is a document that states what differs from `default_config()` and why.

Sections that a run does not use are absent (`OPTIONAL`); an override of one of their fields brings
the section in with the table's defaults. `config.loss` is `name`, `logits_chunk` and the fields of
its own loss, see `nca_jax.losses`.
"""

from collections.abc import Set

from ml_collections import ConfigDict

from nca_jax.checks import UserError
from nca_jax.field import Field, Value
from nca_jax.fields import FIELDS, OPTIONAL
from nca_jax.losses import LOSSES, SHARED


def fields_of(loss: str) -> dict[str, Field]:
    """Returns the table with the fields of a loss; the table alone where there is no such loss."""
    own = LOSSES[loss].fields if loss in LOSSES else {}
    return FIELDS | {f"loss.{name}": field for name, field in own.items()}


def section(name: str) -> ConfigDict:
    """Returns one section, with the table's defaults."""
    prefix = f"{name}."
    return ConfigDict(
        {x.removeprefix(prefix): f.default for x, f in FIELDS.items() if x.startswith(prefix)}
    )


def default_config() -> ConfigDict:
    """Returns a config of the table's defaults, with the sections that every run has."""
    names = dict.fromkeys(name.split(".")[0] for name in FIELDS if "." in name)
    config = ConfigDict({name: f.default for name, f in FIELDS.items() if "." not in name})
    for name in names:
        if name not in OPTIONAL:
            config[name] = section(name)
    choose_loss(config, config.loss.name)
    return config


def choose_loss(
    config: ConfigDict, name: str, *, asked: Set[str] = frozenset(), k: int = 0, **values: Value
) -> None:
    """Makes `name` the loss of a config, as its record has it.

    Its own fields come in with their defaults, or with those of `values` that were asked for or
    that losses share (`SHARED`: the alpha of a config file is not that of every loss); K is the
    number nearest to `k` that it takes (0: to the config's), or the loss's usual one unless it was
    asked for; where it reads no reference there is none.

    Args:
      asked: names that a user gave a value, see `parse_arg`: of "k" and of `values` these do not
        give way.
    Raises:
      UserError: there is no such loss, or it does not read what was asked for.
    """
    if name not in LOSSES:
        raise UserError(f"There is no loss {name!r}; wanted one of {', '.join(LOSSES)}.")
    loss = LOSSES[name]
    if "k" in asked and k != loss.nearest_k(k):
        raise UserError(
            f"algo={name} takes {loss.takes} responses a prompt, not k={k}: set "
            f"k={loss.nearest_k(k)}, leave k out, or choose another algo."
        )
    for unread in sorted(asked & values.keys() - loss.fields.keys()):
        having = [other for other, its in LOSSES.items() if unread in its.fields]
        raise UserError(
            f"algo={name} does not read {unread}; it takes {', '.join(loss.fields) or 'nothing'}: "
            f"leave {unread} out, or choose an algo that does ({', '.join(having)})."
        )
    own = {
        x: values[x] if x in values and (x in asked or field in SHARED) else field.default
        for x, field in loss.fields.items()
    }
    chunk = config.loss.logits_chunk
    config.loss = ConfigDict({"name": name, "logits_chunk": chunk} | own)
    if loss.usual_k and "k" not in asked:
        k = loss.usual_k
    config.data.num_responses = loss.nearest_k(k or config.data.num_responses)
    if "ref_logps" not in loss.reads:
        config.reference.kind = "none"


def make_smoke(config: ConfigDict) -> None:
    """Makes a config a try on a CPU: ten steps of a tiny model with random weights, on bytes."""
    config.steps, config.epochs = 10, 0.0
    config.log_every, config.eval_every, config.save_every = 1, 5, 5
    config.model.name, config.model.init_from = "tiny", ""
    data = config.data
    data.tokenizer, data.format = "byte", "plain"
    data.max_prompt_len, data.max_response_len = 64, 96
    data.batch_size, data.row_len, data.rows, data.block = 4, 512, 1, 64
    config.loss.logits_chunk = 128


def flatten(config: ConfigDict) -> dict[str, Value]:
    """Returns {"optim.lr": 1e-5, ...}."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{leaf}": x for leaf, x in flatten(value).items()}
        else:
            flat[name] = value
    return flat


if __name__ == "__main__":
    from nca_jax.config_doc import describe

    print(describe(), end="")
