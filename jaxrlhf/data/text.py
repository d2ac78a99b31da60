"""Pretraining text for mixture (ptx) training: documents joined by EOS, cut into blocks of one length."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxrlhf.config.files import check_regular
from jaxrlhf.data.batches import Batch, Indices
from jaxrlhf.data.cache import created, hash_json
from jaxrlhf.data.columns import MISSING, look_up
from jaxrlhf.data.messages import kind_of
from jaxrlhf.data.order import epoch_units, stream_positions
from jaxrlhf.data.rendering import encode_texts_as_documents
from jaxrlhf.data.sources import named_as, resolve_source
from jaxrlhf.data.tokenized import CHUNK
from jaxrlhf.data.tokenizer import tokenizer_fingerprint
from jaxrlhf.distributed import by_turns, check_same
from jaxrlhf.errors import InputError

logger = logging.getLogger(__name__)

FORMAT = 2  # raise it when the meaning of the cached files changes


class TextBlocks:
    """Packed text.

    Attributes:
        tokens: int32 [n, T]: blocks of documents, each of which ends with EOS.
        starts: int64 [documents]: where each document begins in the stream of all blocks.
        first: number of the first block in that stream.
        key: hash of the text and the tokenizer.
        segments: batches say which document each token belongs to, so that it sees only that one.
        seed: key of the order.
    """

    def __init__(
        self, tokens: np.ndarray, starts: np.ndarray, key: str, *, first: int = 0, segments: bool = True, seed: int = 0
    ) -> None:
        self.tokens, self.starts, self.key, self.first = tokens, starts, key, first
        self.segments, self.seed = segments, seed

    def __len__(self) -> int:
        return len(self.tokens)

    def indices(self, step: int, batch_size: int) -> np.ndarray:
        """int64 [batch_size]: the blocks of training step `step` (from 0)."""
        return epoch_units(stream_positions(step, batch_size), len(self), self.seed)

    def batch(self, indices: Indices, *, held: np.ndarray | None = None) -> Batch:
        """Builds `input_ids, attention_mask, loss_mask` int32 [B, T]; `row_mask` int32 [B] (0 in filler rows).

        With `segments`, also `segment_ids` int32 [B, T]. Every token is a target, but for the first of a block or of a
        document. Rows outside `held` (bool [B]) are zeros.
        """
        indices = np.asarray(indices)
        real = indices >= 0
        read = real if held is None else real & held
        blocks = np.maximum(indices, 0)
        ids = np.where(read[:, None], self.tokens[blocks], 0).astype(np.int32)
        width = ids.shape[1]
        loss_mask = np.broadcast_to(real[:, None], ids.shape).astype(np.int32)
        loss_mask[:, 0] = 0
        batch = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "loss_mask": loss_mask,
            "row_mask": real.astype(np.int32),
        }
        if not self.segments:
            return batch
        places = (blocks[:, None] + self.first) * width + np.arange(width)
        documents = np.searchsorted(self.starts, places, side="right")
        begins = np.diff(documents, axis=1, prepend=documents[:, :1]) > 0
        batch["loss_mask"] = loss_mask * ~begins
        return batch | {"segment_ids": (documents - documents[:, :1] + 1).astype(np.int32)}


def load_text(
    paths: Sequence[str],
    tokenizer,
    *,
    field: str,
    block: int,
    held_out: float,
    cache: Path,
    segments: bool = True,
    seed: int = 0,
) -> tuple[TextBlocks, TextBlocks]:
    """Loads training and held-out blocks of text, tokenised or from the cache.

    The last tokens that fill no block are left out. The last blocks are held out.

    Args:
        paths: sources as in `data_path`, whose train split holds one document per row; a text file is one document.
        tokenizer: a Hugging Face tokenizer.
        field: column with the text, or a dotted path to it.
        block: tokens in a block.
        held_out: share of the blocks to evaluate on (at least one).
        cache: the cache folder.
        segments: a token sees only its own document.
        seed: key of the order.

    Raises:
        InputError: a source has no such text, or the text is shorter than two blocks.
    """
    (tokens, starts), key = by_turns(
        "tokenising the pretraining text", lambda: _joined_documents(paths, tokenizer, field, cache)
    )
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
    options = {"segments": segments, "seed": seed}
    return (
        TextBlocks(blocks[:-last], starts, key, **options),
        TextBlocks(blocks[-last:], starts, key, first=count - last, **options),
    )


@named_as("ptx_")
def _joined_documents(
    paths: Sequence[str], tokenizer, field: str, cache: Path
) -> tuple[tuple[np.ndarray, np.ndarray], str]:
    """All documents' tokens, int32 [n], and where each begins, int64; mapped from the cache. A hash of their origin."""
    sources = [resolve_source(name, cache) for name in paths]
    prints = [source.fingerprint("train") for source in sources]
    key = hash_json([FORMAT, tokenizer_fingerprint(tokenizer), field, prints])
    target = cache / "text" / key
    if not target.is_dir():
        parts: list[np.ndarray] = []
        for texts in _documents(sources, field):
            parts += [np.array(ids, np.int32) for ids in encode_texts_as_documents(tokenizer, texts)]
        with created(target) as temporary:
            temporary.mkdir()
            np.save(temporary / "tokens.npy", np.concatenate(parts or [np.zeros(0, np.int32)]))
            np.save(temporary / "starts.npy", np.cumsum([0, *map(len, parts)])[:-1])
    return (_mapped(target / "tokens.npy"), _mapped(target / "starts.npy")), key


def _mapped(path: Path) -> np.ndarray:
    """An array of whole numbers in a file of the cache."""
    try:
        check_regular(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read {path} ({error}); delete its folder, and it is made again") from error
    if array.ndim != 1 or array.dtype.kind != "i":
        raise InputError(f"{path} holds no tokens; delete its folder, and it is made again")
    return array


def _documents(sources: Sequence, field: str) -> Iterator[list[str]]:
    """The texts of all rows, in batches."""
    for source in sources:
        for table in source.tables("train"):
            first = 0
            for batch in table.dataset.iter(batch_size=CHUNK):
                rows, texts = table.parse(batch, first), []
                for i, row in enumerate(rows):
                    text = look_up(row, field) if isinstance(row, Mapping) else MISSING
                    if row is not None and not isinstance(text, str):
                        found = "is missing" if text is MISSING else f"is {kind_of(text)}"
                        raise InputError(
                            f"{table.where(first + i)}: '{field}' must hold the text, but {found}; "
                            "name the column with --ptx_field"
                        )
                    texts += [text] if isinstance(text, str) and text else []
                first += len(rows)
                yield texts
