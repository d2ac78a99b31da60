"""Settings of another project's scripts, translated into ours: flags renamed, obsolete with advice, or refused."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxrlhf.errors import InputError

Words = tuple[str, ...]
Line = dict[str, Any]
"""Settings by name, hyphens as underscores: the words that follow a flag, or the value that a YAML file has."""
Say = Callable[[str], None]


def words_of(value: object) -> Words:
    """The words of a flag, or the scalar or list of a YAML file, as text."""
    return tuple(map(str, value)) if isinstance(value, tuple | list) else (str(value),)


def first_of(line: Line, names: Collection[str]) -> object:
    """The value of the last of these settings; None where none of them is given."""
    return next((line[name] for name in reversed(line) if name in names), None)


def count(line: Line, *names: str, default: int = 1) -> int:
    """The whole number of one of these settings. Raises InputError for something else."""
    value = first_of(line, names)
    if value is None:
        return default
    words = words_of(value)
    if len(words) != 1 or not words[0].isdecimal() or int(words[0]) < 1:
        raise InputError(f"{names[0]}={' '.join(words) or 'none'} must be a whole number of at least 1")
    return int(words[0])


@dataclass(frozen=True)
class Flag:
    """A flag of another project's script."""

    setting: str = ""
    """The setting that it sets; empty where it sets none."""
    advice: str = ""
    """Why it is not needed, or what to use instead."""
    convert: Callable[[str], str | None] = str
    """Turns its value into ours; None refuses the value."""
    remedy: str = ""
    """Advice in the error about a refused flag or value."""
    value: str = ""
    """Our value for a flag that takes none."""
    quiet: tuple[str, ...] = ()
    """Values that have no effect here and need no advice, because what they ask for is so anyway."""

    @property
    def kind(self) -> str:
        """alias, obsolete or refused."""
        return "alias" if self.setting else "obsolete" if self.advice else "refused"

    def read(self, value: object, shown: str, say: Say) -> Words | str | None:
        """Our setting's value; None where it has none.

        Args:
            value: the words of the flag, or what a YAML file has.
            shown: the flag with its value, for messages.
            say: called with the advice.

        Raises:
            InputError: the flag or the value is refused.
        """
        given = words_of(value)
        if given and all(word.lower() in self.quiet for word in given):
            return None
        converted = [self.convert(word) for word in given or filter(None, [self.value])]
        if self.kind == "refused" or None in converted:
            raise InputError(f"{shown}: {self.remedy}")
        if self.advice:
            say(f"{shown} is ignored: {self.advice}")
        if not self.setting:
            return None
        words = tuple(map(str, converted))
        return words if isinstance(value, tuple | list) else words[0]


@dataclass(frozen=True)
class Script:
    """One of our commands' table of the flags of another project's script for the same purpose."""

    project: str
    """Whose script it is, for messages."""
    flags: Mapping[str, Flag]
    """Flags that we have under another name or not at all, or whose values differ."""
    marker: str = ""
    """The flag by which a command line is recognised as the script's own."""
    as_keys: bool = False
    """Messages show its settings as keys of a file."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Its defaults that differ from ours, for flags that a line of its own does not give."""
    rules: tuple[Callable[[Line, Say], None], ...] = ()
    """Translate flags that mean something only together."""

    def owns(self, names: Collection[str]) -> bool:
        """True for the flags of a command line that is the script's own, whose defaults then hold."""
        return self.marker in names and "config" not in names

    def translate(self, given: Sequence[tuple[str, object]], names: Mapping[str, str], say: Say, *, own: bool) -> Line:
        """Translates settings.

        Args:
            given: the settings in order; the last of equal ones wins.
            names: our names and aliases, each with the name of its setting.
            say: called with each line of advice.
            own: settings that are not given have the script's defaults.

        Returns:
            The settings for our parser.

        Raises:
            InputError: naming every setting that cannot be honoured.
        """
        line: Line = {}
        for name, value in given:
            line.pop(name, None)
            line[name] = value
        if own:
            self._add_defaults(line, names, say)
        for rule in self.rules:
            rule(line, say)
        if own and self.marker in line and self.flags[self.marker].kind == "obsolete":
            del line[self.marker]  # announced with the defaults
        translated, errors = {}, []
        for name, value in line.items():
            flag = self.flags.get(name)
            try:
                value = value if flag is None else flag.read(value, self._shown(name, value), say)
            except InputError as error:
                errors.append(str(error))
            if value is not None:
                setting = flag.setting if flag else name
                translated.pop(setting, None)
                translated[setting] = value
        if errors:
            raise InputError("\n".join(errors))
        return translated

    def _shown(self, name: str, value: object) -> str:
        words = " ".join(words_of(value))
        return f"{name}={words}" if self.as_keys else f"--{name} {words}".rstrip()

    def _add_defaults(self, line: Line, names: Mapping[str, str], say: Say) -> None:
        """Adds the script's defaults for settings that the line does not set, by whatever name."""

        def setting_of(name: str) -> str:
            return (name in self.flags and self.flags[name].setting) or names.get(name, name)

        set_already = {setting_of(name) for name in line}
        taken = {name: value for name, value in self.defaults.items() if setting_of(name) not in set_already}
        if "data_mixture" in line:
            taken.pop("data_path", None)
        line |= {name: (value,) for name, value in taken.items()}
        if taken:
            shown = " ".join(f"--{name} {value}" for name, value in taken.items())
            begin = f"--{self.marker}: " if self.marker else ""
            say(f"{begin}flags that are not given have {self.project}'s defaults, {shown}")
