"""Finds a reward function by its name or import path, and prepares its arguments (docs/rewards.md)."""

import dataclasses
import inspect
import re
from collections.abc import Collection, Mapping

from jaxrlhf.config.imports import exception_line, import_function
from jaxrlhf.errors import InputError
from jaxrlhf.rewards.arguments import (
    POSITIONAL,
    ROW_COLUMNS,
    Function,
    Log,
    Samples,
    Signature,
    option_kinds,
    read_signature,
)
from jaxrlhf.rewards.verifiable import BUILT_IN, OWN_PROCESS, REFERENCE_CHECKS

DEFAULT_COLUMN = "answer"
_OPTION = re.compile(r"(?<!\\):(?=[A-Za-z_]\w*=)")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
"""Types of options, in words."""
_WORDS = {"true": True, "false": False, "none": None, "null": None, "~": None, "": None}
_MORE_WORDS = {"yes": True, "on": True, "1": True, "no": False, "off": False, "0": False}


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A function and its arguments: `function(prompts, responses, **columns, **options)`, or by name (`Signature`).

    Attributes:
        name: name for messages and metrics.
        function: the Python function.
        columns: column of the data for each required parameter.
        optional: parameters that get the column of their name when the data has it; None: all columns of the data.
        options: values of further parameters.
        check_references: takes a row's values of `columns`; raises ValueError where no response can be scored.
        signature: how it takes prompts and responses; None in the trainer, for a function in a process of its own.
        wanted: columns that are read for this function where the data has them.
        needs_ids: it cannot be called without the token ids of the responses.
    """

    name: str
    function: Function
    columns: Mapping[str, str]
    optional: tuple[str, ...] | None
    options: Mapping[str, object]
    check_references: Function | None = None
    signature: Signature | None = None
    wanted: tuple[str, ...] = ()
    needs_ids: bool = False

    def check(self, samples: Samples) -> None:
        """Raises InputError when the samples lack what the function needs."""
        missing = [column for column in self.columns.values() if column not in samples.columns]
        if missing:
            raise InputError(
                f"reward function {self.name}: needs the column '{missing[0]}', and the samples have "
                f"{', '.join(samples.columns) or 'none'}; name it in reward_columns, or give the function another one"
            )
        if self.needs_ids and samples.completion_ids is None:
            raise InputError(
                f"reward function {self.name}: takes completion_ids, and the token ids of these responses are not "
                "known; give the parameter a default, or leave the function out here"
            )

    def arguments(self, samples: Samples, log: Log) -> tuple[tuple[object, ...], dict[str, object]]:
        """The arguments of a call, by position and by name. Raises InputError as `check`."""
        self.check(samples)
        columns, signature = samples.columns, self.signature or Signature({}, True)
        args, provided = signature.values(samples, log)
        given = {name for name in columns if self.optional is None or name in self.optional}
        given -= {*self.columns, *self.options, "prompts", "responses", *signature.provided}
        given -= {*ROW_COLUMNS} if signature.of_trl else set()
        sources = {name: name for name in columns if name in given} | dict(self.columns)
        values = {parameter: list(columns[column]) for parameter, column in sources.items()}
        return args, {**provided, **values, **self.options}


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Splits `name:key=value:key=value` into name and options. `\\:` stands for a `:` before `word=` in a value."""
    name, *options = _OPTION.split(spec)
    pairs = [option.partition("=") for option in options]
    keys = [key for key, _, _ in pairs]
    doubled = next((key for key in keys if keys.count(key) > 1), None)
    if doubled is not None:
        raise InputError(f"reward function {spec!r}: the option {doubled} is given twice; remove one")
    return name.strip(), {key: re.sub(r"\\:(?=[A-Za-z_]\w*=)", ":", value) for key, _, value in pairs}


def join_spec(name: str, options: Mapping[str, object]) -> str:
    """Joins name and options to a spec; the inverse of `split_spec`."""
    texts = [f":{key}=" + re.sub(r":(?=[A-Za-z_]\w*=)", r"\\:", str(value)) for key, value in options.items()]
    return name + "".join(texts)


def read_specs(value: object) -> object:
    """Turns the mappings among the specs of a config file into texts; returns other values as they are.

    `[number_match, {regex: {pattern: x}}]` and `{number_match: , regex: {pattern: x}}` both become
    `["number_match", "regex:pattern=x"]`.
    """
    if isinstance(value, dict):
        value = [{name: options} for name, options in value.items()]
    if not isinstance(value, list | tuple) or not any(isinstance(item, dict) for item in value):
        return value
    return [_from_mapping(item) if isinstance(item, dict) else item for item in value]


def _from_mapping(item: dict) -> str:
    """The spec of `{name: {option: value}}`."""
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
    """Raises InputError for a spec that is wrong, as far as this shows without running the user's code."""
    name, options = split_spec(spec)
    if name in BUILT_IN:
        load_function(spec)
    elif ":" not in name:
        near = "; a comma separates functions: use a list in the config file for an option with a comma"
        raise InputError(
            f"reward function {spec!r}: no built-in one is named {name!r} ({', '.join(BUILT_IN)}); a function of your "
            "own is package.module:function or path/to/file.py:function" + (near if not options else "")
        )


def has_own_process(spec: str | Function) -> bool:
    """True for a spec of what may hang or crash: the user's code, and the user's regular expressions."""
    return isinstance(spec, str) and split_spec(spec)[0] not in BUILT_IN.keys() - OWN_PROCESS


def load_function(spec: str | Function) -> RewardFunction:
    """Loads a reward function into this process.

    Args:
        spec: a name of `BUILT_IN`, `package.module:function` or `path/to/file.py:function`, with options, as in
            `length:target=200`; or a Python function. A class, and a function whose first two parameters options
            fill, is called with the options, and makes the reward function.

    Raises:
        InputError: the function cannot be imported, or does not take prompts, responses and its options.
    """
    given: dict[str, str] = {}
    if isinstance(spec, str):
        path, given = split_spec(spec)
        name = path.rpartition(":")[2]
        function = BUILT_IN[path] if path in BUILT_IN else import_function(path, "reward function")
    else:
        name, function = getattr(spec, "__name__", type(spec).__name__), spec
    label = f"reward function {repr(spec) if isinstance(spec, str) else name}"
    if BUILT_IN.get(name) is not function and _makes_function(function, given):
        function, given = _made(label, function, given), {}
        name = getattr(function, "__name__", name)
    signature = read_signature(label, function)
    parameters, open_ended = signature.parameters, signature.open_ended
    built_in = BUILT_IN.get(name) is function
    columns: dict[str, str] = {}
    if built_in:  # its options are keyword-only
        columns = {key: key for key, p in parameters.items() if p.kind in POSITIONAL}
    if "references" in columns:
        columns["references"] = given.pop("column", DEFAULT_COLUMN)
    settable = [key for key in parameters if key not in columns]
    unknown = [key for key in given if key not in settable and not open_ended]
    if unknown:
        known = settable + ["column"] * ("references" in columns)
        raise InputError(
            f"{label}: has no option {unknown[0]!r} (it has {', '.join(known) or 'none'}); "
            "within a value, write a colon that comes before a word and = as \\:"
        )
    options = _read_options(label, parameters, given)
    free = {key: p for key, p in parameters.items() if key not in (*columns, *options)}
    required = [key for key, p in free.items() if p.default is p.empty]
    if not built_in:
        optional = None if open_ended else tuple(free)
        wanted = (*(key for key in free if key not in required), *signature.keys) if signature.of_trl else ()
        ids = inspect.signature(function).parameters.get("completion_ids") if signature.provided else None
        return RewardFunction(
            name,
            function,
            {key: key for key in required},
            optional,
            options,
            signature=signature,
            wanted=tuple(dict.fromkeys(key for key in wanted if key not in options)),
            needs_ids=ids is not None and ids.default is ids.empty,
        )
    if required:
        raise InputError(f"{label}: needs the option {required[0]}, as in {name}:{required[0]}=…")
    function([], [], **{key: [] for key in columns}, **options)  # a built-in function checks its options
    return RewardFunction(name, function, columns, (), options, REFERENCE_CHECKS.get(name), signature)


def _makes_function(function: Function, given: Mapping[str, str]) -> bool:
    """True for a class, and for a function of which an option fills one of the first two parameters."""
    if inspect.isclass(function):
        return True
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    places = [name for name, p in parameters.items() if p.kind in POSITIONAL]
    of_trl = "completions" in parameters or "completion_ids" in parameters
    return not of_trl and any(name in given for name in places[:2])


def _made(label: str, factory: Function, given: Mapping[str, str]) -> Function:
    """The reward function that a class or a function makes from the options. Raises InputError."""
    try:
        parameters = dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        parameters = {}
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and name not in given
    ]
    unknown = [name for name in given if name not in parameters]
    if missing or unknown:
        wrong = f"needs the option {missing[0]}" if missing else f"has no option {unknown[0]!r}"
        raise InputError(f"{label}: {wrong} (its options: {', '.join(parameters) or 'none'})")
    try:
        function = factory(**_read_options(label, parameters, given))
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"{label}: making it failed: {exception_line(error, factory)}") from error
    if not callable(function):
        raise InputError(f"{label}: must make a function, made an object of type {type(function).__name__}")
    return function


def _read_options(
    label: str, parameters: Mapping[str, inspect.Parameter], given: Mapping[str, str]
) -> dict[str, object]:
    """The values of options."""
    return {
        key: _read_option(f"{label}: option {key}", text, option_kinds(parameters.get(key), _KINDS))
        for key, text in given.items()
    }


def _read_option(label: str, text: str, kinds: Collection[object]) -> object:
    """Reads an option's text as the first of true, false, none, whole number, number and text that `kinds` hold."""
    words = _WORDS if str in kinds else _WORDS | _MORE_WORDS
    for read in (words.__getitem__, int, float, lambda _: text):
        try:
            value = read(text.lower())
        except (KeyError, ValueError):
            continue
        if type(value) in kinds:
            return value
    expected = " or ".join(name for kind, name in _KINDS.items() if kind in kinds)
    raise InputError(f"{label}: expected {expected}, got {text!r}")
