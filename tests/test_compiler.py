"""What the compiler is asked for: by the kind of device, and by the config over that."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nca_jax.build import build_for
from nca_jax.checks import UserError
from nca_jax.chips import CHIPS
from nca_jax.flags import parse_flags
from nca_jax.infra.compiler import OPTIONS, check_options, compiler_options
from nca_jax.infra.mesh import make_mesh

GATHER = "xla_tpu_enable_sparse_core_collective_offload_all_gather"


def mesh_of(device_kind: str, platform: str = "tpu"):
    device = SimpleNamespace(device_kind=device_kind, platform=platform)
    return SimpleNamespace(devices=np.array([device], dtype=object))


def test_options_are_those_of_the_kind_of_device():
    assert GATHER not in compiler_options(mesh_of("TPU v5 lite"), "bfloat16", "")
    assert compiler_options(mesh_of("TPU v6 lite"), "bfloat16", "")[GATHER] is True
    assert set(OPTIONS) <= set(CHIPS)


def test_the_config_is_laid_over_the_table():
    got = compiler_options(mesh_of("TPU v5"), "bfloat16", f"{GATHER}=False, xla_other=3")
    assert got == compiler_options(mesh_of("TPU v5"), "bfloat16", "") | {
        GATHER: False,
        "xla_other": "3",
    }


def test_the_programs_of_a_run_have_what_its_config_says():
    config, _ = parse_flags(
        [
            "aot",
            "--config=configs/jsonl.py:files=x,smoke",
            "--config.compiler_options=xla_cpu_enable_fast_math=true",
        ]
    )
    run = build_for(config, jax.devices()[:1])
    assert run.compiler_options["xla_cpu_enable_fast_math"] is True
    assert "xla_cpu_experimental_ynn_fusion_type" in run.compiler_options


@pytest.mark.parametrize("asked", ["xla_no_such=1", "xla_cpu_enable_fast_math=perhaps", "xla"])
def test_what_the_compiler_does_not_take_is_refused_in_its_words(asked):
    mesh = make_mesh({"data": -1, "fsdp": 1, "tensor": 1, "expert": 1}, jax.devices())
    check_options(mesh, "xla_cpu_enable_fast_math=true,xla_backend_optimization_level=1")
    with pytest.raises(UserError, match=f"does not take {asked}.*(No such|not a valid)"):
        check_options(mesh, asked)
