"""A server in a thread of the test, for its real clients."""

import contextlib
import io
import threading
from types import SimpleNamespace

import pytest

from jaxrlhf.commands.serve import Server
from jaxrlhf.runs.console import Console
from jaxrlhf.trainers.settings import MeshConfig


@pytest.fixture(scope="module", autouse=True)
def one_device(lab):
    """Each of the eight devices of the tests would run a step on its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeshConfig, "make_mesh", lambda self: lab.mesh_of())
        yield


@contextlib.contextmanager
def serving(config):
    """A running server: its url, models, config and what it said."""
    said = io.StringIO()
    server = Server(config, Console(stream=said))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield SimpleNamespace(url=server.url, models=server.models, said=said, config=config)
    finally:
        server.stop()
        thread.join()
