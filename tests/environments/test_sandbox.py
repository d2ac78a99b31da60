"""The sandbox runs code, and refuses it time, memory, the network, processes and the file system."""

import os
import platform
import signal
import subprocess
import sys

import pytest

from jaxrlhf.environments import load_tool, sandbox

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="seccomp is Linux's"
)


def test_code_runs_and_its_output_and_errors_come_back():
    assert sandbox.run_python("import math\nprint(math.factorial(20))") == "2432902008176640000"
    assert sandbox.run_python("x = 1") == "(no output)"
    shown = sandbox.run_python("print('so far')\n1 / 0")
    assert shown.startswith("so far\nTraceback") and shown.endswith("ZeroDivisionError: division by zero")
    assert "line 2" in shown and "sandbox_child" not in shown
    assert "SyntaxError" in sandbox.run_python("print(")
    assert load_tool(sandbox.run_python).schema["function"]["parameters"]["required"] == ["code"]


@pytest.mark.parametrize(
    "code",
    [
        "import socket\nsocket.socket()",
        "import socket\nsocket.create_connection(('127.0.0.1', 80))",
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.kill(os.getppid(), 9)",
        "open('new', 'w')",
        "import os\nos.remove({path!r})",
        "import os\nos.rename({path!r}, 'x')",
        "import os\nos.truncate({path!r}, 0)",
        "import os\nos.chmod({path!r}, 0)",
        "open({path!r}, 'r+')",
    ],
)
def test_what_reaches_beyond_its_process_is_refused(code, tmp_path):
    path = tmp_path / "kept"
    path.write_text("all of it")
    shown = sandbox.run_python(code.replace("{path!r}", repr(str(path))) + "\nprint('done')")
    assert "Operation not permitted" in shown and "done" not in shown
    assert path.read_text() == "all of it"


def test_threads_and_reading_are_allowed(tmp_path):
    path = tmp_path / "data"
    path.write_text("41")
    code = f"import threading\nt = threading.Thread(target=lambda: print(int(open({str(path)!r}).read()) + 1))"
    assert sandbox.run_python(code + "\nt.start()\nt.join()") == "42"


def test_time_memory_and_output_are_bounded(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    assert sandbox.run_python("while True: pass").endswith("Error: it took longer than 1 s.")
    assert sandbox.run_python("import time\nprint('x', flush=True)\ntime.sleep(60)").startswith("x\nError: it took")
    monkeypatch.setattr(sandbox, "SECONDS", 20)
    assert "MemoryError" in sandbox.run_python("x = bytearray(3 << 30)")
    shown = sandbox.run_python("while True: print('again')")
    assert shown.endswith("… the output is longer") and len(shown) < 2100
    assert "SECRET" not in os.environ
    monkeypatch.setenv("SECRET", "s3cret")
    assert sandbox.run_python("import os\nprint(os.environ.get('SECRET'))") == "None"


def test_the_limit_on_processor_time_ends_it_with_the_signal_that_says_so():
    command = [sys.executable, "-I", "-B", str(sandbox.CHILD), "1", str(1 << 30), "97"]
    ended = subprocess.run(command, input=b"while True: pass", capture_output=True, timeout=60)
    assert ended.returncode == -signal.SIGXCPU


def test_a_system_without_a_sandbox_is_named(monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    child.write_text(sandbox.CHILD.read_text().replace("platform.machine()", "'vax'"))
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(RuntimeError, match="no sandbox on this system: it is linux on vax"):
        sandbox.run_python("print(1)")
