"""Two small chat tokenizers, made anew in each test run: that of a ChatML model, and that of a Llama-3 model.

`chatml` has no BOS, and its template ends every turn with a line break after the EOS. `llama3` has a BOS, which the
template writes and which the tokenizer adds to plain text; nothing follows a turn's EOS. Both templates mark what the
assistant says, and know tools.
"""

import hashlib

VOCAB_SIZE = 330
TEXTS = (
    "What color is the sky? The sky is blue, because the air scatters blue light. Is the sea blue too? It is.",
    "Human: What is the capital of France? Assistant: Paris is the capital of France. Have a nice day!",
    "You are a helpful assistant. Answer in one sentence. What is the weather in Paris today? It is sunny in Paris.",
    "system user assistant tool function name arguments city weather description parameters type object properties",
)

CALLS = """{%- for call in message.tool_calls or [] -%}
{{ '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}
{%- endfor -%}"""

CHATML = (
    """{%- if tools -%}
{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content or '' }}"""
    + CALLS
    + """{{ '<|im_end|>' }}{% endgeneration %}
{%- else -%}
{{ message.content + '<|im_end|>' }}
{%- endif -%}
{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}"""
)

LLAMA3 = (
    """{{- bos_token }}
{%- if tools -%}
{{ '<|start|>tools<|stop|>\n\n' + (tools | tojson) + '<|eot|>' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|start|>' + message.role + '<|stop|>\n\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content or '' }}"""
    + CALLS
    + """{{ '<|eot|>' }}{% endgeneration %}
{%- else -%}
{{ message.content + '<|eot|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start|>assistant<|stop|>\n\n' }}
{%- endif -%}"""
)

STYLES = ("chatml", "llama3")


def chat_tokenizer(style):
    """The tokenizer of a style in `STYLES`: byte-level BPE of `TEXTS`, with the style's special tokens and template."""
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    from jaxrlhf.data.demo import train_tokenizer

    tokenizer = train_tokenizer(list(TEXTS), VOCAB_SIZE)
    if style == "chatml":
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
        tokenizer.chat_template = CHATML
        return tokenizer
    tokenizer.add_special_tokens(
        {"bos_token": "<|begin|>", "eos_token": "<|eot|>", "additional_special_tokens": ["<|start|>", "<|stop|>"]}
    )
    begin = ("<|begin|>", tokenizer.bos_token_id)
    add_bos = TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[begin])
    tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), add_bos])
    tokenizer.chat_template = LLAMA3
    return tokenizer


def vocabulary_hash(tokenizer):
    """Hash of a tokenizer's tokens and ids: where it differs, so do all token ids."""
    return hashlib.blake2b(repr(sorted(tokenizer.get_vocab().items())).encode(), digest_size=8).hexdigest()
