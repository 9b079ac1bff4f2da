"""Fixtures: the compiled functions with matrix registers, the processor's and those of plain C."""

import pytest

from loralab.native import library
from loralab.native.library import Kernels, kernels


@pytest.fixture(scope="session", params=["the processor's", "plain C"])
def registers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Return the compiled functions; skip where there are none with matrix registers."""
    found = kernels()
    if found is None or not found.dots:
        pytest.skip("no C compiler here, or no dot products of bfloat16")
    if request.param == "plain C":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("model")))
            patch.setattr(library, "FLAGS", (*library.FLAGS, "-O1", "-DLORALAB_TILE_MODEL"))
            patch.setattr(library, "PATIENCE", 600)
            found = kernels.__wrapped__()
        assert found is not None
        assert found.tiles
    elif not found.tiles:
        pytest.skip("no matrix registers here")
    return found
