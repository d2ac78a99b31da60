"""The tokenizer of a run: its setting, the end ids of the model, and whether other models read its tokens."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from jaxrlhf.config import Lasting, PathName, Settings
from jaxrlhf.data import (
    TemplateConfig,
    Tokenizer,
    check_same_tokens,
    encode_stops,
    end_ids,
    load_tokenizer,
    own_tokenizer,
    pad_token_id,
    read_tokenizer,
    vocabulary_size,
    with_end_ids,
)
from jaxrlhf.engine import SamplingConfig
from jaxrlhf.models import (
    DecoderConfig,
    Model,
    check_same_rows,
    check_tokenizer_fits,
    config_from_dict,
    config_to_dict,
    generation_end_ids,
    read_config,
    with_token_ids,
)
from jaxrlhf.models.hf.checkpoint_files import find_model_folder
from jaxrlhf.models.hf.gguf import is_gguf


@dataclass(frozen=True)
class TokenizerConfig(Settings, may_change=True):
    """The tokenizer."""

    tokenizer_name_or_path: PathName[str | None] = None
    """Tokenizer folder or hub name, or 'demo'; default: the model's own."""
    eos_token_ids: Lasting[tuple[int | str, ...]] = ()
    """Tokens that end a response, as ids or as text. Default: the tokenizer's EOS, those of the model's config.json and
    generation_config.json, and the special token that the chat template puts after an assistant turn."""

    def load(self, model: str | None, template: TemplateConfig) -> Tokenizer:
        """Loads the tokenizer, with its chat template and the end ids of the model.

        Args:
            model: folder or hub name of the model; None for random weights.
            template: chooses the chat template.

        Raises:
            InputError: the model or the tokenizer cannot be read, or an end id is none of the vocabulary.
        """
        shape = None if model is None else read_config(model)
        tokenizer = load_tokenizer(self.tokenizer_name_or_path or str(model), template)
        other = self.tokenizer_name_or_path not in (None, model)
        return with_model_ends(tokenizer, shape, self.eos_token_ids, of=f" of {model}", other_tokenizer=other)

    def lacks_template(self, model: str, template: TemplateConfig) -> bool:
        """True if the tokenizer has no chat template and none is chosen, so the default prompt_template renders."""
        if template.chat_template is not None or template.prompt_template != TemplateConfig.prompt_template:
            return False
        return not read_tokenizer(self.tokenizer_name_or_path or find_model_folder(model)).chat_template


def with_model_ends(
    tokenizer: Tokenizer,
    config: DecoderConfig | None,
    given: Sequence[int | str] = (),
    *,
    of: str = "",
    other_tokenizer: bool = False,
) -> Tokenizer:
    """The tokenizer with the end ids of a model's configs, or with those `given`; see `with_end_ids`."""
    files = {}
    if config is not None:
        files = {f"config.json{of}": config.eos_token_id, f"generation_config.json{of}": generation_end_ids(config)}
        unset = _end_of_family(config)  # small models made from a family's defaults have an id that none of them has
        files = {name: None if ids == unset else ids for name, ids in files.items()}
    return with_end_ids(tokenizer, files, given, other_tokenizer=other_tokenizer)


def _end_of_family(config: DecoderConfig) -> int | None:
    """The end id that configs of this family have by default, where it is beyond this model's vocabulary."""
    options = config_to_dict(config.replace(source=""))  # read_config has logged what the source holds besides
    default = config_from_dict({name: value for name, value in options.items() if name != "eos_token_id"}).eos_token_id
    return default if isinstance(default, int) and default >= config.vocab_size else None


def check_reads_tokens(tokenizer: Tokenizer, actor: DecoderConfig, model: str, names: tuple[str, str]) -> None:
    """Raises InputError unless a model on disk reads the ids of a run's tokenizer.

    The tokenizers themselves are compared. Published models pad their embeddings to different numbers of rows.

    Args:
        tokenizer: the one that makes the ids.
        actor: configuration of the run's model; decides where `model` brings no tokenizer.
        model: folder or hub name of the other model, such as the reward model.
        names: names of both models in the message.
    """
    other, config = None if is_gguf(model) else own_tokenizer(find_model_folder(model)), read_config(model)
    if other is None:
        check_same_rows(actor, config, names)
    else:
        check_same_tokens(tokenizer, other, names)
    check_tokenizer_fits(vocabulary_size(tokenizer), config, f"the tokenizer of {names[0]}", model=names[1])


def with_special_tokens(model: Model, tokenizer: Tokenizer) -> Model:
    """The model with the tokenizer's special ids in its configs, so that the export generates and scores alike."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
    config = with_token_ids(model.config, end_ids(tokenizer), ids)
    return dataclasses.replace(model, module=model.module.clone(config=config), config=config)


def sampling_for(tokenizer: Tokenizer, sampling: SamplingConfig) -> SamplingConfig:
    """The sampling with the tokenizer's end ids, padding, and the tokens of its stop strings."""
    return dataclasses.replace(
        sampling,
        eos_token_id=end_ids(tokenizer),
        pad_token_id=pad_token_id(tokenizer),
        stop_sequences=encode_stops(tokenizer, sampling.stop_strings),
    )
