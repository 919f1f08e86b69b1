from __future__ import annotations

import pytest
from engine_models import tiny_model

from qnext.layers.model import CausalLM


@pytest.fixture(scope="session")
def model() -> CausalLM:
    """A tiny random model of the full architecture, fp32."""
    return tiny_model()
