"""Every test runs on CPU with 8 virtual devices, offline, and refuses silent rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs of tiny models are compiled far longer than they run: LLVM's expensive passes are off.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import jax  # noqa: E402  (after the flags that it reads)

jax.config.update("jax_numpy_rank_promotion", "raise")
