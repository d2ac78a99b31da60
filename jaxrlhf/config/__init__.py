"""Settings: frozen dataclasses, the flags and YAML files that they come from, and the files that they are kept in."""

from annotated_types import Ge, Gt, Le, Lt

from jaxrlhf.config.annotations import (
    CountOrAuto,
    Derived,
    Fraction,
    FromYaml,
    Lasting,
    MayChange,
    NonNegative,
    NonNegativeInt,
    PathName,
    Positive,
    PositiveInt,
    Section,
    Seed,
    TrueWord,
    alias,
)
from jaxrlhf.config.flags import load_yaml, parse, save_yaml
from jaxrlhf.config.settings import (
    Settings,
    check_needs,
    default_of,
    lasting,
    lasting_defaults,
    places_of,
    settings,
    to_dict,
)
from jaxrlhf.config.yaml_files import read_yaml

__all__ = [
    "CountOrAuto",
    "Derived",
    "Fraction",
    "FromYaml",
    "Ge",
    "Gt",
    "Lasting",
    "Le",
    "Lt",
    "MayChange",
    "NonNegative",
    "NonNegativeInt",
    "PathName",
    "Positive",
    "PositiveInt",
    "Section",
    "Seed",
    "Settings",
    "TrueWord",
    "alias",
    "check_needs",
    "default_of",
    "lasting",
    "lasting_defaults",
    "load_yaml",
    "parse",
    "places_of",
    "read_yaml",
    "save_yaml",
    "settings",
    "to_dict",
]
