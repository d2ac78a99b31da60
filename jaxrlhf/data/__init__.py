"""Data: rows from files or data sets, rendered and tokenised once, in batches of static shape."""

from jaxrlhf.data.batches import Data, eval_batches, length_bucket
from jaxrlhf.data.demo import demo_quality, materialize_demo, write_demo
from jaxrlhf.data.encoding import encode_stops
from jaxrlhf.data.ends import end_ids, knows_model, with_end_ids, without_end
from jaxrlhf.data.loading import load_data
from jaxrlhf.data.order import epoch_permutation
from jaxrlhf.data.rendering import (
    EncodedRow,
    answer_text,
    encode_conversation,
    encode_prompts,
    encode_rows,
    encode_texts_as_documents,
    plain_response,
)
from jaxrlhf.data.settings import DataConfig
from jaxrlhf.data.steps import PairData, PromptData, SFTData
from jaxrlhf.data.text import TextBlocks, load_text
from jaxrlhf.data.tokenizer import (
    DEFAULT_TEMPLATE,
    TemplateConfig,
    Tokenizer,
    load_tokenizer,
    pad_token_id,
    with_template,
    with_variables,
)
from jaxrlhf.data.tokenizer_files import own_tokenizer, read_tokenizer
from jaxrlhf.data.vocabulary import check_same_tokens, vocabulary_size

__all__ = [
    "DEFAULT_TEMPLATE",
    "Data",
    "DataConfig",
    "EncodedRow",
    "PairData",
    "PromptData",
    "SFTData",
    "TemplateConfig",
    "TextBlocks",
    "Tokenizer",
    "answer_text",
    "check_same_tokens",
    "demo_quality",
    "encode_conversation",
    "encode_prompts",
    "encode_rows",
    "encode_stops",
    "encode_texts_as_documents",
    "end_ids",
    "epoch_permutation",
    "eval_batches",
    "knows_model",
    "length_bucket",
    "load_data",
    "load_text",
    "load_tokenizer",
    "materialize_demo",
    "own_tokenizer",
    "pad_token_id",
    "plain_response",
    "read_tokenizer",
    "vocabulary_size",
    "with_end_ids",
    "with_template",
    "with_variables",
    "without_end",
    "write_demo",
]
