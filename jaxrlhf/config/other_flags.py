"""Command lines of another project's scripts, translated into ours: flags renamed, obsolete with advice, or refused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxrlhf.errors import InputError

Words = tuple[str, ...]
Line = dict[str, Any]
"""The flags of a command line by name, hyphens as underscores, each with the words that follow it (or what a YAML file
would have)."""
Say = Callable[[str], None]


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
    """What to do where the value, or the flag, is refused."""
    value: str = ""
    """Our value for a flag that takes none."""

    @property
    def kind(self) -> str:
        """alias, obsolete or refused."""
        return "alias" if self.setting else "obsolete" if self.advice else "refused"

    def read(self, name: str, words: Words, say: Say) -> Words | None:
        """The words for our setting; None where there is none. Raises InputError for what is refused."""
        converted = [self.convert(word) for word in words or filter(None, [self.value])]
        if self.kind == "refused" or None in converted:
            raise InputError(f"{' '.join((f'--{name}', *words))}: {self.remedy}")
        if self.advice:
            say(f"{' '.join((f'--{name}', *words))} is ignored: {self.advice}")
        return tuple(map(str, converted)) if self.setting else None


@dataclass(frozen=True)
class Script:
    """How one of our commands reads the flags of another project's script for the same purpose."""

    project: str
    """Whose script it is, for messages."""
    flags: Mapping[str, Flag]
    """Flags that we have under another name or not at all, or whose values differ."""
    marker: str = ""
    """The flag by which a line is recognised as the script's own; the defaults below then hold."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Its defaults that differ from ours, for flags that the line does not give."""
    rules: tuple[Callable[[Line, Say], None], ...] = ()
    """Translate flags that mean something only together."""

    def translate(self, given: Sequence[tuple[str, Words]], names: Mapping[str, str], say: Say) -> Line:
        """Translates a command line.

        Args:
            given: the flags in order; the last of equal ones wins.
            names: our names and aliases, each with the name of its setting.
            say: called with each line of advice.

        Returns:
            The flags for our parser.

        Raises:
            InputError: naming every flag that cannot be honoured.
        """
        line: Line = {}
        for name, words in given:
            line.pop(name, None)
            line[name] = words
        takes_defaults = self.marker in line and "config" not in line
        if takes_defaults:
            self._add_defaults(line, names, say)
        for rule in self.rules:
            rule(line, say)
        if takes_defaults and self.flags[self.marker].kind == "obsolete":
            del line[self.marker]  # announced with the defaults
        translated, errors = {}, []
        for name, words in line.items():
            flag = self.flags.get(name)
            try:
                words = words if flag is None else flag.read(name, words, say)
            except InputError as error:
                errors.append(str(error))
            if words is not None:
                setting = flag.setting if flag else name
                translated.pop(setting, None)
                translated[setting] = words
        if errors:
            raise InputError("\n".join(errors))
        return translated

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
            say(f"--{self.marker}: flags that are not given have {self.project}'s defaults, {shown}")
