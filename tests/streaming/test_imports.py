"""Reading data is light: no heavy library comes along unless it is the one that was asked for."""

import subprocess
import sys

import pytest

HEAVY = ["torch", "ray", "deepspeed", "mlflow", "monai", "zarr"]
MODULES = [
    "mim_scale",
    "mim_scale.cli",
    "mim_scale.sampling",
    "mim_scale.sampling.plan",
    "mim_scale.store.dataset",
    "mim_scale.store.verify",
    "mim_scale.streaming.pack_verify",
    "mim_scale.streaming.pack_write",
    "mim_scale.streaming.stream",
    "mim_scale.streaming.stream_threads",
]


@pytest.mark.parametrize("module", MODULES)
def test_import_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == ""
