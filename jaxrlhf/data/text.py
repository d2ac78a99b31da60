"""Pretraining text for mixture (ptx) training: documents joined by EOS and cut into blocks of one length."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxrlhf.data.sources import decode_text, hash_file, resolve_source
from jaxrlhf.data.tokenized import CHUNK, hash_json, tokenizer_fingerprint
from jaxrlhf.distributed import by_turns, check_same
from jaxrlhf.errors import InputError

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when the meaning of the cached files changes


class TextBlocks:
    """Packed text: int32 tokens `[n, T]`, in which documents follow each other with an EOS between them."""

    def __init__(self, tokens: np.ndarray, key: str) -> None:
        self.tokens, self.key = tokens, key

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Sequence[int], *, held: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """`input_ids, attention_mask, loss_mask` int32 [B, T]; `row_mask` int32 [B] (0 for filler rows, number -1).

        Every token but a block's first is a target. With `held` (bool [B]) the other rows hold zeros.
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
    """Training and held-out blocks of `block` tokens of the texts in `paths`, tokenised or from the cache.

    A `.txt` file is one document; of other sources (as `data_path`) the train split's `field` holds one per row. The
    end that fills no block is left out; the last blocks, a share of `held_out` (at least one), are kept for evaluation.
    Raises InputError for a source without such text, and for less text than two blocks.
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
    """All documents' tokens, each followed by EOS, int32 [n], mapped from the cache; a hash of what they come from."""
    prints = []
    for name in paths:
        path = Path(name).expanduser()
        text = path.suffix.lower() == ".txt"
        if text and not path.is_file():
            raise InputError(f"ptx_data_path '{name}': no such file; check the path")
        prints.append(hash_file(path) if text else resolve_source(name, cache).fingerprint("train"))
    key = hash_json([FORMAT, tokenizer_fingerprint(tokenizer), field, prints])
    target = cache / "text" / f"{key}.npy"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        parts: list[list[int]] = []
        for documents in _chunks(paths, field, cache):
            for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
                parts.append([*ids, tokenizer.eos_token_id])
        tokens = np.fromiter((token for ids in parts for token in ids), np.int32)
        handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, tokens)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return np.load(target, mmap_mode="r"), key


def _chunks(paths: Sequence[str], field: str, cache: Path) -> Iterator[list[str]]:
    chunk: list[str] = []
    for document in _documents(paths, field, cache):
        chunk.append(document)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _documents(paths: Sequence[str], field: str, cache: Path) -> Iterator[str]:
    for name in paths:
        path = Path(name).expanduser()
        if path.suffix.lower() == ".txt":
            yield decode_text(path)
            continue
        rows = resolve_source(name, cache).rows("train")
        for i in range(len(rows)):
            text = rows[i].get(field) if isinstance(rows[i], Mapping) else None
            if not isinstance(text, str):
                raise InputError(
                    f"{rows.where(i)}: field '{field}' must hold the text, found {type(text).__name__}; name the field "
                    "with --ptx_field"
                )
            if text:
                yield text
