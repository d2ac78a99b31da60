"""The matrix of tiny models: every family with its options, as Hugging Face configs, and a torch reference for each."""

from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab import few

from jaxrlhf.models import Decoder, Model, config_from_dict, load_pretrained, param_shapes

# Odd sizes on purpose: a vocabulary that needs padding, heads and widths that differ from one another.
_GPT2 = {"vocab_size": 101, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32, "bos_token_id": 1}
_GPT2 |= {"eos_token_id": 2, "pad_token_id": 0}
_OPT = {"vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 40}
_OPT |= {"max_position_embeddings": 32, "word_embed_proj_dim": 24, "bos_token_id": 2, "eos_token_id": 2}
_OPT |= {"pad_token_id": 1}
_LLAMA = {"vocab_size": 99, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA |= {"num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 32, "pad_token_id": 0}
_BLOOM = {"vocab_size": 101, "hidden_size": 24, "n_layer": 2, "n_head": 3, "pad_token_id": 3}
_NEOX = {"vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "pad_token_id": 1}
_NEOX |= {"intermediate_size": 40, "max_position_embeddings": 32, "rotary_pct": 0.5}
_GPTJ = _GPT2 | {"rotary_dim": 4, "n_inner": 40}
_NEO = {"vocab_size": 101, "hidden_size": 24, "num_layers": 3, "num_heads": 3, "max_position_embeddings": 32}
_NEO |= {"attention_types": [[["global", "local"], 1], [["local"], 1]], "window_size": 3, "intermediate_size": 40}
_NEO |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_QWEN = _LLAMA | {"bos_token_id": 1, "eos_token_id": 2}
_GEMMA = _LLAMA | {"head_dim": 8}
_GEMMA2 = _GEMMA | {"sliding_window": 3, "query_pre_attn_scalar": 12}
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 8}
_FACTORS = {"short_factor": [1.0, 1.2], "long_factor": [1.5, 4.0], "rope_theta": 10000.0}
_SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}

_MIXTRAL = _LLAMA | {"num_local_experts": 4}
_QWEN_MOE = _QWEN | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 8}

CASES: dict[str, tuple[str, dict]] = {
    "gpt2": ("gpt2", _GPT2),
    "gpt2-options": (
        "gpt2",
        _GPT2
        | {"n_inner": 40, "activation_function": "relu", "scale_attn_by_inverse_layer_idx": True}
        | {"layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    ),
    "gpt2-unscaled": ("gpt2", _GPT2 | {"scale_attn_weights": False, "activation_function": "gelu"}),
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt-options": (
        "opt",
        _OPT
        | {"enable_bias": False, "_remove_final_layer_norm": True, "activation_function": "gelu"}
        | {"tie_word_embeddings": False},
    ),
    "llama": ("llama", _LLAMA),
    "llama-biases": (
        "llama",
        _LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "rms_norm_eps": 1e-3},
    ),
    "llama-tied-mqa": (
        "llama",
        _LLAMA
        | {"tie_word_embeddings": True, "num_key_value_heads": 1, "hidden_act": "gelu"}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "llama-linear-rope": (
        "llama",
        _LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}},
    ),
    "llama3-rope": (
        "llama",
        _LLAMA
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 100.0,
            }
        },
    ),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 3}),
    "qwen2": ("qwen2", _QWEN | _SLIDING),
    "qwen3": ("qwen3", _QWEN | {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3-options": ("qwen3", _QWEN | _SLIDING | {"head_dim": 8, "attention_bias": True, "rms_norm_eps": 1e-3}),
    "mixtral": ("mixtral", _MIXTRAL),
    "mixtral-options": (
        "mixtral",
        _MIXTRAL
        | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 3, "hidden_act": "gelu", "head_dim": 10}
        | {"tie_word_embeddings": True, "router_aux_loss_coef": 0.02, "rms_norm_eps": 1e-3}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "qwen3_moe": ("qwen3_moe", _QWEN_MOE),
    "qwen3_moe-options": (
        "qwen3_moe",
        _QWEN_MOE
        | {"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 3, "attention_bias": True}
        | {"tie_word_embeddings": True, "num_experts_per_tok": 6, "rms_norm_eps": 1e-3},
    ),
    "qwen3_moe-mixed": ("qwen3_moe", _QWEN_MOE | {"num_hidden_layers": 5, "mlp_only_layers": [0, 2]}),
    "bloom": ("bloom", _BLOOM),
    "bloom-options": ("bloom", _BLOOM | {"apply_residual_connection_post_layernorm": True, "n_head": 6}),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox-options": (
        "gpt_neox",
        _NEOX
        | {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0, "hidden_act": "gelu_fast"}
        | {"rotary_emb_base": 50, "tie_word_embeddings": True, "layer_norm_eps": 1e-3},
    ),
    "gptj": ("gptj", _GPTJ),
    "codegen": ("codegen", _GPTJ | {"n_head": 4, "rotary_dim": 6}),
    "gpt_neo": ("gpt_neo", _NEO),
    "gemma": ("gemma", _GEMMA | {"num_key_value_heads": 1}),
    "gemma-options": (
        "gemma",
        _GEMMA
        | {"attention_bias": True, "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-3}
        | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ),
    "gemma2": ("gemma2", _GEMMA2 | {"attn_logit_softcapping": 0.8, "final_logit_softcapping": 2.0}),
    "gemma2-options": (
        "gemma2",
        _GEMMA2
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True}
        | {"layer_types": ["full_attention", "sliding_attention"], "tie_word_embeddings": False},
    ),
    "gemma3": (
        "gemma3_text",
        _GEMMA2
        | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            }
        },
    ),
    "gemma3-options": ("gemma3_text", _GEMMA2 | {"final_logit_softcapping": 2.0, "hidden_activation": "gelu"}),
    "smollm3": ("smollm3", _LLAMA | {"no_rope_layers": [1, 0], "bos_token_id": 1, "eos_token_id": 2}),
    "smollm3-options": (
        "smollm3",
        _LLAMA
        | {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 3}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "rope_parameters": _YARN}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "olmo2": ("olmo2", _LLAMA | {"eos_token_id": 2}),
    "olmo2-options": (
        "olmo2",
        _LLAMA
        | {"eos_token_id": 2, "attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}
        | {"rope_parameters": _YARN | {"attention_factor": 1.5, "beta_fast": 4, "beta_slow": 0.5}},
    ),
    "olmo3": (
        "olmo3",
        _LLAMA
        | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {"eos_token_id": 2, "sliding_window": 3}
        | {
            "rope_parameters": {
                "full_attention": _YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            }
        },
    ),
    "phi3": ("phi3", _LLAMA | {"eos_token_id": 2, "sliding_window": 3}),
    "phi3-options": (
        "phi3",
        _LLAMA
        | {"eos_token_id": 2, "partial_rotary_factor": 2 / 3, "original_max_position_embeddings": 5}
        | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "longrope"} | _FACTORS},
    ),
    "granite": (
        "granite",
        _LLAMA
        | {"embedding_multiplier": 1.7, "attention_multiplier": 0.3, "residual_multiplier": 0.6, "logits_scaling": 0.7}
        | {"tie_word_embeddings": True},
    ),
    "granite-options": (
        "granite",
        _LLAMA | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "attention_multiplier": 0.5},
    ),
    "cohere2": ("cohere2", _LLAMA | {"sliding_window": 3, "logit_scale": 0.4, "eos_token_id": 2, "bos_token_id": 1}),
    "cohere2-options": (
        "cohere2",
        _LLAMA
        | {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
        | {"sliding_window": 3, "attention_bias": True, "tie_word_embeddings": False, "layer_norm_eps": 1e-3}
        | {"eos_token_id": 2, "bos_token_id": 1},
    ),
}

SIDES = ("left", "right")


def batch(side: str, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (none below 3, where the special ones are) and a mask, padded on `side`."""
    ids = np.random.default_rng(7).integers(3, vocab, (3, 11))
    mask = np.ones_like(ids)
    for row, padding in enumerate((4, 1, 0)):
        mask[row, slice(0, padding) if side == "left" else slice(11 - padding, 11)] = 0
    return ids, mask


def hf_config(case: str):
    """The case's transformers config (no torch needed)."""
    from transformers import AutoConfig

    model_type, options = CASES[case]
    return AutoConfig.for_model(model_type, **options)


def tiny_model(case: str = "llama", head: str = "lm", **changes) -> Model:
    """Our own random model of a case, without torch; nothing is trivial: not norms, biases, or rows of padding."""
    config = config_from_dict(hf_config(case).to_dict()).replace(**changes)
    module = Decoder(config, head=head)
    rng = np.random.default_rng(3)

    def leaf(path, x):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(centre, 0.15, x.shape), jnp.float32)

    return Model(module=module, params=jax.tree.map_with_path(leaf, param_shapes(module)), config=config)


class Reference:
    """A case's Hugging Face torch model on disk, with its outputs, and our model loaded from the same folder."""

    def __init__(self, case: str, folder) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.case, self.folder = case, folder
        self.model = AutoModelForCausalLM.from_config(hf_config(case), attn_implementation="eager").eval()
        self.perturb(self.model)
        self.model.save_pretrained(folder)

    @staticmethod
    def perturb(model) -> None:
        import torch

        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def batch(self, side: str) -> tuple[np.ndarray, np.ndarray]:
        return batch(side, self.model.config.vocab_size)

    def inputs(self, side: str) -> dict:
        """Keyword arguments of the torch model; positions count real tokens, as OPT and BLOOM do by themselves."""
        import inspect

        import torch

        ids, mask = self.batch(side)
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if self.model.config.model_type != "opt" and "position_ids" in inspect.signature(self.model.forward).parameters:
            inputs["position_ids"] = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
        return inputs

    def theirs(self, side: str) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
        """Logits, mean next-token loss over real tokens, and every parameter's gradient."""
        import torch

        inputs = self.inputs(side)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.model.zero_grad()
        logits = self.model(**inputs, use_cache=False).logits
        logp = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
        weights = mask[:, 1:] * mask[:, :-1]
        loss = -(logp * weights).sum() / weights.sum()
        loss.backward()
        grads = {name: p.grad.numpy().copy() for name, p in self.model.named_parameters()}
        return logits.detach().numpy(), loss.item(), grads

    @cached_property
    def ours(self) -> Model:
        return load_pretrained(self.folder)

    @cached_property
    def _step(self):
        module = self.ours.module

        def loss(params, ids, mask):
            logits = module.apply({"params": params}, ids, mask)
            logp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)[..., 0]
            weights = mask[:, 1:] * mask[:, :-1]
            return -(logp * weights).sum() / weights.sum(), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    def our_outputs(self, side: str):
        """(logits, loss, gradient tree) of our model on the same batch."""
        ids, mask = (jnp.asarray(x, jnp.int32) for x in self.batch(side))
        (loss, logits), grads = self._step(self.ours.params, ids, mask)
        return np.asarray(logits), float(loss), grads


# Each kind of positions, norms, attention and experts once.
KINDS = ("bloom", "gemma2", "gpt2", "gpt_neo", "gptj", "llama", "mixtral", "opt-350m", "phi3-options")


@pytest.fixture(scope="session", params=sorted(CASES))
def case(request) -> str:
    """Every model of the matrix in turn."""
    return request.param


@pytest.fixture(params=few(sorted(CASES), KINDS))
def kind(request) -> str:
    """A model of each kind in turn; the others of the matrix in `make test-long`."""
    return request.param


@pytest.fixture(scope="session")
def reference(case, tmp_path_factory) -> Reference:
    """The torch reference of the current case; skips where torch is not installed."""
    pytest.importorskip("torch")
    return Reference(case, tmp_path_factory.mktemp(case))


@pytest.fixture
def reference_of(tmp_path):
    """`reference_of(case)`: the torch reference of a case, for tests that change it or need few cases."""
    pytest.importorskip("torch")
    return lambda case: Reference(case, tmp_path / case)


@pytest.fixture(scope="session")
def make_model():
    """`make_model(case, head=…, **config changes)`: our own random tiny model."""
    return tiny_model


@pytest.fixture(scope="session")
def make_batch():
    """`make_batch(side, vocab)`: ids and mask."""
    return batch
