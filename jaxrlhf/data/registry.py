"""Named data sets: a declaration tells where a set lies, which columns it has, and how a raw row becomes an example."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxrlhf.config.imports import exception_line, import_object
from jaxrlhf.config.yaml_files import load_yaml_file
from jaxrlhf.data.columns import look_up
from jaxrlhf.data.files import Row
from jaxrlhf.data.formats import FORMATS, STEPS
from jaxrlhf.errors import InputError


@dataclass(frozen=True)
class NamedDataset:
    """Declaration of one data set.

    Attributes:
        path: name on the hub, or a local file or folder.
        licence: licence that the card on the hub states, or "unknown".
        name: what `--data_path` takes. Default: `path`.
        steps: steps that the set serves; see `STEPS`.
        config: configuration on the hub. Default: the hub's default.
        split: split to train on.
        eval_split: split to evaluate on. Default: a held-out share of `split`.
        revision: branch or commit on the hub. Default: its main branch.
        data_dir: folder in the repository that holds the files. Default: all of them.
        format: one of `FORMATS`. Default: recognised by the columns.
        fields: column of the format -> where the raw row has it, as a dotted path (`answers.0.text`).
        convert: makes a row, several rows or no row (None) of the format from a raw row.
        convert_all: makes rows from all raw rows, for sets whose examples span several rows. Its second argument is
            the step that reads them.
        prompt_template: template that the set needs: "raw" where its prompts have their own markup.
    """

    path: str
    licence: str = "unknown"
    name: str = ""
    steps: tuple[str, ...] = STEPS
    config: str = ""
    split: str = "train"
    eval_split: str = ""
    revision: str = ""
    data_dir: str = ""
    format: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[Row], Row | list[Row] | None] | None = None
    convert_all: Callable[[Iterable[Row], str], Iterator[Row]] | None = None
    prompt_template: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.path:
            raise InputError(f"data set {self.name!r}: 'path' is empty; give a name on the hub, or a file")
        if not self.name:
            object.__setattr__(self, "name", self.path)
        check_values(self)

    def rows(self, raw: Iterable[Row], step: str) -> Iterator[Row]:
        """Yields the rows of the set's format that raw rows give for a step, in order.

        Raises:
            InputError: a function of the declaration fails. The message names the data set and the row.
        """
        if self.convert_all is not None:
            with converting(self.name, "convert_all"):
                yield from self.convert_all(raw, step)
            return
        for row in raw:
            yield from self.convert_row(row)

    def convert_row(self, row: Row) -> list[Row]:
        """The rows of the set's format that one raw row gives. Not for sets with `convert_all`.

        A row keeps its other columns, such as the reference that a reward function reads, unless `convert` makes it.

        Raises:
            InputError: `convert` fails. The message names the data set and the row's columns.
        """
        if self.convert is None:
            return [{**row, **{name: look_up(row, path, None) for name, path in self.fields.items()}}]
        with converting(self.name, f"convert of a row with the columns {', '.join(row)}"):
            made = self.convert(row)
        if made is None:
            return []
        return made if isinstance(made, list) else [made]


FUNCTIONS = ("convert", "convert_all")
KEYS = tuple(item.name for item in dataclasses.fields(NamedDataset))
TEXT_KEYS = tuple(key for key in KEYS if key not in ("steps", "fields", *FUNCTIONS))


@contextlib.contextmanager
def converting(name: str, what: str) -> Iterator[None]:
    """Turns whatever a declaration's function raises into an InputError that names the data set."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the function may be the user's, and a set may have changed on the hub
        raise InputError(
            f"data set '{name}': {what} failed: {exception_line(error)}; check the declaration against the rows"
        ) from error


def check_types(dataset: NamedDataset) -> None:
    """Raises InputError for a value of the wrong type, and makes `steps` a tuple."""
    where = f"data set {dataset.name or dataset.path!r}"
    for key in TEXT_KEYS:
        value = getattr(dataset, key)
        if not isinstance(value, str):
            raise InputError(f"{where}: '{key}' must be text, found {value!r}")
    steps = dataset.steps
    if not isinstance(steps, list | tuple) or not steps or not all(step in STEPS for step in steps):
        raise InputError(f"{where}: 'steps' must be a list of {', '.join(STEPS)}, found {steps!r}")
    object.__setattr__(dataset, "steps", tuple(steps))
    fields = dataset.fields
    if not isinstance(fields, Mapping) or not all(isinstance(item, str) for pair in fields.items() for item in pair):
        raise InputError(f"{where}: 'fields' must map columns to dotted paths, such as prompt: question.text")
    for key in FUNCTIONS:
        value = getattr(dataset, key)
        if value is not None and not callable(value):
            raise InputError(f"{where}: '{key}' must be a function, found {value!r}")


def check_values(dataset: NamedDataset) -> None:
    """Raises InputError for an unknown format or column, and for settings that exclude one another."""
    where, form = f"data set {dataset.name!r}", dataset.format
    if form and form not in FORMATS:
        raise InputError(f"{where}: unknown format {form!r}; use one of {', '.join(FORMATS)}")
    columns = sorted({name for key in ([form] if form else FORMATS) for name in FORMATS[key].names})
    if unknown := [column for column in dataset.fields if column not in columns]:
        kind = f"the format {form} has" if form else "formats have"
        raise InputError(f"{where}: 'fields' names the column {unknown[0]!r}, but {kind} {', '.join(columns)}")
    given = [key for key in ("fields", *FUNCTIONS) if getattr(dataset, key)]
    if len(given) > 1:
        raise InputError(f"{where}: '{given[0]}' excludes '{given[1]}'; give one of them")


def find(path: str, registry: str | None = None) -> NamedDataset | None:
    """The declaration of a data set, or None where nobody declares it.

    Args:
        path: a name as `--data_path` takes it: `owner/name`, or `owner/name:config@split`.
        registry: the user's own file, whose declarations come first; see `load_registry`.
    """
    from jaxrlhf.data.known_datasets import KNOWN

    known = KNOWN | (load_registry(registry) if registry else {})
    return known.get(path) or known.get(re.split("[:@]", path, maxsplit=1)[0])


def load_registry(file: str) -> dict[str, NamedDataset]:
    """Reads a user's own data sets, by name.

    Args:
        file: YAML, a list of mappings with the keys of `NamedDataset` (without functions); or Python, with
            `DATASETS = [NamedDataset(...), ...]`.

    Raises:
        InputError: the file cannot be read, or a declaration in it is not valid. The message names the file.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"dataset_registry '{file}': no such file; check the path")
    readers = {".py": read_python, ".yaml": read_yaml, ".yml": read_yaml}
    if path.suffix.lower() not in readers:
        raise InputError(f"dataset_registry '{file}': unknown kind of file; use .yaml or .py")
    try:
        return by_name(readers[path.suffix.lower()](path))
    except InputError as error:
        raise InputError(f"dataset_registry '{file}': {error}") from error


def by_name(datasets: Iterable[NamedDataset]) -> dict[str, NamedDataset]:
    """Declarations by name. Raises InputError for a name that two of them share."""
    result: dict[str, NamedDataset] = {}
    for dataset in datasets:
        if dataset.name in result:
            raise InputError(f"two data sets are named {dataset.name!r}; give one of them another 'name'")
        result[dataset.name] = dataset
    return result


def read_yaml(path: Path) -> list[NamedDataset]:
    """The declarations of a YAML file."""
    try:
        items = load_yaml_file(path)
    except ValueError as error:
        raise InputError(f"{error}; correct the file") from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror}); check its permissions") from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InputError("must hold a list of data sets, each with 'path' and what else it needs")
    return [read_item(item, number) for number, item in enumerate(items, start=1)]


def read_item(item: dict[Any, Any], number: int) -> NamedDataset:
    """The declaration in one item of a YAML file. `number`: its position in the file, from 1."""
    where = f"data set {item.get('name') or item.get('path') or number!r}"
    allowed = [key for key in KEYS if key not in FUNCTIONS]
    if functions := [key for key in FUNCTIONS if key in item]:
        raise InputError(f"{where}: '{functions[0]}' is a function; declare the data set in a Python file")
    if unknown := [key for key in item if key not in allowed]:
        raise InputError(f"{where}: unknown key '{unknown[0]}'; use {', '.join(allowed)}")
    if "path" not in item:
        raise InputError(f"{where}: lacks 'path'; give a name on the hub, or a file")
    return NamedDataset(**item)


def read_python(path: Path) -> list[NamedDataset]:
    """The declarations in `DATASETS` of a Python file."""
    items = import_object(f"{path}:DATASETS", "its list of data sets")
    if not isinstance(items, list | tuple) or not all(isinstance(item, NamedDataset) for item in items):
        raise InputError("DATASETS must be a list of jaxrlhf.data.registry.NamedDataset")
    return list(items)
