"""Mixtral: Mistral with experts in place of the MLP of every layer."""

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families.layer_types import one_window_from_hf, one_window_to_hf
from jaxrlhf.models.families.llama import LLAMA_TENSORS, kv_heads, llama_like_from_hf, llama_like_to_hf
from jaxrlhf.models.families.rope import rope_from_hf
from jaxrlhf.models.hf.mapping import Family, FusedExperts, HFConfig, Tensor, linear

_MOE = "model.layers.{i}.block_sparse_moe."
_MLP = "model.layers.{i}.mlp."  # transformers 5 in memory


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.take("output_router_logits")  # training always has the load-balancing loss, by its coefficient
    hf.refuse_unless("router_jitter_noise", 0.0)
    return llama_like_from_hf(
        hf,
        family="mixtral",
        rope=rope_from_hf(hf, default_base=1e6),
        num_kv_heads=kv_heads(hf, absent=8),
        max_positions=hf.size("max_position_embeddings", 4096 * 32),
        norm_eps=hf.positive("rms_norm_eps", 1e-5),
        windows=one_window_from_hf(hf, None),
        num_experts=hf.size("num_local_experts", 8),
        experts_per_token=hf.size("num_experts_per_tok", 2),
        router_aux_loss_coef=hf.take("router_aux_loss_coef", 0.001),
    )


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    return llama_like_to_hf(c) | {
        **one_window_to_hf(c),
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "router_aux_loss_coef": c.router_aux_loss_coef,
    }


MIXTRAL = Family(
    name="mixtral",
    classes="Mixtral",
    lm_class="MixtralForCausalLM",
    prefix="model",
    aliases={"num_experts": "num_local_experts"},
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensors=(
        *(tensor for tensor in LLAMA_TENSORS if "/mlp/" not in tensor.ours),
        Tensor(_MOE + "gate.weight", "layers/mlp/router/kernel", linear(), aliases=(_MLP + "gate.weight",)),
        *(
            Tensor(f"{_MOE}experts.{{e}}.{theirs}.weight", f"layers/mlp/{ours}/kernel", linear())
            for theirs, ours in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
        ),
    ),
    fused_experts=(
        FusedExperts(_MLP + "experts.gate_up_proj", (_MOE + "experts.{e}.w1.weight", _MOE + "experts.{e}.w3.weight")),
        FusedExperts(_MLP + "experts.down_proj", (_MOE + "experts.{e}.w2.weight",)),
    ),
)
