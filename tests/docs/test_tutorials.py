"""The tutorials run: each page's commands and programs in order, at the sizes below, on the devices that it names.

A page starts in a folder of its own that holds what its first sentence asks for. Commands run in this process.
"""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxrlhf import cli
from jaxrlhf.data.demo import write_demo
from jaxrlhf.runs.metrics import describe

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
SIZES = {
    "--max_steps": 2,
    "--per_device_train_batch_size": 8,
    "--samples_per_prompt": 2,
    "--limit": 4,
    "--n": 2,
    "--max_answer_seq_len": 8,
    "--max_new_tokens": 8,
    "--max_eval_samples": 4,
    "--save_steps": 1,
}
"""Flags of the pages, and the largest value that each may have here."""
SHAPE = "hidden_size=32,num_hidden_layers=1,num_attention_heads=4,intermediate_size=32,max_position_embeddings=128"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def smaller(words, model):
    """The words of a command with values up to `SIZES`, and a model of this machine in place of the hub's."""
    words = [model if word == HUB else word for word in words]
    for i, word in enumerate(words[:-1]):
        if word in SIZES:
            words[i + 1] = str(min(SIZES[word], int(words[i + 1])))
        elif word == "--config_overrides":
            words[i + 1] = SHAPE
    return words


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Data cache with a small demo data set, for this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrlhf.data.demo.write_demo", partial(write_demo, size=400))
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("JAXRLHF_CACHE", str(folder))
        from jaxrlhf.data import materialize_demo

        materialize_demo(folder)
        yield folder


@pytest.fixture
def place(cache, demo, tmp_path, monkeypatch):
    """The folder of a reader: the repository's files, and tiny models where the first tutorial leaves its own."""
    for name in ("scripts", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    for name, folder in (("sft", demo.lm), ("reward", demo.reward)):
        (tmp_path / "runs" / "first" / name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return SimpleNamespace(folder=tmp_path, model=demo.lm, patch=monkeypatch, printed="")


def run_command(line, place, capfd):
    """Runs one line of a shell block: `[NAME=value …] [echo TEXT |] (jaxrlhf|python) …`."""
    given, bar, line = line.rpartition(" | ")
    words = shlex.split(line, comments=True)
    devices = 1
    while words and re.match(r"[A-Z_]+=", words[0]):
        devices = int(re.fullmatch(r"XLA_FLAGS=--xla_force_host_platform_device_count=(\d+)", words.pop(0))[1])
    if not words:
        return
    if bar:
        place.patch.setattr(sys, "stdin", io.StringIO(" ".join(shlex.split(given)[1:]) + "\n"))
    words = smaller(words, place.model)
    everything = jax.local_devices()
    with place.patch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: everything[:devices])
        if words[0] == "jaxrlhf":
            assert cli.main(words[1:]) == 0, (line, capfd.readouterr().err[-2000:])
        else:
            assert words[0] == "python", line
            words = [f"{sys.executable} -m jaxrlhf" if word == "jaxrlhf" else word for word in words[1:]]
            command = [sys.executable, *" ".join(words).split()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
            print(done.stdout)


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_tutorial_run_in_order(page, place, capfd):
    if page.stem == "first-chat-model":
        shutil.rmtree(place.folder / "runs")
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    for language, block in blocks:
        if language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                run_command(line, place, capfd)
        elif file := re.match(r"# (\w+\.py)\n", block):
            Path(file[1]).write_text(block)
        else:
            if "transformers" in block:
                pytest.importorskip("torch", reason="transformers' models run on torch")
            exec(compile(block, f"{page.name}", "exec"), {"__name__": "__main__"})
    assert {language for language, _ in blocks} >= {"bash"}
    records = [json.loads(line) for path in Path("runs").rglob("metrics.jsonl") for line in path.open()]
    names = {name for record in records for name in record} - {"step", "time"}
    assert names and not [name for name in names if describe(name) is None]


def test_the_site_and_the_readme_name_every_tutorial():
    navigation, readme = (ROOT / "mkdocs.yml").read_text(), (ROOT / "README.md").read_text()
    for page in PAGES:
        assert f"tutorials/{page.name}" in navigation and f"docs/tutorials/{page.name}" in readme


def test_sizes_change_only_values_of_the_pages():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [flag for flag in SIZES if f"{flag} " not in text] == []
