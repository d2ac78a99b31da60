"""The shape of the repository: which package may import which, what is installed, and what `import jaxrlhf` loads."""

import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "jaxrlhf": "jaxrlhf",
    "models": "jaxrlhf.models",
    "sharding": "jaxrlhf.sharding",
    "kernels": "jaxrlhf.kernels",
}

# From the bottom to the top; what stands in one line does not import one another. A unit is the part of a module's name
# after `jaxrlhf.`. A new module or package of jaxrlhf/ gets its place here.
LAYERS = (
    ("errors", "keys", "objectives", "kernels"),
    ("config",),
    ("distributed",),
    ("sharding", "rewards", "runs"),
    ("data",),
    ("models", "environments"),
    ("engine",),
    ("trainers",),
    ("rl",),
    ("plan",),
    ("commands",),
    ("bench",),
    ("cli",),
    ("__main__",),
    ("scripts",),
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
ISOLATED = ("kernels", "objectives", "errors", "keys")
TORCH_USERS = {"models/hf/torch_files.py", "jaxrlhf/bench/peers.py", "jaxrlhf/bench/trl_peer.py"}
USERS_OF_DATA = ("environments", "trainers", "rl", "plan", "commands", "bench", "cli", "scripts")
IMPORTED_WHERE_USED = (
    "datasets",
    "transformers",
    "matplotlib",
    "tensorboardX",
    "wandb",
    "trackio",
    "mlflow",
    "torch",
    "trl",
)
NOT_NEEDED = ("torch", "trl", "peft", "wandb", "trackio", "mlflow", "fastapi", "starlette", "uvicorn", "gradio")
"""Packages that training with an installed jaxrlhf does not need."""


def product_files():
    """(path, dotted module name) of every source file outside the tests."""
    for folder, package in {**PACKAGES, "scripts": "scripts"}.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield path, ".".join((package, *(part for part in parts if part != "__init__")))


def unit_of(module):
    """`jaxrlhf.models.config` -> `models`; `jaxrlhf` itself -> None; None for a module that is not ours."""
    parts = module.split(".")
    if parts[0] == "scripts":
        return "scripts"
    return parts[1] if parts[0] == "jaxrlhf" and len(parts) > 1 else None


def imports_of(tree, module, is_package):
    """(dotted name, node) of everything that the source imports, relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parents[: len(parents) - node.level + 1], *base.split(".")]).rstrip(".")
            if base == "jaxrlhf":
                for alias in node.names:
                    yield f"jaxrlhf.{alias.name}", node
            else:
                yield base, node


FILES = [
    pytest.param(path, module, ast.parse(path.read_text(), str(path)), id=str(path.relative_to(ROOT)))
    for path, module in product_files()
]


def our_imports(path, module, tree):
    return [
        (name, f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
        for name, node in imports_of(tree, module, path.name == "__init__.py")
        if name.split(".")[0] in ("jaxrlhf", "scripts")
    ]


@pytest.mark.parametrize(("path", "module", "tree"), FILES)
def test_imports_point_downwards(path, module, tree):
    unit = unit_of(module)
    if unit is None:
        pytest.skip("the package itself offers names of all layers")
    assert unit in RANK, f"{module} has no place in LAYERS of {Path(__file__).name}"
    for name, where in our_imports(path, module, tree):
        imported = unit_of(name)
        if unit == "scripts" and imported not in RANK:
            continue  # a script is a user of the package: any public name will do
        assert imported in RANK, f"{where}: not a module in LAYERS; import from the module that defines the name"
        if imported != unit:
            assert RANK[imported] < RANK[unit], f"{where}, which stands above or beside it"
            assert unit not in ISOLATED, f"{where}, but {unit} imports nothing of ours"
        if imported == "data":
            assert unit in ("data", *USERS_OF_DATA), f"{where}: only environments, trainers and commands know the data"


@pytest.mark.parametrize(("path", "module", "tree"), FILES)
def test_our_subpackages_are_imported_by_their_installed_names(path, module, tree):
    for name, node in imports_of(tree, module, path.name == "__init__.py"):
        assert name.split(".")[0] not in ("models", "sharding", "kernels", "tests"), (
            f"{path.relative_to(ROOT)}:{node.lineno} imports {name}; it is jaxrlhf.{name}"
        )


@pytest.mark.parametrize(("path", "module", "tree"), FILES)
def test_heavy_libraries_are_imported_where_they_are_used(path, module, tree):
    """Inside functions, or for type checkers alone."""

    def is_lazy(node: ast.AST) -> bool:
        if isinstance(node, ast.If):
            return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)

    lazy = {id(inner) for block in ast.walk(tree) if is_lazy(block) for inner in ast.walk(block)}
    for name, node in imports_of(tree, module, path.name == "__init__.py"):
        library = name.split(".")[0]
        where = f"{path.relative_to(ROOT)}:{node.lineno} imports {library}"
        if library in IMPORTED_WHERE_USED:
            assert id(node) in lazy, f"{where} at module level; import it in the function that needs it"
        if library == "torch":
            assert unit_of(module) in ("models", "bench"), f"{where}; only what TORCH_USERS lists may"


def test_torch_is_imported_only_to_read_its_files_and_to_measure_peers():
    importers = {
        str(path.relative_to(ROOT))
        for path, module, tree in (file.values for file in FILES)
        for name, _ in imports_of(tree, module, path.name == "__init__.py")
        if name.split(".")[0] in ("torch", "trl")
    }
    assert importers <= TORCH_USERS, importers - TORCH_USERS


@pytest.mark.parametrize(("path", "module", "tree"), FILES)
def test_each_file_says_its_subject_in_its_first_line(path, module, tree):
    if tree.body:
        assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel that `make wheel` makes, without a network."""
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE", "Makefile"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name, **({"symlinks": True} if copy is shutil.copytree else {}))
    options = ["PIP_ARGS=--no-build-isolation --quiet", f"PYTHON={sys.executable}"]
    subprocess.run(["make", "--silent", "wheel", *options], cwd=source, check=True)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel installed; its dependencies are links to those of this environment."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(("jaxrlhf", "__editable__", *NOT_NEEDED)):
            (site / entry.name).symlink_to(entry)
    options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    python = str(folder / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", *options, wheel]
    subprocess.run(command, check=True, env=environment_of_users())
    return folder


def environment_of_users():
    """This environment without what points to the clone, and with one device."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"XLA_FLAGS": re.sub(r"\S*device_count\S*", "", kept.get("XLA_FLAGS", "")), "JAX_PLATFORMS": "cpu"}


def test_the_wheel_has_every_module_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    installed = sorted(name for name in names if name.endswith(".py"))
    expected = sorted(
        module.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        for path, module in product_files()
        if module.split(".")[0] == "jaxrlhf"
    )
    assert installed == expected
    assert {f"jaxrlhf/{name}" for name in ("py.typed", "runs/report.html.jinja", "runs/plots.mplstyle")} <= set(names)


@pytest.mark.parametrize("folder", ["clone", "elsewhere"])
def test_an_install_is_importable_with_the_clone_as_current_folder(installed, tmp_path, folder):
    where = {"cwd": ROOT if folder == "clone" else tmp_path, "check": True, "capture_output": True, "text": True}
    where["env"] = environment_of_users()
    python = installed / "bin" / "python"
    program = "import jaxrlhf.models, jaxrlhf.sharding, jaxrlhf.kernels; print(jaxrlhf.models.__file__)"
    found = Path(subprocess.run([python, "-c", program], **where).stdout.strip())
    assert found.is_relative_to(ROOT if folder == "clone" else installed)
    assert "usage: jaxrlhf" in subprocess.run([python, "-m", "jaxrlhf", "--help"], **where).stdout


@pytest.mark.long
def test_the_installed_wheel_runs_the_demos_first_steps_in_an_empty_folder(installed, tmp_path):
    """Without torch, trackers and web frameworks, up to a Ctrl-C: a checkpoint is saved, and a resume would go on."""
    absent = [name for name in NOT_NEEDED if importlib.util.find_spec(name, None)]
    program = f"import importlib.util, jaxrlhf; print([n for n in {absent} if importlib.util.find_spec(n)])"
    options = {"cwd": tmp_path, "env": environment_of_users(), "text": True}
    done = subprocess.run([installed / "bin" / "python", "-c", program], capture_output=True, check=True, **options)
    assert done.stdout.strip() == "[]"
    demo = subprocess.Popen([installed / "bin" / "jaxrlhf", "demo"], stderr=subprocess.PIPE, **options)
    steps = (re.search(r"sft (\d+)/400", line) for line in demo.stderr)
    assert any(found and int(found[1]) >= 10 for found in steps)
    demo.send_signal(signal.SIGINT)
    rest = demo.communicate(timeout=300)[1]
    assert demo.returncode == 130 and "stopped after step" in rest
    records = (tmp_path / "runs" / "demo" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert sum("loss" in json.loads(line) or "train/loss" in json.loads(line) for line in records) >= 10
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_few_entries_stand_directly_under_the_package():
    links = {"models", "sharding", "kernels"}
    entries = {path.name for path in (ROOT / "jaxrlhf").iterdir() if not path.name.startswith("__")}
    assert links < entries
    assert len(entries - links - {"py.typed"}) <= 16, sorted(entries)


def test_importing_the_package_loads_no_heavy_library():
    program = "import sys, jaxrlhf; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert "jaxrlhf" in output.split()
    assert not set(output.split()) & set(IMPORTED_WHERE_USED)


def test_every_public_name_is_found_when_it_is_used_and_known_to_type_checkers():
    import jaxrlhf

    assert all(getattr(jaxrlhf, name) is not None for name in jaxrlhf.__all__)
    (block,) = (node for node in ast.parse((ROOT / "jaxrlhf/__init__.py").read_text()).body if isinstance(node, ast.If))
    assert sorted(alias.name for node in block.body for alias in node.names) == sorted(jaxrlhf.__all__)
