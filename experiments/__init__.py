"""Experiments: commands over the commands of nca_jax, run from the root of the repository."""

from nca_jax import signals

signals.while_importing(__name__)
