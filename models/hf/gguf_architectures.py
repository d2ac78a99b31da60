"""The architectures of GGUF files: llama.cpp's names of options, and its layouts of tensors.

An architecture is one declaration. What the file says in other words than Hugging Face's config goes through `finish`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxrlhf.errors import InputError
from jaxrlhf.models.hf.mapping import HFConfig
from jaxrlhf.models.rotary import inverse_frequencies, ropes

Options = dict[str, Any]
Metadata = Mapping[str, Any]
"""The metadata of a file by key, without the prefix of the architecture."""
Restore = Callable[[np.ndarray, Options], np.ndarray]
"""(tensor as llama.cpp lays it out, Hugging Face options) → the tensor as Hugging Face lays it out."""


class Contents(Protocol):
    """The parts of an open file that architectures read: its place, tensor names, metadata arrays and tensors."""

    path: Path
    names: frozenset[str]

    def array(self, key: str) -> list[Any]: ...
    def read(self, name: str, expert: int | None = None) -> np.ndarray: ...


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
    finish: Callable[[Options, Metadata, Contents], None] = lambda options, metadata, file: None


def _finish_llama(options: Options, metadata: Metadata, file: Contents) -> None:
    options.setdefault("head_dim", metadata.get("rope.dimension_count"))
    biases = {name for name in file.names if name.endswith(".bias")}
    options["attention_bias"] = "blk.0.attn_q.bias" in biases
    options["mlp_bias"] = "blk.0.ffn_up.bias" in biases
    if "rope_freqs.weight" in file.names:
        options["rope_scaling"] = _llama3_scaling(file, options)
    if metadata.get("expert_count"):
        options |= {"model_type": "mixtral", "num_local_experts": metadata["expert_count"]}


def _llama3_scaling(file: Contents, options: Options) -> Options:
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


def _finish_gemma(options: Options, metadata: Metadata, file: Contents) -> None:
    width = options["hidden_size"] // options["num_attention_heads"]
    # The 27B models scale by the width; a file tells them by their number of layers only.
    layers_of_27b = {"gemma2": 46, "gemma3_text": 62}[options["model_type"]]
    is_27b = options["num_hidden_layers"] == layers_of_27b
    options["query_pre_attn_scalar"] = width if is_27b else options["head_dim"]


def _finish_phi3(options: Options, metadata: Metadata, file: Contents) -> None:
    width = options["hidden_size"] // options["num_attention_heads"]
    options["partial_rotary_factor"] = metadata.get("rope.dimension_count", width) / width
    kinds = {kind: f"rope_factors_{kind}.weight" for kind in ("long", "short")}
    if all(name in file.names for name in kinds.values()):
        factors = {f"{kind}_factor": shortest(file.read(name)) for kind, name in kinds.items()}
        options["rope_scaling"] = {"rope_type": "longrope", **factors}
        options["original_max_position_embeddings"] = metadata.get("rope.scaling.original_context_length")


def _finish_olmo(options: Options, metadata: Metadata, file: Contents) -> None:
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


def _finish_qwen3_moe(options: Options, metadata: Metadata, file: Contents) -> None:
    options["norm_topk_prob"] = True  # llama.cpp computes no other


def _finish_neox(options: Options, metadata: Metadata, file: Contents) -> None:
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


def shortest(values: np.ndarray) -> list[float]:
    """The shortest decimal numbers that are these float32 values."""
    return [float(str(value)) for value in values.reshape(-1)]
