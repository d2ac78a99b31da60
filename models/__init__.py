"""Decoder models in Flax linen, their Hugging Face families, and checkpoints in and out."""

from jaxrlhf.models.config import SCORE_FIELDS, DecoderConfig, LoRAConfig
from jaxrlhf.models.decode import GenerationView, decode_step, generation_view, init_cache, prefill
from jaxrlhf.models.decoder import REMAT_POLICIES, Decoder
from jaxrlhf.models.hf.adapters import load_adapter, save_adapter
from jaxrlhf.models.hf.card import ModelCard
from jaxrlhf.models.hf.config_json import config_from_dict, config_to_dict, read_config
from jaxrlhf.models.hf.export import save_pretrained
from jaxrlhf.models.hf.generation_config import generation_end_ids, with_token_ids
from jaxrlhf.models.hf.pretrained import load_pretrained, model_from_overrides, stored_head
from jaxrlhf.models.hf.score_export import for_transformers, score_offset, without_score_offset
from jaxrlhf.models.known import KNOWN, KnownModel, known_config
from jaxrlhf.models.lora import add_lora, base_leaves, join, merge_lora, merged, split_trainable
from jaxrlhf.models.model import (
    KERNEL_OPTIONS,
    Model,
    cast_matrices,
    count_params,
    create_model,
    default_dtype,
    frozen_copy,
    frozen_stage,
    is_matrix,
    logical_axes,
    param_shapes,
    param_shardings,
    reads_stored,
    resize_vocabulary,
    trained_head,
    with_head,
    with_kernels,
    working_copy,
)
from jaxrlhf.models.moe import ROUTER_SUMS, RouterSums
from jaxrlhf.models.vocabulary import check_same_rows, check_tokenizer_fits

__all__ = [
    "KERNEL_OPTIONS",
    "KNOWN",
    "REMAT_POLICIES",
    "ROUTER_SUMS",
    "SCORE_FIELDS",
    "Decoder",
    "DecoderConfig",
    "GenerationView",
    "KnownModel",
    "LoRAConfig",
    "Model",
    "ModelCard",
    "RouterSums",
    "add_lora",
    "base_leaves",
    "cast_matrices",
    "check_same_rows",
    "check_tokenizer_fits",
    "config_from_dict",
    "config_to_dict",
    "count_params",
    "create_model",
    "decode_step",
    "default_dtype",
    "for_transformers",
    "frozen_copy",
    "frozen_stage",
    "generation_end_ids",
    "generation_view",
    "init_cache",
    "is_matrix",
    "join",
    "known_config",
    "load_adapter",
    "load_pretrained",
    "logical_axes",
    "merge_lora",
    "merged",
    "model_from_overrides",
    "param_shapes",
    "param_shardings",
    "prefill",
    "read_config",
    "reads_stored",
    "resize_vocabulary",
    "save_adapter",
    "save_pretrained",
    "score_offset",
    "split_trainable",
    "stored_head",
    "trained_head",
    "with_head",
    "with_kernels",
    "with_token_ids",
    "without_score_offset",
    "working_copy",
]
