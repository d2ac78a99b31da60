"""Qwen2 (biases on query, key and value), Qwen3 (normed queries and keys), Qwen3-MoE (experts): Llama with windows."""

import math
from dataclasses import replace

from jaxrlhf.models.config import DENSE_STACK, SPARSE_STACK, DecoderConfig
from jaxrlhf.models.families.layer_types import (
    FULL,
    one_window_from_hf,
    one_window_to_hf,
    windows_from_hf,
    windows_to_hf,
)
from jaxrlhf.models.families.llama import LLAMA_TENSORS, QK_NORMS, kv_heads, llama_like_from_hf, llama_like_to_hf
from jaxrlhf.models.hf.mapping import Family, FusedExperts, HFConfig, Tensor, linear


def _windows_from_hf(hf: HFConfig) -> tuple[int, ...] | None:
    hf.refuse_unless("use_mrope", False)
    window = hf.size_or_none("sliding_window", 4096) if hf.take("use_sliding_window", False) else None
    first = hf.take("max_window_layers", 28)
    hf.take("sliding_window")
    needs = "it needs use_sliding_window=True and a sliding_window"
    return windows_from_hf(hf, window, lambda i: window is not None and i >= first, needs)


def _windows_to_hf(c: DecoderConfig) -> dict[str, object]:
    if c.windows is None:  # `sliding_window` and `max_window_layers` then have no effect
        return {"layer_types": [FULL] * c.num_layers, "use_sliding_window": False}
    first = next(i for i, window in enumerate(c.windows) if window)
    return windows_to_hf(c) | {"use_sliding_window": True, "max_window_layers": first}


def qwen2_from_hf(hf: HFConfig) -> DecoderConfig:
    return llama_like_from_hf(
        hf,
        family="qwen2",
        bos=None,
        eos=None,
        num_kv_heads=kv_heads(hf, absent=32),
        max_positions=hf.size("max_position_embeddings", 32768),
        qkv_bias=True,
        windows=_windows_from_hf(hf),
    )


def qwen3_from_hf(hf: HFConfig) -> DecoderConfig:
    bias = hf.take("attention_bias", False)
    return llama_like_from_hf(
        hf,
        family="qwen3",
        bos=None,
        eos=None,
        num_kv_heads=kv_heads(hf, absent=32),
        head_dim=hf.size("head_dim", 128),
        max_positions=hf.size("max_position_embeddings", 32768),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=_windows_from_hf(hf),
    )


def _dense_layers_from_hf(hf: HFConfig) -> tuple[int, ...]:
    """The layers without experts: those that are named, and all but every `decoder_sparse_step`-th."""
    layers, step = hf.size("num_hidden_layers"), hf.size("decoder_sparse_step", 1)
    named = hf.take("mlp_only_layers", [])
    if not all(type(i) is int and 0 <= i < layers for i in named):
        raise hf.refuse("mlp_only_layers", named, f"it must be a list of layers from 0 to {layers - 1}")
    only = set(named)
    dense = tuple(i for i in range(layers) if i in only or (i + 1) % step)
    if len(dense) == layers:
        name, value = ("mlp_only_layers", named) if step == 1 else ("decoder_sparse_step", step)
        raise hf.refuse(name, value, "no layer has experts; such a model is of the type qwen3")
    return dense


def _dense_layers_to_hf(c: DecoderConfig) -> dict[str, object]:
    """The options in the form that names the fewest layers."""
    step = math.gcd(*(i + 1 for i in c.stack(SPARSE_STACK)))
    return {"decoder_sparse_step": step, "mlp_only_layers": [i for i in c.dense_layers if (i + 1) % step == 0]}


def qwen3_moe_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.take("output_router_logits")  # training always has the load-balancing loss, by its coefficient
    bias = hf.take("attention_bias", False)
    hf.take("sliding_window")
    first, slides = hf.take("max_window_layers"), hf.take("use_sliding_window", False)
    if first and slides:  # the first versions of transformers left these layers whole, later ones ignore the option
        raise hf.refuse("max_window_layers", first, "with use_sliding_window all layers slide")
    return llama_like_from_hf(
        hf,
        family="qwen3_moe",
        bos=None,
        eos=None,
        num_kv_heads=kv_heads(hf, absent=4),
        max_positions=hf.size("max_position_embeddings", 32768),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=one_window_from_hf(hf, 4096) if slides else None,
        num_experts=hf.size("num_experts", 128),
        dense_layers=_dense_layers_from_hf(hf),
        experts_per_token=hf.size("num_experts_per_tok", 8),
        expert_intermediate_size=hf.size("moe_intermediate_size", 768),
        normalize_experts=hf.take("norm_topk_prob", False),
        router_aux_loss_coef=hf.take("router_aux_loss_coef", 0.001),
    )


def qwen3_moe_to_hf(c: DecoderConfig) -> dict[str, object]:
    return llama_like_to_hf(c) | {
        "attention_bias": c.qkv_bias,
        "use_sliding_window": c.windows is not None,
        **(one_window_to_hf(c) if c.windows else {}),
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "moe_intermediate_size": c.expert_size,
        "norm_topk_prob": c.normalize_experts,
        "router_aux_loss_coef": c.router_aux_loss_coef,
        **_dense_layers_to_hf(c),
    }


QWEN2 = Family(
    name="qwen2",
    classes="Qwen2",
    lm_class="Qwen2ForCausalLM",
    prefix="model",
    config_from_hf=qwen2_from_hf,
    config_to_hf=lambda c: llama_like_to_hf(c) | _windows_to_hf(c),
    tensors=LLAMA_TENSORS,
)

QWEN3 = Family(
    name="qwen3",
    classes="Qwen3",
    lm_class="Qwen3ForCausalLM",
    prefix="model",
    config_from_hf=qwen3_from_hf,
    config_to_hf=lambda c: llama_like_to_hf(c) | _windows_to_hf(c) | {"attention_bias": c.qkv_bias},
    tensors=(*LLAMA_TENSORS, *QK_NORMS),
)

_MLP = "model.layers.{i}.mlp."

QWEN3_MOE = Family(
    name="qwen3_moe",
    classes="Qwen3Moe",
    lm_class="Qwen3MoeForCausalLM",
    prefix="model",
    aliases={"num_local_experts": "num_experts"},
    config_from_hf=qwen3_moe_from_hf,
    config_to_hf=qwen3_moe_to_hf,
    tensors=(
        *(tensor for tensor in LLAMA_TENSORS if "/mlp/" not in tensor.ours),
        *QK_NORMS,
        *(  # of layers without experts
            replace(tensor, ours=str(tensor.ours).replace(f"/{SPARSE_STACK}/", f"/{DENSE_STACK}/"))
            for tensor in LLAMA_TENSORS
            if f"/{SPARSE_STACK}/" in tensor.ours
        ),
        Tensor(_MLP + "gate.weight", "layers/mlp/router/kernel", linear()),
        *(
            Tensor(f"{_MLP}experts.{{e}}.{name}_proj.weight", f"layers/mlp/{name}/kernel", linear())
            for name in ("up", "gate", "down")
        ),
    ),
    fused_experts=(
        FusedExperts(
            _MLP + "experts.gate_up_proj",
            (_MLP + "experts.{e}.gate_proj.weight", _MLP + "experts.{e}.up_proj.weight"),
        ),
        FusedExperts(_MLP + "experts.down_proj", (_MLP + "experts.{e}.down_proj.weight",)),
    ),
)
