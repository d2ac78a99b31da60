"""Writes a tokenizer into an export: with the chat template of the run, and the source's other named templates."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = "additional_chat_templates"
"""The folder of a tokenizer that holds its named chat templates but the default one."""


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Saves a tokenizer as transformers does.

    The chat template that the run used becomes the default one. The other templates that the source named stay under
    their names (`named_templates`, which `with_template` keeps).
    """
    named = getattr(tokenizer, "named_templates", {})
    others = {name: text for name, text in named.items() if name != "default"}
    if others and isinstance(tokenizer.chat_template, str):
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = {"default": tokenizer.chat_template, **others}
    tokenizer.save_pretrained(folder)
