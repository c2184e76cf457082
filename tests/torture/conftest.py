"""What the attacks share."""

import pytest
from toy import TOY

from sta_adapter import register_backbone
from sta_adapter.injection.registry import unregister_backbone


@pytest.fixture(scope="module", autouse=True)
def toy_backbone():
    """The tests' own small encoder is known."""
    register_backbone(TOY)
    yield
    unregister_backbone("toy")
