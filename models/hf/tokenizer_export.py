"""A tokenizer in an export: the chat template of the run beside the source's others, and a pad token that ends nothing.

transformers finds the last token of a row, whose score a reward model gives, as the last one that is not the pad token.
So the pad token of a reward model must not be one that ends a response.
"""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrlhf.config.files import read_json
from jaxrlhf.models.hf.generation_config import id_tuple
from jaxrlhf.models.model import Model, resize_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD = "<|pad|>"
"""The token that a tokenizer gets when it has no special token to pad with."""


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Saves a tokenizer as transformers 5 does, readable for transformers 4 too.

    The chat template that the run used becomes the default one. The other templates that the source named stay under
    their names (`named_templates`, which `with_template` keeps).
    """
    named = getattr(tokenizer, "named_templates", {})
    others = {name: text for name, text in named.items() if name != "default"}
    if others and isinstance(tokenizer.chat_template, str):
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = {"default": tokenizer.chat_template, **others}
    tokenizer.save_pretrained(folder)
    write_for_transformers_4(folder)


def write_for_transformers_4(folder: Path) -> None:
    """Completes the tokenizer_config.json that transformers 5 has written into `folder`; 5 reads it as before.

    Transformers 4 does not know the class that 5 names, reads chat templates from this file only (4.51 and later also
    from files of their own), takes `extra_special_tokens` for a table, and by default cleans up spaces in decoded text
    and returns token type ids, which decoders refuse.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():  # a tokenizer of another kind than transformers'
        return
    config = read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    config.setdefault("clean_up_tokenization_spaces", False)
    if templates := _chat_templates(folder):
        named = [{"name": name, "template": text} for name, text in templates.items()]
        config["chat_template"] = named if len(named) > 1 else templates["default"]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _write_merges_as_text(folder / "tokenizer.json")


def _write_merges_as_text(path: Path) -> None:
    """Writes the merges of a BPE tokenizer as `"a b"` instead of `["a", "b"]`.

    The `tokenizers` of transformers 4.44 and older read only the former, newer ones both. Parts that hold a space need
    the latter.
    """
    if not path.is_file():
        return
    content = read_json(path)
    model = content.get("model") or {}
    merges = model.get("merges")
    if not merges or any(isinstance(merge, str) or any(" " in part for part in merge) for merge in merges):
        return
    model["merges"] = [" ".join(merge) for merge in merges]
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates that lie in files of their own, by name."""
    paths = {"default": folder / "chat_template.jinja"}
    paths |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}


def with_pad_token(model: Model, tokenizer: "PreTrainedTokenizerBase") -> tuple[Model, "PreTrainedTokenizerBase"]:
    """A reward model and its tokenizer with one pad token that ends no response, in both.

    It is the tokenizer's own where that is none of the end ids, else one of its other special tokens, such as a
    reserved one. A tokenizer without any gets `PAD`, and the model a row for it.
    """
    end: Any = tokenizer.eos_token_id
    pad: Any = tokenizer.pad_token_id
    ends = {*id_tuple(model.config.eos_token_id), end}
    if pad is None or pad in ends:
        tokenizer = copy.deepcopy(tokenizer)  # the run's stays as it is
        tokenizer.pad_token = _free_token(tokenizer, ends)
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": PAD})
        pad = tokenizer.pad_token_id
    return with_pad_id(model, pad), tokenizer


def _free_token(tokenizer: "PreTrainedTokenizerBase", ends: set[int]) -> str | None:
    """The special token that is best to pad with; None when all of them end responses."""
    special = set(tokenizer.all_special_ids)
    tokens = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special or i in special}
    free = [(i, token) for i, token in tokens.items() if i not in ends and token]

    def rank(item: tuple[int, str]) -> tuple[bool, ...]:
        i, token = item
        name = token.lower()
        return "pad" not in name, "reserved" not in name, token != tokenizer.unk_token, i == tokenizer.bos_token_id

    return min(free, key=rank)[1] if free else None


def with_pad_id(model: Model, pad: int) -> Model:
    """The model with this pad id in its configs, and a row for it."""
    config = model.config.replace(pad_token_id=pad)
    if config.generation_config:
        values = json.loads(config.generation_config) | {"pad_token_id": pad}
        config = config.replace(generation_config=json.dumps(values))
    if pad >= config.padded_vocab_size:
        model = resize_vocabulary(model, pad + 1)
    config = config.replace(vocab_size=max(config.vocab_size, pad + 1))  # a row of the table's padding will do
    return model.replace(module=model.module.clone(config=config), config=config)
