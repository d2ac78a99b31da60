"""Finds a reward function by its name or import path, and works out what it is called with (docs/rewards.md)."""

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.errors import InputError
from jaxrlhf.rewards.verifiable import BUILT_IN, OPTION_CHECKS, REFERENCE_CHECKS

_OPTION = re.compile(r"(?<!\\):(?=[A-Za-z_]\w*=)")
_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
DEFAULT_COLUMN = "answer"


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A function and how to call it: `function(prompts, responses, **columns, **options)`.

    `columns` maps those of its parameters that it cannot do without to columns of the data. `optional`: parameters that
    get the column of their name where the data has it (None: all of the data's columns). `check_references` raises
    ValueError for a reference that no response could match.
    """

    name: str
    function: Callable[..., Any]
    columns: Mapping[str, str]
    optional: tuple[str, ...] | None
    options: Mapping[str, Any]
    check_references: Callable[[Any], Any] | None = None

    def arguments(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The keyword arguments that come from the data's `columns`. Raises InputError where one is missing."""
        missing = [column for column in self.columns.values() if column not in columns]
        if missing:
            raise InputError(
                f"reward function {self.name}: needs the column '{missing[0]}', and the samples have "
                f"{', '.join(columns) or 'none'}; name it in reward_columns, or give the function another one"
            )
        taken = [name for name in columns if self.optional is None or name in self.optional]
        taken = [name for name in taken if name not in (*self.columns, *self.options, "prompts", "responses")]
        return {name: list(columns[name]) for name in taken} | {
            parameter: list(columns[column]) for parameter, column in self.columns.items()
        }


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """`name:key=value:key=value` as (name, options). A value's `:` before `word=` is written `\\:`."""
    name, *options = _OPTION.split(spec)
    pairs = [option.partition("=") for option in options]
    keys = [key for key, _, _ in pairs]
    doubled = next((key for key in keys if keys.count(key) > 1), None)
    if doubled is not None:
        raise InputError(f"reward function {spec!r}: the option {doubled} is given twice")
    return name.strip(), {key: re.sub(r"\\:(?=[A-Za-z_]\w*=)", ":", value) for key, _, value in pairs}


def join_spec(name: str, options: Mapping[str, Any]) -> str:
    """The inverse of `split_spec`."""
    texts = [f":{key}=" + re.sub(r":(?=[A-Za-z_]\w*=)", r"\\:", str(value)) for key, value in options.items()]
    return name + "".join(texts)


def read_specs(value: Any) -> Any:
    """The specs of a config file, where mappings may stand for options, as texts; other values are left alone.

    `[number_match, {regex: {pattern: x}}]` and `{number_match: , regex: {pattern: x}}` both are
    `["number_match", "regex:pattern=x"]`.
    """
    if isinstance(value, dict):
        value = [{name: options} for name, options in value.items()]
    if type(value) not in (list, tuple):
        return value
    return [_from_mapping(item) if isinstance(item, dict) else item for item in value]


def _from_mapping(item: dict) -> str:
    (name, options), *more = item.items() or [("", None)]
    if more or not name:
        raise InputError(
            f"reward_functions: {item} must be one function and its options, as in {{regex: {{pattern: x}}}}"
        )
    if options is None or options == "":
        return str(name)
    if not isinstance(options, dict):
        raise InputError(f"reward_functions: the options of {name} must be a mapping, found {options!r}")
    return join_spec(str(name), options)


def check_spec(spec: str) -> None:
    """Refuse what is wrong with a spec as far as it can be seen without running code of the user's."""
    name, options = split_spec(spec)
    if name in BUILT_IN:
        load_function(spec)
    elif ":" not in name:
        near = "; a comma separates functions: where one belongs to an option, use a list in the config file"
        raise InputError(
            f"reward function {spec!r}: no built-in one is named {name!r} ({', '.join(BUILT_IN)}); a function of your "
            "own is package.module:function or path/to/file.py:function" + (near if not options else "")
        )


def load_function(spec: str | Callable[..., Any]) -> RewardFunction:
    """The function that `spec` names, or a given one, ready to be called.

    Raises InputError when it cannot be found or imported, or does not take the options or what every reward function
    is called with.
    """
    if callable(spec):
        function, name, given = spec, getattr(spec, "__name__", type(spec).__name__), {}
    else:
        path, given = split_spec(spec)
        name = path.rpartition(":")[2]
        function = BUILT_IN[path] if path in BUILT_IN else import_function(path)
    built_in = BUILT_IN.get(name) is function
    parameters, open_ended = _parameters(spec if isinstance(spec, str) else name, function)
    columns: dict[str, str] = {}
    if built_in and "references" in parameters:
        columns["references"] = given.pop("column", DEFAULT_COLUMN)
    settable = [key for key in parameters if key not in columns]
    unknown = [key for key in given if key not in settable and not open_ended]
    if unknown:
        known = settable + ["column"] * bool(columns)
        raise InputError(
            f"reward function {spec!r}: has no option {unknown[0]!r} (it has {', '.join(known) or 'none'}); "
            "within a value, write a colon that comes before a word and = as \\:"
        )
    options = {key: _option(spec, key, value, function, parameters.get(key)) for key, value in given.items()}
    if built_in:
        bare = [key for key in settable if parameters[key].default is parameters[key].empty and key not in options]
        if bare:
            raise InputError(f"reward function {spec!r}: needs the option {bare[0]}, as in {name}:{bare[0]}=…")
        if name in OPTION_CHECKS:
            OPTION_CHECKS[name](**options)
        return RewardFunction(name, function, columns, (), options, REFERENCE_CHECKS.get(name))
    free = {key: p for key, p in parameters.items() if key not in options}
    columns = {key: key for key, p in free.items() if p.default is p.empty}
    return RewardFunction(name, function, columns, None if open_ended else tuple(free), options)


def _parameters(name: str, function: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The function's parameters after prompts and responses, and whether it takes any keyword."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return {}, True  # written in C: nothing is known of it
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    if len(places) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in places):
        raise InputError(
            f"reward function {name}: is called as function(prompts, responses, **columns), but takes "
            f"{inspect.signature(function)}"
        )
    rest = [p for p in parameters if p not in places[:2]]
    return {p.name: p for p in rest if p.kind in _KEYWORD}, any(p.kind is p.VAR_KEYWORD for p in rest)


def _option(spec: Any, key: str, value: str, function: Callable[..., Any], parameter: inspect.Parameter | None) -> Any:
    """An option's text as its annotation or default says, else as a number where it is one."""
    kinds = {int, float, bool, str}
    kind: Any = int | float | bool | str
    if parameter is not None:
        if type(parameter.default) in kinds:
            kind = type(parameter.default)
        try:
            hint = typing.get_type_hints(function).get(key)
        except (NameError, TypeError, AttributeError):
            hint = None
        members = set(typing.get_args(hint)) - {type(None)} or {hint}
        kind = hint if members <= kinds else kind
    for k in (int, float, str):
        try:
            return k(value)
        except ValueError:
            continue


def import_function(path: str) -> Callable[..., Any]:
    """The function at `package.module:function` or `path/to/file.py:function` (relative to the working directory)."""
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise InputError(f"reward function {path!r}: must be package.module:function or path/to/file.py:function")
    is_file = place.endswith(".py") or "/" in place
    try:
        module = _import_file(Path(place)) if is_file else _import_module(place)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        own = error.name is not None and (place == error.name or place.startswith(f"{error.name}."))
        why = f"there is no module {error.name}" + ("" if own and not is_file else f", which {place} imports")
        raise InputError(
            f"reward function {path!r}: {why}; looked in the working directory {Path.cwd()} and where Python finds "
            "packages. Check the name, or install it"
        ) from error
    except (Exception, SystemExit) as error:
        raise InputError(f"reward function {path!r}: importing {place} failed: {last_line(error)}") from error
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        here = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        what = "holds no function" if found is None else f"holds a {type(found).__name__}, not a function,"
        raise InputError(
            f"reward function {path!r}: {place} {what} of the name {name} (its functions: {', '.join(here) or 'none'})"
        )
    return found


def _import_module(name: str) -> Any:
    _findable(Path.cwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> Any:
    """The file as a module, run once; its folder is searched for what it imports, as for a script."""
    if not path.is_file():
        raise InputError(f"reward function {str(path)!r}: there is no such file in {Path.cwd()}; check the path")
    path = path.resolve()
    name = f"{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    _findable(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise InputError(f"reward function {str(path)!r}: not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _findable(folder: Path) -> None:
    """Let imports find what lies in `folder`, after everything that they find without."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def last_line(error: BaseException, of: Callable[..., Any] | None = None) -> str:
    """`ValueError: no such thing (line 12 of file.py)`: the last line of the traceback, and where it arose.

    `of`: the function whose file is meant; default: the innermost place.
    """
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(of), "__code__", None) if of is not None else None
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename] or frames
    place = f" (line {own[-1].lineno} of {Path(own[-1].filename).name})" if own else ""
    return f"{text[:300]}{place}"
