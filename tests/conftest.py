"""For the whole suite."""

import pytest
import torch
from tiny import Folders


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny matrices lose more to waking threads than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests before it, nor on the worker that runs it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny models in folders, by architecture: ``folders / "llama"``."""
    return Folders(tmp_path_factory.mktemp("models"))
