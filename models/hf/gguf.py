"""GGUF files in: the models that llama.cpp and Ollama run, as Hugging Face options and tensors.

A GGUF file states a model's options under llama.cpp's names, and holds its tensors under llama.cpp's names, quantised
and in part rearranged. `gguf_options` and `gguf_source` give both as a Hugging Face folder would. Each tensor is
dequantised when it is read.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.errors import InputError
from jaxrlhf.models.hf.mapping import HFConfig
from jaxrlhf.models.hf.tensor_source import TensorSource
from jaxrlhf.models.rotary import inverse_frequencies, ropes

_EXPERT = re.compile(r"(?<=\.experts)\.(\d+)\.")

Options = dict[str, Any]
Metadata = Mapping[str, Any]
"""The metadata of a file by key, without the prefix of the architecture."""
Restore = Callable[[np.ndarray, Options], np.ndarray]
"""(tensor as llama.cpp lays it out, Hugging Face options) → the tensor as Hugging Face lays it out."""

_LLAMA_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "expert_used_count": "num_experts_per_tok",
}
_GPT2_KEYS = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_BLOOM_KEYS = {
    "context_length": "seq_length",
    "block_count": "n_layer",
    "embedding_length": "hidden_size",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_NEOX_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "use_parallel_residual": "use_parallel_residual",
}


def _pairs_to_halves(heads: str) -> Restore:
    """Undoes llama.cpp's order of query and key rows, in which the two features that rotate together are neighbours.

    `heads` names the option with the number of heads.
    """

    def restore(x: np.ndarray, options: Options) -> np.ndarray:
        return x.reshape(options[heads], -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return restore


def _heads_interleaved(heads: str) -> Restore:
    """Puts query, key and value, which llama.cpp stores one after the other, back head by head."""

    def restore(x: np.ndarray, options: Options) -> np.ndarray:
        return x.reshape(3, options[heads], -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    return restore


def _transposed(x: np.ndarray, options: Options) -> np.ndarray:
    return x.T


def _minus_one(x: np.ndarray, options: Options) -> np.ndarray:
    """Norms multiply by 1 + weight, which llama.cpp stores as the sum."""
    return x - 1


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture` of GGUF.

    Attributes:
        model_type: The Hugging Face family.
        keys: Hugging Face options by llama.cpp's names, which the file puts after the architecture's name.
        restore: Undoes llama.cpp's layout, by the ending of a tensor's Hugging Face name.
        strip: Beginning of Hugging Face tensor names that the gguf package's table of names does not have.
        finish: Changes the options by what the metadata (by name) and the names of the tensors say.
    """

    model_type: str
    keys: Mapping[str, str]
    restore: Mapping[str, Restore] = field(default_factory=dict)
    strip: str = ""
    finish: Callable[[Options, Metadata, "File"], None] = lambda options, metadata, file: None


def _finish_llama(options: Options, metadata: Metadata, file: "File") -> None:
    options.setdefault("head_dim", metadata.get("rope.dimension_count"))
    biases = {name for name in file.names if name.endswith(".bias")}
    options["attention_bias"] = "blk.0.attn_q.bias" in biases
    options["mlp_bias"] = "blk.0.ffn_up.bias" in biases
    if "rope_freqs.weight" in file.names:
        options["rope_scaling"] = _llama3_scaling(file, options)
    if metadata.get("expert_count"):
        options |= {"model_type": "mixtral", "num_local_experts": metadata["expert_count"]}


def _llama3_scaling(file: "File", options: Options) -> Options:
    """The Llama 3 rule that gives the frequency factors in the file, which holds no more of the rule than these."""
    from jaxrlhf.models.families import get_family

    def frequencies(rule: Options | None) -> np.ndarray:
        values = options | {"vocab_size": 1, "rope_scaling": rule}
        config = get_family("llama", str(file.path)).config_from_hf(HFConfig(values, str(file.path)))
        (rope,) = ropes(config)[0]
        assert rope is not None
        return inverse_frequencies(rope)

    factors = file.read("rope_freqs.weight").reshape(-1)
    plain = frequencies(None)
    for original in (8192, 4096):
        rule = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0}
        rule |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
        if factors.shape == plain.shape and np.allclose(frequencies(rule), plain / factors, rtol=1e-4, atol=0):
            return rule
    raise InputError(f"{file.path}: rope_freqs.weight holds factors that Llama 3's rule does not give")


def _finish_gemma(options: Options, metadata: Metadata, file: "File") -> None:
    width = options["hidden_size"] // options["num_attention_heads"]
    # The 27B models scale by the width; a file tells them by their number of layers only.
    layers_of_27b = {"gemma2": 46, "gemma3_text": 62}[options["model_type"]]
    is_27b = options["num_hidden_layers"] == layers_of_27b
    options["query_pre_attn_scalar"] = width if is_27b else options["head_dim"]


def _finish_phi3(options: Options, metadata: Metadata, file: "File") -> None:
    width = options["hidden_size"] // options["num_attention_heads"]
    options["partial_rotary_factor"] = metadata.get("rope.dimension_count", width) / width
    kinds = {kind: f"rope_factors_{kind}.weight" for kind in ("long", "short")}
    if all(name in file.names for name in kinds.values()):
        factors = {f"{kind}_factor": _shortest(file.read(name)) for kind, name in kinds.items()}
        options["rope_scaling"] = {"rope_type": "longrope", **factors}
        options["original_max_position_embeddings"] = metadata.get("rope.scaling.original_context_length")


def _finish_olmo(options: Options, metadata: Metadata, file: "File") -> None:
    windows = file.array("olmo2.attention.sliding_window_pattern")
    if windows:
        options["model_type"] = "olmo3"
        options["layer_types"] = ["sliding_attention" if sliding else "full_attention" for sliding in windows]
        plain = {"rope_theta": options.pop("rope_theta")}
        scaled = options.pop("rope_scaling", None) or {"rope_type": "default"}
        options["rope_parameters"] = {
            "full_attention": scaled | plain,
            "sliding_attention": {"rope_type": "default", **plain},
        }


def _finish_qwen3_moe(options: Options, metadata: Metadata, file: "File") -> None:
    options["norm_topk_prob"] = True  # llama.cpp computes no other


def _finish_neox(options: Options, metadata: Metadata, file: "File") -> None:
    rotated = metadata.get("rope.dimension_count")
    if rotated is not None:
        options["rotary_pct"] = rotated / (options["hidden_size"] // options["num_attention_heads"])


_LLAMA_ORDER = {
    f"{name}_proj.{kind}": _pairs_to_halves(heads)
    for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
    for kind in ("weight", "bias")
}
_MINUS_ONE = {"norm.weight": _minus_one}
_GRANITE_KEYS = _LLAMA_KEYS | {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_COHERE_KEYS = {key: name for key, name in _LLAMA_KEYS.items() if "norm" not in key and "key_length" not in key}
_COHERE_KEYS |= {"attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_EXPERTS = {"expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_FUSED = ("query_key_value.weight", "query_key_value.bias")

ARCHITECTURES = {
    "llama": Architecture("llama", _LLAMA_KEYS, _LLAMA_ORDER, finish=_finish_llama),
    "qwen2": Architecture("qwen2", _LLAMA_KEYS),
    "qwen3": Architecture("qwen3", _LLAMA_KEYS),
    "qwen3moe": Architecture("qwen3_moe", _LLAMA_KEYS | _EXPERTS, finish=_finish_qwen3_moe),
    "gemma": Architecture("gemma", _LLAMA_KEYS, _MINUS_ONE),
    "gemma2": Architecture("gemma2", _LLAMA_KEYS | _WINDOW | _CAPS, _MINUS_ONE, finish=_finish_gemma),
    "gemma3": Architecture(
        "gemma3_text",
        _LLAMA_KEYS | _WINDOW | {"rope.freq_base_swa": "rope_local_base_freq"},
        _MINUS_ONE,
        finish=_finish_gemma,
    ),
    "smollm3": Architecture("smollm3", _LLAMA_KEYS, _LLAMA_ORDER, finish=_finish_llama),
    "olmo2": Architecture("olmo2", _LLAMA_KEYS | _WINDOW, finish=_finish_olmo),
    "phi3": Architecture("phi3", _LLAMA_KEYS | _WINDOW, finish=_finish_phi3),
    "granite": Architecture("granite", _GRANITE_KEYS, _LLAMA_ORDER, finish=_finish_llama),
    "cohere2": Architecture("cohere2", _COHERE_KEYS | _WINDOW),
    "gpt2": Architecture(
        "gpt2",
        _GPT2_KEYS,
        dict.fromkeys(("c_attn.weight", "c_proj.weight", "c_fc.weight"), _transposed),
    ),
    "bloom": Architecture(
        "bloom", _BLOOM_KEYS, dict.fromkeys(_FUSED, _heads_interleaved("n_head")), strip="transformer."
    ),
    "gptneox": Architecture(
        "gpt_neox",
        _NEOX_KEYS,
        dict.fromkeys(_FUSED, _heads_interleaved("num_attention_heads")),
        finish=_finish_neox,
    ),
}
"""The supported architectures, by the file's `general.architecture`."""


def _shortest(values: np.ndarray) -> list[float]:
    """The shortest decimal numbers that are these float32 values."""
    return [float(str(value)) for value in values.reshape(-1)]


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
        return _shortest(np.array([value], np.float32))[0] if isinstance(value, float) else value

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
