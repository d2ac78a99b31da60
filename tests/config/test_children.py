"""Forked children end with their parent, also when it is killed."""

import os
import signal
import subprocess
import sys

import pytest

SCRIPT = r"""
import os, signal
from jaxrlhf.config.children import children_end

with children_end():
    child = os.fork()
if child == 0 and os.fork() == 0:  # a grandchild of a living child goes on
    os.write(1, b"grandchild\n")
    os._exit(0)
if child:
    os.write(1, b"parent\n")
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death")
def test_children_end_with_a_killed_parent():
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = {process.stdout.readline().strip() for _ in range(2)}
        os.kill(process.pid, signal.SIGKILL)
        rest, _ = process.communicate(timeout=60)  # the pipe closes when the child has gone too
    assert (said, rest) == ({"parent", "grandchild"}, "")
