"""A tool that runs Python code of the model: `--tools jaxrlhf.environments.sandbox:run_python` (Linux).

The code runs in a process of its own, with limits on time, memory and output. The kernel refuses it the network, other
programs and processes, and every change of the file system (`sandbox_child`). It may read what the user may read.
"""

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
SECONDS = 5
"""Longest run, on the clock and on the processor."""
GIB = 1
"""Memory."""
CHARACTERS = 2000
"""Output that the model gets to see."""
NO_SANDBOX = 97
"""Exit status of a child that cannot confine itself."""


def run_python(code: str) -> str:
    """Runs a Python program, and returns what it prints.

    Args:
        code: The program. It must print its result.
    """
    settings = [sys.executable, "-I", "-B", str(CHILD), str(SECONDS), str(GIB << 30), str(NO_SANDBOX)]
    environment = {"PATH": os.defpath, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as program, tempfile.TemporaryDirectory() as folder:
        program.write(code.encode("utf-8", "replace"))
        program.seek(0)
        with subprocess.Popen(
            settings,
            stdin=program,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                output, late = _output(process)
            finally:
                process.kill()
            status = process.wait()
    if status == NO_SANDBOX:
        raise RuntimeError(f"there is no sandbox on this system: {output.strip()}")
    if late or status == -signal.SIGXCPU:
        output = f"{output.rstrip()[:CHARACTERS]}\nError: it took longer than {SECONDS} s."
    elif len(output) > CHARACTERS:
        output = output[:CHARACTERS] + "\n… the output is longer"
    elif status < 0:
        output = f"{output.rstrip()}\nError: it was ended by {signal.Signals(-status).name}."
    return output.strip() or "(no output)"


def _output(process: subprocess.Popen[bytes]) -> tuple[str, bool]:
    """Returns the output of a process, cut a little above CHARACTERS, and True if its time ran out."""
    assert process.stdout is not None
    deadline, printed = time.monotonic() + SECONDS, b""
    while len(printed) <= 4 * CHARACTERS:
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return printed.decode(errors="replace"), True
        chunk = os.read(process.stdout.fileno(), 4096)
        if not chunk:
            process.wait()
            break
        printed += chunk
    return printed.decode(errors="replace"), False
