"""Phi-3 and Phi-4 (mini): Llama with fused projections, partial rotary positions and `longrope`."""

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families.layer_types import one_window_from_hf, one_window_to_hf
from jaxrlhf.models.families.llama import LLAMA_TENSORS, llama_like_from_hf, llama_like_to_hf
from jaxrlhf.models.families.rope import rope_parameters, rope_to_hf, rotated_share, scaling_of, scaling_to_hf
from jaxrlhf.models.hf.mapping import Family, HFConfig, Tensor, linear_fused

_ORIGINAL = "original_max_position_embeddings"


def _rope(hf: HFConfig, head_dim: int) -> dict[str, object]:
    base, kind, parameters = rope_parameters(hf)
    older = hf.take("partial_rotary_factor", 1.0)
    share = parameters.pop("partial_rotary_factor", older)
    rotated = int(head_dim * share)
    if rotated < 2 or rotated % 2 or rotated > head_dim:
        raise hf.refuse("partial_rotary_factor", share, f"it rotates {rotated} of {head_dim} features")
    original = hf.size(_ORIGINAL, 4096)
    kind = "longrope" if kind in ("su", "yarn") else kind  # its older names here
    if kind not in ("default", "longrope"):
        raise hf.refuse("rope_scaling", kind, "phi3 has rope_type 'longrope' or none")
    parameters.pop(_ORIGINAL, None)  # the option beside the rope parameters goes before the one among them
    if kind == "longrope":
        parameters[_ORIGINAL] = original
        for name in ("short_factor", "long_factor"):
            factors = parameters.get(name)
            if not isinstance(factors, list) or len(factors) != rotated // 2:
                raise hf.refuse(name, factors, f"it must have {rotated // 2} numbers")
    return {
        "position": "rotary",
        "rotary_base": base,
        "rotary_dim": 0 if rotated == head_dim else rotated,
        "rope_scaling": scaling_of(hf, kind, parameters),
    }


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hidden, heads = hf.size("hidden_size"), hf.size("num_attention_heads")
    hf.take("embd_pdrop")  # transformers' Phi-3 never applies it
    return llama_like_from_hf(
        hf,
        bos=1,
        eos=32000,
        pad=32000,
        rope=_rope(hf, hf.size("head_dim", hidden // heads)),
        family="phi3",
        max_positions=hf.size("max_position_embeddings", 4096),
        norm_eps=hf.positive("rms_norm_eps", 1e-5),
        windows=one_window_from_hf(hf, None),
        residual_dropout=hf.rate("resid_pdrop", 0.0),
    )


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    share = rotated_share(c)
    values = llama_like_to_hf(c) | rope_to_hf(c, partial_rotary_factor=share)
    values |= one_window_to_hf(c) | {"resid_pdrop": c.residual_dropout}
    values |= {name: value for name, value in c.rope_scaling or () if name == _ORIGINAL}
    if c.rope_scaling and {name for name, _ in c.rope_scaling} == {
        "rope_type",
        "short_factor",
        "long_factor",
        _ORIGINAL,
    }:
        table = scaling_to_hf(c.rope_scaling)  # transformers 4 wants these three entries and no more
        values["rope_scaling"] = {"type": "longrope"} | {name: table[name] for name in ("short_factor", "long_factor")}
    return values | ({"partial_rotary_factor": share} if share != 1 else {})


_L = "model.layers.{i}."
_FUSED = ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj")

PHI3 = Family(
    name="phi3",
    classes="Phi3",
    lm_class="Phi3ForCausalLM",
    prefix="model",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensors=(
        *(tensor for tensor in LLAMA_TENSORS if not any(name in tensor.hf for name in _FUSED)),
        Tensor(
            _L + "self_attn.qkv_proj.weight",
            tuple(f"layers/attn/{name}/kernel" for name in ("query", "key", "value")),
            linear_fused(),
        ),
        Tensor(_L + "mlp.gate_up_proj.weight", ("layers/mlp/gate/kernel", "layers/mlp/up/kernel"), linear_fused()),
    ),
)
