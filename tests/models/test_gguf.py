"""GGUF files, against the torch model that they were written from and against transformers' own reader."""

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

from comparisons import relative_error  # noqa: E402

from jaxrlhf.errors import InputError  # noqa: E402
from jaxrlhf.models import load_pretrained  # noqa: E402

VOCABULARY = [chr(33 + i) if i < 60 else f"t{i}" for i in range(96)]
LLAMA = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
LLAMA |= {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64}
NEOX = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NEOX |= {"intermediate_size": 64, "max_position_embeddings": 64, "rotary_pct": 0.5, "use_parallel_residual": False}
OTHERS = LLAMA | {"sliding_window": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
YARN |= {"attention_factor": 1.2}
OLMO3 = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
PHI3 = {key: value for key, value in OTHERS.items() if key != "head_dim"} | {"partial_rotary_factor": 0.75}
GRANITE = LLAMA | {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 768, "num_experts_per_tok": 2, "norm_topk_prob": True}
COHERE2 = {key: value for key, value in OTHERS.items() if key not in ("head_dim", "rms_norm_eps")}
COHERE2 |= {"logit_scale": 0.5, "num_hidden_layers": 5}
CASES = {  # name: (model type, options, GGUF architecture)
    "llama": ("llama", LLAMA, "llama"),
    "llama-biases": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True}, "llama"),
    "llama-tied": ("llama", LLAMA | {"tie_word_embeddings": True}, "llama"),
    "llama3-rope": ("llama", LLAMA | {"rope_parameters": LLAMA3}, "llama"),
    "qwen2": ("qwen2", LLAMA, "qwen2"),
    "qwen3": ("qwen3", LLAMA, "qwen3"),
    "qwen3_moe": ("qwen3_moe", LLAMA | EXPERTS, "qwen3moe"),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}, "llama"),
    "gemma": ("gemma", LLAMA, "gemma"),
    "gemma2": ("gemma2", OTHERS | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}, "gemma2"),
    "gemma3": ("gemma3_text", OTHERS | {"query_pre_attn_scalar": 8, "num_hidden_layers": 7}, "gemma3"),
    "smollm3": ("smollm3", LLAMA | {"num_hidden_layers": 4}, "smollm3"),
    "olmo2": ("olmo2", LLAMA, "olmo2"),
    "olmo3": ("olmo3", OTHERS | {"num_hidden_layers": 4, "rope_parameters": OLMO3}, "olmo2"),
    "phi3": ("phi3", PHI3, "phi3"),
    "phi3-longrope": (
        "phi3",
        PHI3
        | {
            "original_max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}
            | {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 3.0, 5.0], "partial_rotary_factor": 0.75},
        },
        "phi3",
    ),
    "granite": ("granite", GRANITE | {"logits_scaling": 4.0}, "granite"),
    "cohere2": ("cohere2", COHERE2, "cohere2"),
    "gpt2": ("gpt2", GPT2, "gpt2"),
    "bloom": ("bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "bloom"),
    "gpt_neox": ("gpt_neox", NEOX, "gptneox"),
}
PERMUTED = ("llama", "smollm3", "granite")
# transformers drops sizes of gpt2 and qwen3.
READ_BY_TRANSFORMERS = ("llama", "llama-tied", "qwen2", "bloom", "qwen3_moe")


def make_torch(case):
    """A random model with weights of ordinary size, so that every part of it shows in the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, options, _ = CASES[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **options, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = float(
                (("norm" in name and name.endswith("weight")) or ".ln_" in name) and not model_type.startswith("gemma")
            )
            parameter.copy_(centre + 0.1 * torch.randn_like(parameter))
    model.tie_weights()
    return model


def as_llama_cpp_lays_it_out(architecture, name, x, config):
    """What llama.cpp's converter does to a tensor besides renaming it."""
    if architecture in ("gemma", "gemma2", "gemma3") and name.endswith("norm.weight"):
        return x + 1
    if architecture in PERMUTED and "_proj" in name and name.split(".")[-2] in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    if architecture in ("bloom", "gptneox") and "query_key_value" in name:
        heads = config.n_head if architecture == "bloom" else config.num_attention_heads
        parts = x.reshape(heads, 3, x.shape[0] // heads // 3, *x.shape[1:])
        return np.concatenate([parts[:, j].reshape(-1, *x.shape[1:]) for j in range(3)])
    if architecture == "gpt2" and x.ndim == 2 and ".h." in name:
        return x.T
    return x


def merged_experts(tensors):
    """The converter's tensors: gate, up and down projections of all experts of a layer, each in one tensor."""
    found = {}
    for name, x in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = x.chunk(2, dim=1)
            found |= {
                name.replace("gate_up_proj", "gate_proj.weight"): gate,
                name.replace("gate_up", "up") + ".weight": up,
            }
        else:
            found[f"{name}.weight" if name.endswith("experts.down_proj") else name] = x
    return found


def write_metadata(writer, architecture, config):
    if architecture == "gpt2":
        sizes = config.n_positions, config.n_embd, config.n_layer, config.n_head, config.n_inner
    elif architecture == "bloom":
        sizes = 2048, config.hidden_size, config.n_layer, config.n_head, 4 * config.hidden_size
    else:
        sizes = config.max_position_embeddings, config.hidden_size, config.num_hidden_layers
        sizes += (config.num_attention_heads, config.intermediate_size)
    writer.add_context_length(sizes[0])
    writer.add_embedding_length(sizes[1])
    writer.add_block_count(sizes[2])
    writer.add_head_count(sizes[3])
    writer.add_feed_forward_length(sizes[4])
    if architecture == "gptneox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_rope_dimension_count(4)
        writer.add_parallel_residual(config.use_parallel_residual)
    elif architecture in ("gpt2", "bloom"):
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        write_llama_like(writer, architecture, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * 3 + [1] * 93)
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def write_llama_like(writer, architecture, config):
    rope = config.rope_parameters
    if "moe" in config.model_type or config.model_type == "mixtral":
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    if architecture == "cohere2":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_logit_scale(config.logit_scale)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_rope_dimension_count(6 if architecture == "phi3" else 8)
    if architecture not in ("phi3", "cohere2"):
        writer.add_key_length(8)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type == "olmo3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(YARN["factor"])
        writer.add_rope_scaling_attn_factors(YARN["attention_factor"])
        writer.add_rope_scaling_orig_ctx_len(YARN["original_max_position_embeddings"])
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))


def write_gguf(path, case, model, quantisation="F32"):
    """Writes a torch model as GGUF, as llama.cpp's converter does; matrices in the quantisation."""
    _, options, architecture = CASES[case]
    writer = gguf.GGUFWriter(str(path), architecture)
    write_metadata(writer, architecture, model.config)
    kind = gguf.GGMLQuantizationType[quantisation]
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, 8)
    for name, tensor in merged_experts(model.state_dict()).items():
        if (name == "lm_head.weight" and model.config.tie_word_embeddings) or name.endswith((".attn.bias", "inv_freq")):
            continue
        theirs = "embed_out.weight" if architecture == "gptneox" and name == "lm_head.weight" else name
        theirs = theirs.removeprefix("transformer.") if architecture == "bloom" else theirs
        own = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert own, name
        x = np.ascontiguousarray(as_llama_cpp_lays_it_out(architecture, name, tensor.numpy(), model.config))
        if x.ndim >= 2 and quantisation != "F32":
            writer.add_tensor(own, gguf.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(own, x)
    if (options.get("rope_parameters") or {}).get("rope_type") == "llama3":
        plain = 5e5 ** -(np.arange(0, 8, 2, dtype=np.float64) / 8)
        scaled = model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits_of(path):
    ids = np.arange(2, 50).reshape(2, 24)
    model = load_pretrained(path)
    return ids, np.asarray(model.module.apply({"params": model.params}, ids, np.ones_like(ids)))


@pytest.mark.parametrize("case", CASES)
def test_the_model_of_a_gguf_file_computes_what_the_original_does(case, tmp_path):
    model = make_torch(case)
    ids, ours = logits_of(write_gguf(tmp_path / "model.gguf", case, model))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    assert np.abs(theirs).std() > 0.05
    assert relative_error(ours, theirs) < 2e-5


@pytest.mark.parametrize("case", READ_BY_TRANSFORMERS)
@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_0"])
def test_quantised_files_are_read_as_transformers_reads_them(case, quantisation, tmp_path):
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "model.gguf", case, make_torch(case), quantisation)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ids, ours = logits_of(path)
    with torch.no_grad():
        assert relative_error(ours, theirs(torch.tensor(ids)).logits.numpy()) < 1e-5


def test_other_files_are_refused_by_what_is_wrong_with_them(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(InputError, match="does not exist"):
        load_pretrained(path)
    path.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="not a readable GGUF file"):
        load_pretrained(path)
    whole = write_gguf(tmp_path / "whole.gguf", "llama", make_torch("llama")).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable GGUF file"):
        load_pretrained(path)
    writer = gguf.GGUFWriter(str(path), "rwkv7")
    writer.add_block_count(1)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(InputError, match="architecture 'rwkv7' is not supported; supported are llama"):
        load_pretrained(path)


def test_tensors_that_the_architecture_does_not_have_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    model = make_torch("llama")
    model.register_buffer("extra", torch.ones(3))
    state = model.state_dict
    model.state_dict = lambda: {k: v for k, v in state().items() if k not in ("extra", "model.norm.weight")}
    write_gguf(path, "llama", model)
    with pytest.raises(InputError, match=r"missing model\.norm\.weight"):
        load_pretrained(path)
