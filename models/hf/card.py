"""The model card of an export, README.md on the model hub: its training, base model, data and metrics."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxrlhf.models.config import DecoderConfig


@dataclass(frozen=True)
class ModelCard:
    """Facts about an export that are not in its configuration; the card leaves out empty fields."""

    task: str = ""
    """Trainer: `sft`, `reward`, `dpo`, `ppo`, `grpo`, …"""
    title: str = ""
    """Name of the training in words, such as "Supervised fine-tuning"."""
    base_model: str = ""
    """Folder or hub name of the model that training started from."""
    data: tuple[str, ...] = ()
    """Files, folders or hub names of the training data."""
    steps: int | None = None
    """Optimizer steps."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Final values by name."""


def render_card(card: ModelCard, config: DecoderConfig, head: str) -> str:
    """Renders the card as Markdown with the hub's metadata block; `head` is "lm" or "scalar"."""
    tags = ["jaxrlhf", *([card.task] if card.task else [])]
    meta = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if head == "lm" else "text-classification",
        "tags": tags,
    }
    # The hub's metadata accepts only owner/name; the text also names a local folder.
    if card.base_model.count("/") == 1 and not card.base_model.startswith((".", "/", "~")):
        meta["base_model"] = card.base_model
    kind = "language model" if head == "lm" else "reward model (one score per sequence, at its last token)"
    shape = f"{config.num_layers} layers, width {config.hidden_size}, {config.num_heads} heads"
    lines = ["---", *(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in meta.items()), "---", ""]
    lines += [f"# {config.family} {kind.split(' (')[0]}", "", f"A {config.family} {kind}: {shape}.", ""]
    facts = {
        "Trained by": card.title or card.task,
        "Base model": card.base_model and f"`{card.base_model}`",
        "Data": ", ".join(f"`{name}`" for name in card.data),
        "Optimizer steps": "" if card.steps is None else str(card.steps),
    }
    lines += [f"- {name}: {value}" for name, value in facts.items() if value]
    if card.metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in card.metrics.items()]
    return "\n".join(lines).rstrip() + "\n"
