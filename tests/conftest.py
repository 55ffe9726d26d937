"""Every test runs on CPU with 8 virtual devices, offline, and refuses silent rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import jax  # noqa: E402  (after the flags that it reads)

jax.config.update("jax_numpy_rank_promotion", "raise")
