"""GGUF files in: the models that llama.cpp and Ollama run, as Hugging Face options and tensors.

A GGUF file states a model's options under llama.cpp's names, and holds its tensors under llama.cpp's names, quantised
and in part rearranged. `gguf_options` and `gguf_source` give both as a Hugging Face folder would. Each tensor is
dequantised when it is read.
"""

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.errors import InputError
from jaxrlhf.models.hf.gguf_architectures import ARCHITECTURES, Architecture, Options, Restore, shortest
from jaxrlhf.models.hf.tensor_source import TensorSource

_EXPERT = re.compile(r"(?<=\.experts)\.(\d+)\.")


def is_gguf(name_or_path: object) -> bool:
    """True for the name of a GGUF file."""
    return str(name_or_path).endswith(".gguf")


class File:
    """An open GGUF file: its metadata, and its tensors dequantised one at a time.

    Raises:
        InputError: The file is damaged or cut off, or the gguf package is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise InputError(f"{path}: reading GGUF needs the package gguf; pip install 'jaxrlhf[gguf]'") from error
        try:
            reader = GGUFReader(str(path))
        except (ValueError, KeyError, IndexError, OSError, OverflowError, UnicodeDecodeError, MemoryError) as error:
            raise InputError(
                f"{path} is not a readable GGUF file ({error}); it may be cut off, or its quantisation "
                "unknown to the installed gguf package"
            ) from error
        self.path = path
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.names = frozenset(self._tensors)

    def get(self, key: str) -> Any:
        """A metadata value that is not an array; None when it is absent. A float32 becomes the shortest such number."""
        entry = self._fields.get(key)
        if entry is None:
            return None
        value = entry.contents()
        return shortest(np.array([value], np.float32))[0] if isinstance(value, float) else value

    def array(self, key: str) -> list[Any]:
        """The elements of a metadata array; none when it is absent."""
        entry = self._fields.get(key)
        return [] if entry is None else entry.contents()

    def under(self, prefix: str) -> Options:
        """The metadata whose keys begin with `prefix`, by the rest of the key, without arrays."""
        from gguf import GGUFValueType

        keys = [
            key
            for key, entry in self._fields.items()
            if key.startswith(prefix) and entry.types[0] != GGUFValueType.ARRAY
        ]
        return {key.removeprefix(prefix): self.get(key) for key in keys}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, the slowest axis first."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def read(self, name: str, expert: int | None = None) -> np.ndarray:
        """Dequantises a tensor, or one expert's part of it: float32.

        Raises:
            InputError: The quantisation cannot be read.
        """
        from gguf import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data if expert is None else tensor.data[expert], tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise InputError(
                f"{self.path}: tensor {name} has the quantisation {tensor.tensor_type.name}, which the gguf package "
                "cannot dequantise; convert the file to another one, such as Q8_0 or F16"
            ) from error
        shape = self.shape(name)
        return np.asarray(values, np.float32).reshape(shape if expert is None else shape[1:])


@lru_cache(maxsize=2)
def _opened(path: Path, modified: int, size: int) -> File:
    return File(path)


def open_file(path: Path) -> File:
    """Opens a GGUF file, once for as long as it does not change: reading its vocabulary takes seconds.

    Raises:
        InputError: The file is missing, or as `File`.
    """
    if not path.is_file():
        raise InputError(f"model file {path} does not exist")
    stat = path.stat()
    return _opened(path, stat.st_mtime_ns, stat.st_size)


def _architecture(file: File) -> tuple[str, Architecture]:
    name = file.get("general.architecture")
    if name not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: GGUF architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    return name, ARCHITECTURES[name]


def gguf_options(path: Path) -> Options:
    """The options of the Hugging Face config of a GGUF file's model.

    Raises:
        InputError: The architecture is not supported, or the metadata lacks an option.
    """
    file = open_file(path)
    name, architecture = _architecture(file)
    metadata = file.under(f"{name}.")
    options: Options = {"model_type": architecture.model_type}
    options |= {theirs: metadata[key] for key, theirs in architecture.keys.items() if key in metadata}
    kind = metadata.get("rope.scaling.type", "none")
    factor = metadata.get("rope.scaling.factor", 1.0)
    if kind == "linear":
        options["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        options["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": metadata.get("rope.scaling.original_context_length"),
            "attention_factor": metadata.get("rope.scaling.attn_factor"),
        }
    elif kind not in ("none", "longrope"):
        raise InputError(f"{path}: rope.scaling.type {kind!r} is not supported for GGUF files")
    if "token_embd.weight" not in file.names:
        raise InputError(f"{path} has no token_embd.weight: it holds no language model")
    options["vocab_size"] = file.shape("token_embd.weight")[0]
    options["tie_word_embeddings"] = "output.weight" not in file.names
    ids = {key: file.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom", "padding")}
    ends = list(dict.fromkeys(ids[key] for key in ("eos", "eot", "eom") if ids[key] is not None))
    options |= {"bos_token_id": ids["bos"], "pad_token_id": ids["padding"]}
    options["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    architecture.finish(options, metadata, file)
    return {key: value for key, value in options.items() if value is not None or key.endswith("token_id")}


def gguf_source(path: Path, names: Iterable[str]) -> TensorSource:
    """The tensors of a GGUF file under Hugging Face's names.

    Args:
        path: The file.
        names: The names that the family may have; those that the file does not hold are left out. Tensors of the file
            that none of them stands for appear under their own names.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    file = open_file(path)
    name, architecture = _architecture(file)
    options = gguf_options(path)
    layers = max((int(n.split(".")[1]) + 1 for n in file.names if n.startswith("blk.")), default=0)
    kind = next(arch for arch, known in MODEL_ARCH_NAMES.items() if known == name)
    table = get_tensor_name_map(kind, layers)

    def place(theirs: str) -> tuple[str, int | None]:
        """The file's name of a tensor, empty if llama.cpp has none, and the expert whose part of it is meant."""
        short = theirs.removeprefix(architecture.strip)
        own = table.get_name(_EXPERT.sub(".", short), try_suffixes=(".weight", ".bias"))
        number = _EXPERT.search(short)
        return own or "", None if number is None else int(number[1])

    known = {theirs: found for theirs in names if (found := place(theirs))[0] in file.names}
    inert = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    known |= {own: (own, None) for own in file.names - {own for own, _ in known.values()} - inert}

    def restore(theirs: str) -> Restore | None:
        endings = (change for ending, change in architecture.restore.items() if theirs.endswith(ending))
        return next(endings, None)

    def shape(theirs: str) -> tuple[int, ...]:
        name, expert = known[theirs]
        own = file.shape(name)[0 if expert is None else 1 :]
        change = restore(theirs)
        return own if change is None or math.prod(own) == 0 else change(np.empty(own, bool), options).shape

    def read(theirs: str) -> np.ndarray:
        change, values = restore(theirs), file.read(*known[theirs])
        return values if change is None else np.ascontiguousarray(change(values, options))

    return TensorSource(str(path), {theirs: shape(theirs) for theirs in known}, read)
