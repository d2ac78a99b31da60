"""Looks up every tensor of the exports of `write_exports.py` in llama.cpp's tables (package `gguf`).

    python tests/compat/name_tensors.py FOLDER

Exits with 1 if llama.cpp knows an architecture, but not the name of one of its tensors.
"""

import json
import re
import struct
import sys
from pathlib import Path

import gguf

ARCHITECTURES = {
    "gpt_neox": "GPTNEOX",
    "mistral": "LLAMA",
    "gemma3_text": "GEMMA3",
    "mixtral": "LLAMA",
    "qwen3_moe": "QWEN3MOE",
}
"""GGUF architectures that are not named as the `model_type`."""


TIED = ("gemma", "gemma2", "cohere2")
"""llama.cpp has no heads of their own for these, and no scalar heads at all."""


def is_known(table: gguf.TensorNameMap, name: str) -> bool:
    """Whether a name is in a table; llama.cpp's converter drops the prefix of BLOOM's base model, and joins experts."""
    names = (name, name.removeprefix("transformer."), re.sub(r"\.experts\.\d+\.", ".experts.", name))
    return any(table.get_name(each, try_suffixes=(".weight", ".bias")) is not None for each in names)


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file, from its header."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return sorted(json.loads(file.read(size)).keys() - {"__metadata__"})


def main(folder: Path) -> int:
    failed = 0
    for path in sorted(folder.glob("*/model.safetensors")):
        config = json.loads((path.parent / "config.json").read_text())
        model_type = config["model_type"]
        architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES.get(model_type, model_type.upper()), None)
        if architecture is None:
            print(f"llama.cpp {path.parent.name:24} {model_type} has no GGUF architecture")
            continue
        names = tensor_names(path)
        layers = max(int(part) for name in names for part in name.split(".") if part.isdigit()) + 1
        table = gguf.get_tensor_name_map(architecture, layers)
        unknown = [name for name in names if not is_known(table, name)]
        foreign = (model_type in TIED and not config["tie_word_embeddings"]) or "ForSequence" in config[
            "architectures"
        ][0]
        failed += bool(unknown) and not foreign
        found = f"{'' if foreign else 'FAILED, '}unknown: {', '.join(unknown)}" if unknown else f"{len(names)} known"
        print(f"llama.cpp {path.parent.name:24} {found}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
