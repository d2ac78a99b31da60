"""The model that a trainer starts from: loaded or initialised, with the rows and kernels that its settings ask for."""

import dataclasses
import logging

from jax.sharding import Mesh

from jaxrlhf import keys
from jaxrlhf.data import DataConfig, Tokenizer, vocabulary_size
from jaxrlhf.distributed import is_primary
from jaxrlhf.models import (
    Model,
    check_tokenizer_fits,
    config_from_dict,
    create_model,
    load_pretrained,
    resize_vocabulary,
    score_offset,
    with_kernels,
    without_score_offset,
)
from jaxrlhf.trainers.settings import StepConfig

logger = logging.getLogger(__name__)


def load_model(config: StepConfig, head: str, mesh: Mesh, tokenizer: Tokenizer, *, remat: str = "none") -> Model:
    """Loads or initialises the model to train, with float32 masters in place on `mesh`.

    Args:
        config: which model, its compute dtype, ZeRO stage, kernels and seed.
        head: "lm" or "scalar".
        mesh: where the parameters go.
        tokenizer: the one that makes its tokens.
        remat: what the backward pass recomputes.

    Raises:
        InputError: when the model has fewer rows than the tokenizer has tokens, unless `resize_vocabulary` or a
            built-in chat template adds them.
    """
    start, key = config.model.start, keys.stream(config.data.seed, keys.Stream.WEIGHTS)
    vocab_size = vocabulary_size(tokenizer)
    layout = {"dtype": config.mesh.compute_dtype, "remat": remat, "zero_stage": config.compute.zero_stage}
    if start.model_type is not None:
        options = {"model_type": start.model_type, "vocab_size": vocab_size, **start.config_overrides}
        shape = config_from_dict(options, f"config_overrides of {start.model_type}", strict=True)
        model = create_model(shape, head=head, key=key, mesh=mesh, **layout)
    else:
        path = str(config.model.model_name_or_path)
        model = load_pretrained(path, head=head, key=key, mesh=mesh, progress=is_primary(), **layout)
        if offset := score_offset(model):
            logger.info("%s adds %g to every score, which is left out: it changes no comparison", path, offset)
        model = without_score_offset(model)
    model = with_kernels(model, **config.compute.kernels)
    if start.resize_vocabulary and model.config.vocab_size < vocab_size:
        model = resize_vocabulary(model, vocab_size)
    model = with_template_rows(model, config.data, tokenizer)
    source = f"the tokenizer of {config.model.tokenizer_source}"
    check_tokenizer_fits(vocab_size, model.config, source, "add rows with --resize_vocabulary")
    return without_dropout(model) if start.disable_dropout else model


def with_template_rows(model: Model, data: DataConfig, tokenizer: Tokenizer) -> Model:
    """The model with a row for each token that a built-in chat template has added to the tokenizer."""
    missing = vocabulary_size(tokenizer) - model.config.vocab_size if data.template.adds_tokens else 0
    if missing <= 0:
        return model
    name = data.template.chat_template
    logger.info("chat_template %s: %d rows added to the model, for the tokens that the template needs", name, missing)
    return resize_vocabulary(model, model.config.vocab_size + missing)


def without_dropout(model: Model) -> Model:
    """The same model with every dropout rate 0."""
    config = model.config.replace(embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    return dataclasses.replace(model, module=model.module.clone(config=config), config=config)
