"""Each of the tiny models in turn."""

import pytest
from tiny import MODELS, Make


@pytest.fixture(params=MODELS)
def make(request: pytest.FixtureRequest) -> Make:
    """A function that builds the model."""
    return MODELS[request.param]
