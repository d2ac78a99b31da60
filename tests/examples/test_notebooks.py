"""The notebooks of examples/ run from the first cell to the last, on tiny settings."""

import json
import os
import re
from functools import partial
from pathlib import Path

import pytest

from jaxrlhf.data import materialize_demo, write_demo

pytestmark = pytest.mark.long

NOTEBOOKS = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
TINY = {
    "first_run": "SFT_STEPS, REWARD_STEPS, PPO_STEPS, ROWS = 2, 2, 1, 4\n"
    "SHAPE |= dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)",
    "custom_reward": "GRPO_STEPS, ROWS = 1, 8",
    "sharded_step": "STEPS, ROWS, WIDTH, LAYERS = 1, 16, 16, 1",
}
"""In this order: the second starts from a model of the first."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run("first_run")`: the executed notebook, all of them in one folder, on one CPU device where they do not say."""
    nbformat = pytest.importorskip("nbformat", reason="notebooks are run with nbclient and ipykernel (extra: suite)")
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run with nbclient and ipykernel (extra: suite)")
    pytest.importorskip("ipykernel", reason="notebooks are run with nbclient and ipykernel (extra: suite)")
    folder = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrlhf.data.demo.write_demo", partial(write_demo, size=400))
        materialize_demo(folder / "cache")  # where the notebooks' processes find it

    def execute(name):
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        (place,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(TINY[name]))
        with pytest.MonkeyPatch.context() as patch:
            flags = os.environ["XLA_FLAGS"].split()
            patch.setenv("XLA_FLAGS", " ".join(f for f in flags if "device_count" not in f))
            patch.setenv("JAXRLHF_CACHE", str(folder / "cache"))
            where = {"metadata": {"path": str(folder)}}
            return nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3", resources=where).execute()

    return execute


def printed(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert "image/png" in outputs[-1].get("data", {}), "a notebook ends with a plot"
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_first_run_ends_in_a_chat(run):
    notebook = run("first_run")
    text = printed(notebook)
    assert "eval_before" in text and "eval_after" in text and pictures(notebook) == 4
    assert all(f"{question} →" in text for question in ("What color is the sky?", "What does a cow say?", "Hello!"))


def test_a_custom_reward_trains_and_a_failing_one_is_told(run):
    notebook = run("custom_reward")
    text = printed(notebook)
    assert "{'courteous': 1.0, 'length': -0.12}" in text and "{'courteous': -1.0, 'length': 0.0}" in text
    assert "ZeroDivisionError" in text and "[nan  1.]" in text
    assert text.count("before:") == text.count("after: ") > 0 and pictures(notebook) == 1


def test_the_sharded_step_runs_on_eight_devices_and_draws_the_same_tokens_on_another_mesh(run):
    notebook = run("sharded_step")
    text = printed(notebook)
    assert "same tokens: True" in text and "'fsdp'" in text and "GRPO     [ 0.87 -0.87 -0.87  0.87" in text
    assert pictures(notebook) == 5


@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_notebooks_open_with_a_picture_and_are_kept_without_outputs(name):
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    (picture,) = re.findall(r"!\[.+\]\((.+\.svg)\)", "".join(cells[0]["source"]))
    assert name in TINY and (NOTEBOOKS / picture).is_file()
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
    assert f"notebooks/{name}.ipynb" in (NOTEBOOKS.parent / "README.md").read_text()
