"""Pretraining text for mixture (ptx) training: documents joined by EOS, cut into blocks of one length."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxrlhf.data.batches import Batch, Indices
from jaxrlhf.data.cache import created, hash_json, tokenizer_fingerprint
from jaxrlhf.data.sources import decode, hash_file, resolve_source
from jaxrlhf.data.tokenized import chunks
from jaxrlhf.distributed import by_turns, check_same
from jaxrlhf.errors import InputError

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when the meaning of the cached files changes


class TextBlocks:
    """Packed text: int32 tokens [n, T]; documents follow each other with an EOS between them."""

    def __init__(self, tokens: np.ndarray, key: str) -> None:
        self.tokens, self.key = tokens, key

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Indices, *, held: np.ndarray | None = None) -> Batch:
        """Builds `input_ids, attention_mask, loss_mask` int32 [B, T]; `row_mask` int32 [B] (0 in filler rows).

        Every token but a block's first is a target. Rows outside `held` (bool [B]) are zeros.
        """
        indices = np.asarray(indices)
        real = indices >= 0
        read = real if held is None else real & held
        ids = np.where(read[:, None], self.tokens[np.maximum(indices, 0)], 0).astype(np.int32)
        loss_mask = np.broadcast_to(real[:, None], ids.shape).astype(np.int32)
        loss_mask[:, 0] = 0
        return {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "loss_mask": loss_mask,
            "row_mask": real.astype(np.int32),
        }


def load_text(
    paths: Sequence[str], tokenizer, *, field: str, block: int, held_out: float, cache: Path
) -> tuple[TextBlocks, TextBlocks]:
    """Loads training and held-out blocks of text, tokenised or from the cache.

    The last tokens that fill no block are left out. The last blocks are held out.

    Args:
        paths: `.txt` files, one document each, or sources as in `data_path`, whose train split holds one document per
            row.
        tokenizer: a Hugging Face tokenizer.
        field: name of the field with the text.
        block: tokens in a block.
        held_out: share of the blocks to evaluate on (at least one).
        cache: the cache folder.

    Raises:
        InputError: a source has no such text, or the text is shorter than two blocks.
    """
    tokens, key = by_turns("tokenising the pretraining text", lambda: _packed(paths, tokenizer, field, cache))
    check_same("pretraining text", {"the pretraining text": key})
    count = len(tokens) // block
    if count < 2:
        raise InputError(
            f"ptx_data_path {', '.join(paths)}: holds {len(tokens):,} tokens, less than two blocks of {block} "
            "(one to train on, one to evaluate); give more text, or lower ptx_block_size"
        )
    blocks = tokens[: count * block].reshape(count, block)
    last = min(count - 1, max(1, round(held_out * count)))
    logger.info("pretraining text: %s tokens in %s blocks of %s, %s held out", f"{len(tokens):,}", count, block, last)
    return TextBlocks(blocks[:-last], key), TextBlocks(blocks[-last:], key)


def _packed(paths: Sequence[str], tokenizer, field: str, cache: Path) -> tuple[np.ndarray, str]:
    """All documents' tokens, each followed by EOS, int32 [n], mapped from the cache; and a hash of their origin."""
    prints = [
        hash_file(text) if (text := _text_file(name)) else resolve_source(name, cache).fingerprint("train")
        for name in paths
    ]
    key = hash_json([FORMAT, tokenizer_fingerprint(tokenizer), field, prints])
    target = cache / "text" / f"{key}.npy"
    if not target.is_file():
        parts: list[np.ndarray] = []
        for documents in chunks(_documents(paths, field, cache)):
            for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
                parts.append(np.array([*ids, tokenizer.eos_token_id], np.int32))
        with created(target) as temporary:
            np.save(temporary, np.concatenate(parts or [np.zeros(0, np.int32)]))
    return np.load(target, mmap_mode="r"), key


def _text_file(name: str) -> Path | None:
    """The `.txt` file that `name` stands for, or None for another source. Raises InputError when it does not exist."""
    path = Path(name).expanduser()
    if path.suffix.lower() != ".txt":
        return None
    if not path.is_file():
        raise InputError(f"ptx_data_path '{name}': no such file; check the path")
    return path


def _documents(paths: Sequence[str], field: str, cache: Path) -> Iterator[str]:
    for name in paths:
        if path := _text_file(name):
            yield decode(path, path.read_bytes())
            continue
        rows = resolve_source(name, cache).rows("train")
        for i in range(len(rows)):
            row = rows[i]
            text = row.get(field) if isinstance(row, Mapping) else None
            if not isinstance(text, str):
                raise InputError(
                    f"{rows.where(i)}: field '{field}' must hold the text, found {type(text).__name__}; name the field "
                    "with --ptx_field"
                )
            if text:
                yield text
