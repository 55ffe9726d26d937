"""Experiments: commands over the commands of nca_jax, run from the root of the repository."""
