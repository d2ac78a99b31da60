"""The documentation against the code: commands parse, names exist, exit statuses agree, lines wrap."""

import ast
import fnmatch
import importlib
import json
import re
import runpy
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

import jaxrlhf
from jaxrlhf import cli, errors
from jaxrlhf.commands.demo import SHAPE
from jaxrlhf.commands.evaluation.settings import EvalConfig
from jaxrlhf.config import parse, settings
from jaxrlhf.config.settings import names_of, sections
from jaxrlhf.data.columns import Columns
from jaxrlhf.data.formats import FORMATS, Reader
from jaxrlhf.data.mixture import parse_mixture
from jaxrlhf.data.recognition import recognise
from jaxrlhf.runs.metrics import METRICS, describe

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "examples" / "README.md"])
SOURCES = ("jaxrlhf", "models", "sharding", "kernels")


def fences(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands():
    """(page, arguments) of every `jaxrlhf COMMAND …` in a shell block."""
    for page in PAGES:
        for block in fences(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.split("| ")[-1], comments=True)
                if "jaxrlhf" in words:
                    arguments = words[words.index("jaxrlhf") + 1 :]
                    yield pytest.param(arguments, id=f"{page.name}: {' '.join(arguments)[:60]}")


def code_blocks():
    for page in PAGES:
        for i, block in enumerate(fences(page, "python")):
            if not block.startswith(" "):  # a fragment of a class
                yield pytest.param(block, id=f"{page.name}:{i}")


@pytest.fixture(scope="module")
def tables():
    """docs/tables.py, which makes the reference pages."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "tables.py")))


@pytest.mark.parametrize("arguments", list(commands()))
def test_a_documented_command_parses(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *rest = arguments
    if name.startswith("--") or "--help" in rest:
        return
    rest = [word for word in rest if word != "…"]
    if "--config" in rest and not Path(rest[rest.index("--config") + 1]).exists():
        pytest.skip("reads the settings of an earlier command")
    if any(re.search(r"my_\w+\.py:", word) for word in rest):
        pytest.skip("names the reader's own file")
    if "--peers" in rest:
        pytest.importorskip("torch")
    command = cli.commands()[name]
    kind = command.config
    if isinstance(kind, str):
        kind = getattr(importlib.import_module(command.module), kind)
    config = parse(kind, rest, f"jaxrlhf {name}", "")
    if any(word.startswith("runs/demo/") for word in rest):
        assert tokens_of(config) <= SHAPE["max_position_embeddings"]


def tokens_of(config):
    """The longest sequence of a command that trains or evaluates; 0 for others."""
    values = dict(config.items())
    evaluates = isinstance(config, EvalConfig) and not values["tasks"]
    if "learning_rate" not in values and not evaluates:
        return 0
    if "max_new_tokens" not in values or "lmbda" in values or (evaluates and not values["models"]):
        return values["max_length"]
    return values["max_new_tokens"] + (1 if evaluates else values["max_prompt_seq_len"])


@pytest.mark.parametrize("block", list(code_blocks()))
def test_documented_code_imports_names_that_exist(block):
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jaxrlhf"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jaxrlhf":
            assert hasattr(jaxrlhf, node.attr), node.attr


def test_the_names_on_the_architecture_page_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    life = page[page.index("## The life of a prompt") : page.index("## Why these choices")]
    source = "\n".join(path.read_text() for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py")))
    names = {name for code in re.findall(r"`([A-Za-z_][\w.]*)`", life) for name in code.split(".")}
    unknown = {n for n in names if not re.search(rf"\b{n}\b", source) and not list(ROOT.glob(f"**/{n}.*"))}
    called = {n for n in names if "_" in n and n.islower() and not n.endswith("_params")}
    undefined = {n for n in called if not re.search(rf"(def {n}\b|\b{n}\w* = |\b{n}: )", source)}
    assert not unknown and not undefined - {"while_loop"}, (unknown, undefined)


def test_the_files_that_contributing_names_exist_and_hold_its_names():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = set(re.findall(r"`([\w./]+)`", page))
    paths = {word for word in code if "/" in word and "NAME" not in word}
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert missing <= {".ci/run", "site/"}, missing  # .ci is not part of a source archive, site/ is built
    source = "\n".join(path.read_text() for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py")))
    names = {part for word in code - paths for part in word.split(".") if re.fullmatch(r"[A-Z]\w+", part)}
    unknown = {name for name in names if not re.search(rf"\b{name}\b", source)}
    assert unknown <= {"LAYERS", "Args", "Returns", "Raises"}, unknown


def test_the_documented_exit_statuses_are_those_of_the_errors():
    rows = re.findall(r"^\| `(\w+)` \| (\d+)", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.RunError)]
    statuses = {kind.__name__: kind.status for kind in kinds if kind is not errors.RunError}
    documented = {name: int(status) for name, status in rows}
    assert documented.items() <= statuses.items() and set(documented.values()) == set(statuses.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_of_text_wrap_at_100_columns(page):
    text = page.read_text(encoding="utf-8").partition("<!-- results")[0]
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    unbreakable = ("|", "`", "![", "[")
    long = [line for line in text.splitlines() if len(line) > 100 and not line.lstrip().startswith(unbreakable)]
    assert not long


def test_the_documented_rows_are_recognised_and_show_every_format():
    (block,) = fences(ROOT / "docs" / "reference" / "data-formats.md", "json")
    rows = [json.loads(line) for line in block.splitlines()]
    found = [recognise([row], Columns({}), "data-formats.md") for row in rows]
    assert sorted(found) == sorted(FORMATS)
    for row, name in zip(rows, found, strict=True):
        Reader(name, Columns({}))(row)


def test_the_documented_mixture_is_one(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = page[page.index("## Mixtures") : page.index("## Evaluation rows")]
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (tmp_path / "mix.yaml").write_text(block)
    assert len(parse_mixture([str(tmp_path / "mix.yaml")])) == 3


def test_the_reference_lists_every_flag_with_help_and_every_table_has_a_place(tables):
    for name, command in cli.commands().items():
        page, kind = tables.command_page(name), command.config_class()
        names = [*settings(kind), *(f"{s}.{n}" for s, inner in sections(kind).items() for n in settings(inner))]
        rows = {match[1]: match[2] for match in re.finditer(r"^\| `--([\w.]+)`[^|]* \| (.*?) \| ", page, re.MULTILINE)}
        assert set(rows) == set(names)
        assert all(rows.values())
        assert tables.command_uris()[name] in (ROOT / "mkdocs.yml").read_text()
    placed = re.findall(r"<!-- table: (\w+) -->", "".join(page.read_text(encoding="utf-8") for page in PAGES))
    assert sorted(placed) == sorted(tables.TABLES) and all(make().count("\n") > 10 for make in tables.TABLES.values())


def test_every_metric_of_the_code_is_described():
    source = "\n".join(path.read_text() for path in sorted((ROOT / "jaxrlhf").rglob("*.py")) if path.stem != "metrics")
    groups = "objective|policy|val|loss|sampling|guard|moe|timing|perf|system|logps"
    names = set(re.findall(rf"\"((?:{groups})/[a-z_/]+)\"", source))
    assert len(names) > 40 and [name for name in sorted(names) if describe(name) is None] == []
    assert describe("eval/helpful/accuracy") is describe("accuracy") and describe("eval/nothing") is None


def test_every_flag_that_the_text_names_is_one_of_a_command_or_script():
    known = {"config", "help", "verbose"} | {"num_nodes", "master_port", "hostfile", "signal"}  # launchers' own
    for command in cli.commands().values():
        kind = command.config_class()
        for part in (kind, *sections(kind).values()):
            known |= set(names_of(part)) | {f"no_{name}" for name in settings(part)}
        known |= set(kind.OTHER_FLAGS.flags) if getattr(kind, "OTHER_FLAGS", None) else set()
    for folder in ("scripts", "examples", "benchmarks", "tests"):
        source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py"))
        known |= {name.replace("-", "_") for name in re.findall(r"\"--([\w-]+)\"", source)}
    named = {}
    for page in set(PAGES) - {ROOT / "CHANGELOG.md"}:
        for name in re.findall(r"`--([A-Za-z][\w-]*)", page.read_text(encoding="utf-8").partition("<!-- results")[0]):
            named.setdefault(name.replace("-", "_"), page.name)
    assert len(named) > 200
    assert {name: page for name, page in named.items() if name not in known} == {}


def test_every_metric_that_the_text_names_is_described():
    groups = "objective|policy|val|loss|sampling|guard|moe|timing|perf|system|logps|eval|rewards|environment|replay"
    known = {name for metrics in METRICS.values() for metric in metrics for name in metric.names.split()}
    for page in PAGES:
        for name in re.findall(rf"`((?:{groups})/[\w/*]+)`", page.read_text(encoding="utf-8")):
            assert describe(name) or fnmatch.filter(known, name), (page.name, name)
