"""The wheels that this tree makes, with kernels and without, each built once and unpacked."""

from __future__ import annotations

import os
import shutil

import pytest
from wheels import Wheel, build


@pytest.fixture(scope="session")
def plain_wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return build(tmp_path_factory.mktemp("plain"), {"LITE_ATTENTION_SKIP_CUDA_BUILD": "1"})


@pytest.fixture(scope="session")
def kernel_wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        pytest.skip("there is no nvcc to build kernels with")
    return build(tmp_path_factory.mktemp("kernels"), {"LITE_ATTENTION_SKIP_CUDA_BUILD": "0"})
