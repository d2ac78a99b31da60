"""The mixture: the sources of a run, each with its weight, columns, format, split, steps and evaluation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxrlhf.config import NonNegative, NonNegativeInt, Positive, Settings
from jaxrlhf.config.files import parse_json
from jaxrlhf.config.yaml_files import load_yaml_file, parse_yaml
from jaxrlhf.data.files import COMPRESSED, KINDS
from jaxrlhf.data.formats import FORMATS, STEPS
from jaxrlhf.errors import InputError

EVALUATIONS = ("own", "held_out", "none")


@dataclass(frozen=True)
class SourceConfig(Settings):
    """One source of a mixture."""

    path: str = ""
    """File, folder, glob or data set, as in data_path; required."""
    name: str = ""
    """Name in metrics; default: made from the path."""
    weight: Positive | None = None
    """Share of the rows, relative to the other sources; default: as large as the source is."""
    format: str = ""
    """Format of the rows, as in data_format; default: recognised by the columns."""
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    """Column by canonical name, such as {prompt: question, completion: answer}."""
    template: str = ""
    """Template of this source, as in chat_template or prompt_template; default: the run's."""
    split: str = ""
    """Split to train on, where the source has several."""
    steps: tuple[str, ...] = STEPS
    """Steps that the source serves; they share all of its rows."""
    limit: NonNegativeInt = 0
    """Use at most this many rows, chosen at random; 0: all."""
    epochs: NonNegative = 0.0
    """Passes after which the source ends, and the others go on without it; 0: it begins again."""
    evaluation: str = "own"
    """Rows to evaluate on. own: the source's own split, else rows held out; held_out; none; or a path."""

    def check(self) -> None:
        if not self.path:
            raise InputError("a source of data_mixture has no path; name a file, a folder or a data set")
        object.__setattr__(self, "steps", (self.steps,) if isinstance(self.steps, str) else tuple(self.steps))
        for what, given, allowed in (("steps", self.steps, STEPS), ("format", (self.format,), ("", *FORMATS))):
            if wrong := [value for value in given if value not in allowed]:
                raise InputError(
                    f"{what} '{wrong[0]}' of {self.path}: must be one of {', '.join(filter(None, allowed))}"
                )

    @property
    def short_name(self) -> str:
        """The name in metrics: `name`, or the end of the path without its suffix."""
        if self.name:
            return self.name.replace("/", "_")  # a slash divides the names of metrics
        last = Path(self.path.partition("@")[0]).name
        for ending in (*COMPRESSED[1:], *KINDS):
            last = last.removesuffix(ending)
        return last or self.path


def read_inline(value: str | Mapping[str, list] | list) -> tuple[str, ...]:
    """The setting `data_mixture` from YAML: a file name, or a list of sources, each kept as a JSON text."""
    if isinstance(value, str):
        return (value,)
    entries = value.get("sources", []) if isinstance(value, Mapping) else value
    return tuple(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)


def named_apart(sources: Sequence[SourceConfig]) -> tuple[SourceConfig, ...]:
    """The sources, where each but the first of one short name is also called by its folder, or else numbered.

    A name that the user gives stays.
    """
    result: list[SourceConfig] = []
    taken = {source.short_name for source in sources if source.name}
    for source in sources:
        if source.name:
            result.append(source)
            continue
        names = [source.short_name]
        names.append(f"{Path(source.path).parent.name}_{source.short_name}".strip("_"))
        names += [f"{source.short_name}_{number}" for number in range(2, len(sources) + 2)]
        result.append(source.replace(name=next(name for name in names if name not in taken)))
        taken.add(result[-1].short_name)
    return tuple(result)


def parse_mixture(values: Sequence[str]) -> tuple[SourceConfig, ...]:
    """The sources that `data_mixture` names: one YAML file, or JSON texts. Raises InputError naming what is wrong."""
    if len(values) == 1 and not values[0].lstrip().startswith("{"):
        place, entries = values[0], _read_file(values[0])
    else:
        place, entries = "data_mixture", [_inline(value) for value in values]
    sources = []
    for number, entry in enumerate(entries, start=1):
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping):
            raise InputError(f"{place}: source {number} is not a mapping with a path, but {type(entry).__name__}")
        try:
            sources.append(SourceConfig.create(**{str(key): value for key, value in entry.items()}))
        except InputError as error:
            raise InputError(f"{place}: source {number}: {error}") from error
    if not sources:
        raise InputError(f"{place}: names no sources; give a list of mappings with a path")
    sources = named_apart(sources)
    names = [source.short_name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{place}: two sources have the name '{twice[0]}'; give one of them another `name`")
    if len({source.weight is None for source in sources}) > 1:
        lacks = next(source.short_name for source in sources if source.weight is None)
        raise InputError(f"{place}: source '{lacks}' has no weight, but others have; give all of them one, or none")
    return sources


def _inline(text: str) -> object:
    """The source in a JSON text, which a config's YAML or a flag holds."""
    try:
        return _scalars(parse_json(text))
    except ValueError as error:
        raise InputError(
            f"data_mixture: {text[:80]!r} is not valid JSON ({error}); write the sources to a YAML file"
        ) from error


def _scalars(entry: object) -> object:
    """A source from the run's YAML, where every scalar is text, with its values read as YAML has them."""
    if isinstance(entry, Mapping):
        return {key: _scalars(value) for key, value in entry.items()}
    if isinstance(entry, list):
        return [_scalars(value) for value in entry]
    return parse_yaml(entry) if isinstance(entry, str) and entry else entry


def _read_file(name: str) -> list[object]:
    """The list of sources in a YAML file: the file's list, or the list under `sources`."""
    path = Path(name).expanduser()
    try:
        value = load_yaml_file(path)
    except OSError as error:
        raise InputError(
            f"data_mixture '{name}': cannot be read ({error.strerror or error}); check the path"
        ) from error
    except ValueError as error:
        raise InputError(f"data_mixture '{name}': {error}") from error
    if isinstance(value, Mapping):
        if unknown := sorted(set(map(str, value)) - {"sources"}):
            raise InputError(f"data_mixture '{name}': unknown key '{unknown[0]}'; the file holds a list `sources`")
        value = value.get("sources")
    if not isinstance(value, list):
        raise InputError(f"data_mixture '{name}': must hold a list of sources, each with a path")
    return value
