"""Data: rows from files or data sets, rendered and tokenised once, in batches of static shape."""

from jaxrlhf.data.batches import (
    Data,
    PairData,
    PromptData,
    SFTData,
    epoch_permutation,
    eval_batches,
    length_bucket,
    stream_indices,
)
from jaxrlhf.data.demo import demo_quality, materialize_demo, write_demo
from jaxrlhf.data.loading import DataConfig, load_data
from jaxrlhf.data.templates import (
    DEFAULT_TEMPLATE,
    Tokenizer,
    answer_text,
    encode_conversation,
    encode_pair,
    encode_prompt,
    encode_stops,
    load_tokenizer,
    pad_token_id,
    plain_response,
)
from jaxrlhf.data.text import TextBlocks, load_text

__all__ = [
    "DEFAULT_TEMPLATE",
    "Data",
    "DataConfig",
    "PairData",
    "PromptData",
    "SFTData",
    "TextBlocks",
    "Tokenizer",
    "answer_text",
    "demo_quality",
    "encode_conversation",
    "encode_pair",
    "encode_prompt",
    "encode_stops",
    "epoch_permutation",
    "eval_batches",
    "length_bucket",
    "load_data",
    "load_text",
    "load_tokenizer",
    "materialize_demo",
    "pad_token_id",
    "plain_response",
    "stream_indices",
    "write_demo",
]
