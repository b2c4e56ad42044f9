"""What the tests of the GPU suite share beside `accuracy.py`."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def large():
    """Gives back what a test of gigabytes took: other processes test on the same GPU."""
    yield
    torch.cuda.empty_cache()
