"""What all tests share: which of them this machine can run, and how hypothesis searches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

GPU_TESTS = Path(__file__).parent / "gpu"

# One machine of two cores runs CI: the clock says nothing about a test, and a failure must come back on the next run.
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def _missing_for_gpu() -> str | None:
    """Why the tests marked `gpu` can't run here, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"{torch.cuda.get_device_name()} is no Hopper GPU"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = _missing_for_gpu()
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker("gpu")
        if missing and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs a Hopper GPU: {missing}"))
