"""Folders of adapters, which stand for a base model and the adapter together."""

from pathlib import Path

from jaxrlhf.config.files import read_json
from jaxrlhf.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")

SMALL_FILES = r"[^/]+\.(json|model|txt|jinja)|additional_chat_templates/[^/]+\.jinja"
"""Pattern of the files of a model folder that hold no weights: configs, tokenizer, chat templates."""


def is_adapter(folder: Path) -> bool:
    """True for a folder of an adapter (PEFT), without weights of a model of its own."""
    return (folder / ADAPTER_CONFIG).is_file() and not any(
        path for pattern in _WEIGHTS for path in folder.glob(pattern)
    )


def adapter_base(folder: Path) -> str:
    """The base model of an adapter folder: a path, also one relative to the adapter folder, or a hub name.

    Raises:
        InputError: The adapter names no base.
    """
    path = folder / ADAPTER_CONFIG
    name = read_json(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise InputError(
            f"{path} names no base model (base_model_name_or_path={name!r}); set it to the folder or hub name of the "
            "model that the adapter was trained on"
        )
    beside = folder / name
    return str(beside) if not Path(name).is_dir() and beside.is_dir() else name
