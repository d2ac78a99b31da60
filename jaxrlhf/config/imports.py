"""Imports an object of the user's, named as `package.module:name` or `path/to/file.py:name`; reads its keywords."""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
import traceback
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import ModuleType

from jaxrlhf.errors import InputError


def import_object(spec: str, what: str) -> object:
    """Imports the object that a setting names.

    A file runs once, however many of its objects are imported. The working directory, or the file's folder, is added
    at the end of `sys.path`, so a module finds its neighbours as a script does.

    Args:
        spec: `package.module:name` or `path/to/file.py:name`. A relative path starts at the working directory.
            `name` may have dots, as in `Class.method`.
        what: subject of the error messages, such as "reward function" or "advantage_estimator".

    Raises:
        InputError: the spec has another form, the file, the module or the name does not exist, or the user's code
            raises. The message names the spec, the missing part, and the exception with its line.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise InputError(f"{what} {spec!r}: must be package.module:name or path/to/file.py:name")
    is_file = place.endswith(".py") or "/" in place
    try:
        module = _import_file(Path(place)) if is_file else _import_module(place)
    except InputError as error:
        raise InputError(f"{what} {spec!r}: {error}") from error
    except ModuleNotFoundError as error:
        importer = "" if not is_file and f"{place}.".startswith(f"{error.name}.") else f", which {place} imports"
        raise InputError(
            f"{what} {spec!r}: there is no module {error.name}{importer}, in the working directory {Path.cwd()} or in "
            "the installed packages; check the name, or install it"
        ) from error
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise InputError(f"{what} {spec!r}: importing {place} failed: {exception_line(error)}") from error
    try:
        return reduce(getattr, name.split("."), module)
    except AttributeError as error:
        own_names = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
        raise InputError(
            f"{what} {spec!r}: {place} has no {name!r}; its functions and classes: {', '.join(own_names) or 'none'}"
        ) from error


def import_function(spec: str, what: str) -> Callable[..., object]:
    """Imports a function or another callable; see `import_object`. Raises InputError for an object that is not one."""
    found = import_object(spec, what)
    if not callable(found):
        raise InputError(f"{what} {spec!r}: must be a function, found an object of type {type(found).__name__}")
    return found


def exception_line(error: BaseException, function: Callable[..., object] | None = None) -> str:
    """Formats an exception in one line: `ValueError: no such thing (line 12 of file.py)`.

    Args:
        error: an exception that was raised.
        function: the line is the innermost one in this function's file. Default: the innermost line of all.
    """
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename] or frames
    lines = [(frame.lineno, frame.filename) for frame in own[-1:]]
    if isinstance(error, SyntaxError) and error.filename:  # the frames are those of the import
        lines = [(error.lineno, error.filename)]
    place = "".join(f" (line {number} of {Path(name).name})" for number, name in lines)
    return f"{text[:300]}{place}"


def _import_module(name: str) -> ModuleType:
    _append_to_path(Path.cwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    """Runs the file as a module, unless it was imported before."""
    if not path.is_file():
        raise InputError(f"{path}: no such file in {Path.cwd()}; check the path")
    path = path.resolve()
    name = f"{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file (.py)")
    _append_to_path(path.parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _append_to_path(folder: Path) -> None:
    """Lets imports find what lies in `folder`, after everything that they find without it."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def constant_keys(function: Callable[..., object], keywords: str) -> tuple[str, ...]:
    """The names that a function reads as `kwargs["name"]`, `kwargs.get("name")` or `kwargs.pop("name")`."""
    source = function if inspect.isroutine(function) else type(function).__call__
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(source))))
    except (OSError, TypeError, SyntaxError):  # no source, or one line of several (a lambda)
        return ()
    found = []
    for node in ast.walk(tree):
        key = None
        if isinstance(node, ast.Subscript) and _is_name(node.value, keywords):
            key = node.slice
        elif isinstance(node, ast.Call) and node.args and _reads(node.func, keywords):
            key = node.args[0]
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            found.append(key.value)
    return tuple(dict.fromkeys(found))


def _reads(function: ast.AST, keywords: str) -> bool:
    """True for `kwargs.get` and `kwargs.pop`."""
    return (
        isinstance(function, ast.Attribute) and function.attr in ("get", "pop") and _is_name(function.value, keywords)
    )


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
