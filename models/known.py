"""Shapes of published models by name, so that planning and benchmarks need no download.

Each entry gives the family, its options by their Hugging Face names (others have the family's default) and the
published number of parameters. Sources: the `config.json` files of the models' hub pages, and the papers they cite.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.hf.config_json import config_from_dict


@dataclass(frozen=True)
class KnownModel:
    """A published configuration."""

    model_type: str
    options: Mapping[str, object]
    parameters: int
    """Number of parameters as published, tied weights counted once. Where only a rounded number was published (OPT-66B
    and 175B, CodeGen, Command R7B), the number in the transformers module of these options."""


def _gpt2(hidden: int, layers: int, heads: int, parameters: int) -> KnownModel:
    options = {"vocab_size": 50257, "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": 1024}
    return KnownModel("gpt2", options, parameters)


def _opt(hidden: int, layers: int, heads: int, parameters: int, **own: object) -> KnownModel:
    options = {"vocab_size": 50272, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    options |= {"ffn_dim": 4 * hidden, "max_position_embeddings": 2048}
    return KnownModel("opt", options | own, parameters)


def _bloom(hidden: int, layers: int, heads: int, parameters: int) -> KnownModel:
    options = {"vocab_size": 250880, "hidden_size": hidden, "n_layer": layers, "n_head": heads, "pad_token_id": 3}
    return KnownModel("bloom", options, parameters)


def _neox(hidden: int, layers: int, heads: int, vocab: int, parameters: int, **own: object) -> KnownModel:
    options = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    options |= {"intermediate_size": 4 * hidden, "bos_token_id": 0, "eos_token_id": 0}
    return KnownModel("gpt_neox", options | own, parameters)


def _gpt_neo(hidden: int, layers: int, heads: int, parameters: int) -> KnownModel:
    options = {"vocab_size": 50257, "hidden_size": hidden, "num_layers": layers, "num_heads": heads}
    options |= {"attention_types": [[["global", "local"], layers // 2]], "window_size": 256}
    return KnownModel("gpt_neo", options, parameters)


def _codegen(hidden: int, layers: int, heads: int, rotary: int, parameters: int) -> KnownModel:
    options = {"vocab_size": 51200, "n_embd": hidden, "n_layer": layers, "n_head": heads, "rotary_dim": rotary}
    return KnownModel("codegen", options | {"bos_token_id": 1}, parameters)


def _llama_like(
    model_type: str,
    vocab: int,
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    mlp: int,
    parameters: int,
    **own: object,
) -> KnownModel:
    options = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp}
    options |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    return KnownModel(model_type, options | own, parameters)


def _llama2(hidden: int, layers: int, heads: tuple[int, int], mlp: int, parameters: int) -> KnownModel:
    own = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    return _llama_like("llama", 32000, hidden, layers, heads, mlp, parameters, **own)


def _llama3(hidden: int, layers: int, heads: tuple[int, int], mlp: int, parameters: int) -> KnownModel:
    own = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    own |= {"bos_token_id": 128000, "eos_token_id": 128001}
    return _llama_like("llama", 128256, hidden, layers, heads, mlp, parameters, **own)


def _llama32(hidden: int, layers: int, heads: tuple[int, int], mlp: int, parameters: int) -> KnownModel:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    known = _llama3(hidden, layers, heads, mlp, parameters)
    own = {"max_position_embeddings": 131072, "rope_scaling": scaling, **_TIED}
    return KnownModel(known.model_type, {**known.options, **own}, parameters)


def _qwen2(
    vocab: int, hidden: int, layers: int, heads: tuple[int, int], mlp: int, parameters: int, **own: object
) -> KnownModel:
    own = {"rope_theta": 1000000.0, "bos_token_id": 151643, "eos_token_id": 151643} | own
    return _llama_like("qwen2", vocab, hidden, layers, heads, mlp, parameters, **own)


def _qwen3(hidden: int, layers: int, heads: tuple[int, int], mlp: int, parameters: int, **own: object) -> KnownModel:
    own = {"rope_theta": 1000000.0, "max_position_embeddings": 40960, "head_dim": 128} | own
    own |= {"bos_token_id": 151643, "eos_token_id": 151645}
    return _llama_like("qwen3", 151936, hidden, layers, heads, mlp, parameters, **own)


def _qwen3_moe(hidden: int, layers: int, heads: tuple[int, int], mlp: int, expert: int, parameters: int) -> KnownModel:
    own = {"rope_theta": 1000000.0, "max_position_embeddings": 40960, "head_dim": 128, "num_experts": 128}
    own |= {"num_experts_per_tok": 8, "moe_intermediate_size": expert, "norm_topk_prob": True}
    own |= {"bos_token_id": 151643, "eos_token_id": 151645}
    return _llama_like("qwen3_moe", 151936, hidden, layers, heads, mlp, parameters, **own)


def _mixtral(vocab: int, hidden: int, layers: int, heads: tuple[int, int], mlp: int, parameters: int) -> KnownModel:
    own = {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02, "rope_theta": 1000000.0}
    return _llama_like("mixtral", vocab, hidden, layers, heads, mlp, parameters, **own)


def _gemma2(hidden: int, layers: int, heads: tuple[int, int], mlp: int, parameters: int, **own: object) -> KnownModel:
    return _llama_like("gemma2", 256000, hidden, layers, heads, mlp, parameters, **own)


def _gemma3(hidden: int, layers: int, mlp: int, parameters: int) -> KnownModel:
    own = {"max_position_embeddings": 32768, "sliding_window": 512}
    return _llama_like("gemma3_text", 262144, hidden, layers, (4, 1), mlp, parameters, **own)


def _olmo2(hidden: int, layers: int, heads: int, mlp: int, parameters: int) -> KnownModel:
    own = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 500000.0}
    own |= {"pad_token_id": 100277, "eos_token_id": 100257}
    return _llama_like("olmo2", 100352, hidden, layers, (heads, heads), mlp, parameters, **own)


def _granite3(hidden: int, mlp: int, divisor: float, parameters: int) -> KnownModel:
    own = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "embedding_multiplier": 12.0}
    own |= {"attention_multiplier": 32 / hidden, "residual_multiplier": 0.22, "logits_scaling": divisor}
    own |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "rope_theta": 10000.0}
    return _llama_like("granite", 49155, hidden, 40, (32, 8), mlp, parameters, **own, **_TIED)


_TIED = {"tie_word_embeddings": True}
_PYTHIA = 50304

KNOWN: dict[str, KnownModel] = {
    "gpt2": _gpt2(768, 12, 12, 124_439_808),
    "gpt2-medium": _gpt2(1024, 24, 16, 354_823_168),
    "gpt2-large": _gpt2(1280, 36, 20, 774_030_080),
    "gpt2-xl": _gpt2(1600, 48, 25, 1_557_611_200),
    "opt-125m": _opt(768, 12, 12, 125_239_296),
    "opt-350m": _opt(1024, 24, 16, 331_196_416, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32, 1_315_758_080),
    "opt-2.7b": _opt(2560, 32, 32, 2_651_596_800),
    "opt-6.7b": _opt(4096, 32, 32, 6_658_473_984),
    "opt-13b": _opt(5120, 40, 40, 12_853_473_280),
    "opt-30b": _opt(7168, 48, 56, 29_974_540_288),
    "opt-66b": _opt(9216, 64, 72, 65_719_701_504),
    "opt-175b": _opt(12288, 96, 96, 174_604_468_224),
    "bloom-560m": _bloom(1024, 24, 16, 559_214_592),
    "bloom-1b1": _bloom(1536, 24, 16, 1_065_314_304),
    "bloom-1b7": _bloom(2048, 24, 16, 1_722_408_960),
    "bloom-3b": _bloom(2560, 30, 32, 3_002_557_440),
    "bloom-7b1": _bloom(4096, 30, 32, 7_069_016_064),
    "bloom-176b": _bloom(14336, 70, 112, 176_247_271_424),
    "gpt-neox-20b": _neox(6144, 44, 64, 50432, 20_554_567_680, hidden_act="gelu_fast"),
    "pythia-70m": _neox(512, 6, 8, _PYTHIA, 70_426_624),
    "pythia-160m": _neox(768, 12, 12, _PYTHIA, 162_322_944),
    "pythia-410m": _neox(1024, 24, 16, _PYTHIA, 405_334_016),
    "pythia-1b": _neox(2048, 16, 8, _PYTHIA, 1_011_781_632),
    "pythia-1.4b": _neox(2048, 24, 16, _PYTHIA, 1_414_647_808),
    "pythia-2.8b": _neox(2560, 32, 32, _PYTHIA, 2_775_208_960),
    "pythia-6.9b": _neox(4096, 32, 32, 50432, 6_857_302_016),
    "pythia-12b": _neox(5120, 36, 40, 50688, 11_846_072_320),
    "gpt-j-6b": KnownModel(
        "gptj",
        {"vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64},
        6_050_882_784,  # of the Hugging Face model; the card's 6,053,381,344 is of the JAX original
    ),
    "gpt-neo-125m": _gpt_neo(768, 12, 12, 125_198_592),
    "gpt-neo-1.3b": _gpt_neo(2048, 24, 16, 1_315_575_808),
    "gpt-neo-2.7b": _gpt_neo(2560, 32, 20, 2_651_307_520),
    "codegen-350m": _codegen(1024, 20, 16, 32, 356_712_448),
    "codegen-2b": _codegen(2560, 32, 32, 64, 2_779_356_160),
    "codegen-6b": _codegen(4096, 33, 16, 64, 7_064_213_504),
    "codegen-16b": _codegen(6144, 34, 24, 64, 16_032_155_648),
    "llama-2-7b": _llama2(4096, 32, (32, 32), 11008, 6_738_415_616),
    "llama-2-13b": _llama2(5120, 40, (40, 40), 13824, 13_015_864_320),
    "llama-2-70b": _llama2(8192, 80, (64, 8), 28672, 68_976_648_192),
    "llama-3-8b": _llama3(4096, 32, (32, 8), 14336, 8_030_261_248),
    "llama-3-70b": _llama3(8192, 80, (64, 8), 28672, 70_553_706_496),
    "llama-3.2-1b": _llama32(2048, 16, (32, 8), 8192, 1_235_814_400),
    "llama-3.2-3b": _llama32(3072, 28, (24, 8), 8192, 3_212_749_824),
    "mistral-7b": _llama_like(
        "mistral", 32000, 4096, 32, (32, 8), 14336, 7_241_732_096, max_position_embeddings=32768, rms_norm_eps=1e-5
    ),
    "mixtral-8x7b": _mixtral(32000, 4096, 32, (32, 8), 14336, 46_702_792_704),
    "mixtral-8x22b": _mixtral(32768, 6144, 56, (48, 8), 16384, 140_630_071_296),
    "qwen2-0.5b": _qwen2(151936, 896, 24, (14, 2), 4864, 494_032_768, **_TIED),
    "qwen2-1.5b": _qwen2(151936, 1536, 28, (12, 2), 8960, 1_543_714_304, **_TIED),
    "qwen2-7b": _qwen2(152064, 3584, 28, (28, 4), 18944, 7_615_616_512),
    "qwen2-72b": _qwen2(152064, 8192, 80, (64, 8), 29568, 72_706_203_648),
    "qwen2.5-0.5b": _qwen2(151936, 896, 24, (14, 2), 4864, 494_032_768, **_TIED),
    "qwen2.5-1.5b": _qwen2(151936, 1536, 28, (12, 2), 8960, 1_543_714_304, **_TIED),
    "qwen2.5-7b": _qwen2(152064, 3584, 28, (28, 4), 18944, 7_615_616_512),
    "qwen3-0.6b": _qwen3(1024, 28, (16, 8), 3072, 596_049_920, **_TIED),
    "qwen3-1.7b": _qwen3(2048, 28, (16, 8), 6144, 1_720_574_976, **_TIED),
    "qwen3-4b": _qwen3(2560, 36, (32, 8), 9728, 4_022_468_096, **_TIED),
    "qwen3-8b": _qwen3(4096, 36, (32, 8), 12288, 8_190_735_360),
    "qwen3-14b": _qwen3(5120, 40, (40, 8), 17408, 14_768_307_200),
    "qwen3-32b": _qwen3(5120, 64, (64, 8), 25600, 32_762_123_264),
    "qwen3-30b-a3b": _qwen3_moe(2048, 48, (32, 4), 6144, 768, 30_532_122_624),
    "qwen3-235b-a22b": _qwen3_moe(4096, 94, (64, 4), 12288, 1536, 235_093_634_560),
    "gemma-2b": _llama_like("gemma", 256000, 2048, 18, (8, 1), 16384, 2_506_172_416),
    "gemma-7b": _llama_like("gemma", 256000, 3072, 28, (16, 16), 24576, 8_537_680_896),
    "gemma-2-2b": _gemma2(2304, 26, (8, 4), 9216, 2_614_341_888),
    "gemma-2-9b": _gemma2(3584, 42, (16, 8), 14336, 9_241_705_984),
    "gemma-2-27b": _gemma2(4608, 46, (32, 16), 36864, 27_227_128_320, head_dim=128, query_pre_attn_scalar=144),
    "gemma-3-270m": _gemma3(640, 18, 2048, 268_098_176),
    "gemma-3-1b": _gemma3(1152, 26, 6912, 999_885_952),
    "smollm3-3b": _llama_like(
        "smollm3", 128256, 2048, 36, (16, 4), 11008, 3_075_098_624, max_position_embeddings=65536, rope_theta=5e6
    ),
    "olmo-2-0425-1b": _olmo2(2048, 16, 16, 8192, 1_484_916_736),
    "olmo-2-1124-7b": _olmo2(4096, 32, 32, 11008, 7_298_617_344),
    "olmo-2-1124-13b": _olmo2(5120, 40, 40, 13824, 13_716_198_400),
    "olmo-3-1025-7b": _llama_like(
        "olmo3", 100278, 4096, 32, (32, 32), 11008, 7_298_011_136, max_position_embeddings=65536
    ),
    "phi-3-mini-4k": _llama_like("phi3", 32064, 3072, 32, (32, 32), 8192, 3_821_079_552, sliding_window=2047),
    "phi-4": _llama_like("phi3", 100352, 5120, 40, (40, 10), 17920, 14_659_507_200, max_position_embeddings=16384),
    "granite-3.0-2b": _granite3(2048, 8192, 8.0, 2_533_531_648),
    "granite-3.0-8b": _granite3(4096, 12800, 16.0, 8_170_848_256),
    "c4ai-command-r7b-12-2024": _llama_like(
        "cohere2", 256000, 4096, 32, (32, 8), 14336, 8_028_033_024, max_position_embeddings=132096, logit_scale=0.25
    ),
}


def known_config(name: str) -> DecoderConfig:
    """Returns the configuration of a published model, `opt-1.3b` or `facebook/opt-1.3b`.

    Raises:
        InputError: The name is not in KNOWN; the message lists the names.
    """
    short = name.rsplit("/", 1)[-1].lower().removesuffix("-hf")
    if short not in KNOWN:
        raise InputError(f"unknown model {name!r}; known shapes are {', '.join(KNOWN)}")
    model = KNOWN[short]
    return config_from_dict({"model_type": model.model_type, **model.options}, where=short, strict=True)
