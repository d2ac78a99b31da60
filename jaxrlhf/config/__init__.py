"""Settings: frozen dataclasses from flags and YAML files, and back to files."""

from jaxrlhf.config.settings import (
    REQUIRED,
    field,
    fixed,
    from_dict,
    help_text,
    like,
    load_yaml,
    parse,
    read_yaml,
    save_yaml,
    to_dict,
)

__all__ = ["REQUIRED", "field", "fixed", "from_dict", "help_text", "like", "load_yaml", "parse", "read_yaml"]
__all__ += ["save_yaml", "to_dict"]
