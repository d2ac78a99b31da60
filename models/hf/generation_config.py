"""The generation config of a model: read beside config.json, kept as text, and written back with the run's end ids.

`DecoderConfig.generation_config` holds the file as JSON text, because a config is hashable. So it goes wherever the
config goes: through training, checkpoints and conversions, into every export.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.config.files import read_json
from jaxrlhf.models.config import DecoderConfig

GENERATION_CONFIG = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def with_generation_config(config: DecoderConfig, folder: Path) -> DecoderConfig:
    """The config with the folder's generation config, where it has one that says more than the config does.

    Raises:
        InputError: The file holds no JSON object.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file() and not os.path.lexists(path):
        return config
    values = read_json(path)
    return config if values == _ids_of(config) else config.replace(generation_config=json.dumps(values))


def generation_values(config: DecoderConfig) -> dict[str, Any]:
    """The options of the source's generation config; without one, the ids of the config."""
    return json.loads(config.generation_config) if config.generation_config else _ids_of(config)


def generation_end_ids(config: DecoderConfig) -> int | list[int] | None:
    """`eos_token_id` of the source's generation config; None without one."""
    return json.loads(config.generation_config).get("eos_token_id") if config.generation_config else None


def with_token_ids(config: DecoderConfig, ends: Sequence[int], others: Mapping[str, int | None]) -> DecoderConfig:
    """The config and its generation config with the ids of a run.

    Args:
        config: That of the start model. It keeps its own order of the same end ids.
        ends: The ids that end a response.
        others: `bos_token_id` and `pad_token_id`; None leaves the config's.
    """
    own = {name: i for name, i in others.items() if i is not None}
    values = generation_values(config) | own
    if set(id_tuple(values.get("eos_token_id"))) != set(ends):
        values["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
    changes: dict[str, Any] = dict(own)
    if set(id_tuple(config.eos_token_id)) != set(ends):
        changes["eos_token_id"] = tuple(ends) if len(ends) > 1 else ends[0]
    config = config.replace(**changes)
    return config.replace(generation_config="" if values == _ids_of(config) else json.dumps(values))


def id_tuple(ids: object) -> tuple[Any, ...]:
    """The ids of an option such as `eos_token_id`, which holds none, one or several."""
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (ids,)


def _ids_of(config: DecoderConfig) -> dict[str, int | list[int]]:
    ids = {name: getattr(config, name) for name in IDS}
    return {name: list(i) if isinstance(i, tuple) else i for name, i in ids.items() if i is not None}
