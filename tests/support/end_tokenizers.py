"""Small tokenizers in the shape of published ones: their special tokens, their EOS, their chat templates.

The ids are small; names, order and roles of the special tokens are those of the models.
"""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_TURNS = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
)
HEADER = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
LLAMA3 = LLAMA3_TURNS + HEADER
"""That of Meta-Llama-3-8B: it writes the next header, asked or not."""
LLAMA31 = LLAMA3_TURNS + "{% if add_generation_prompt %}" + HEADER + "{% endif %}"
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
DEEPSEEK_CODER = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '### Instruction:\n' + message['content'] + '\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + '\n<|EOT|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
HEADERS_ONLY = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{{ '<|assistant|>' }}"
)
"""No turn has an end, and the next header is written, asked or not."""
_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
_LLAMA3_TOKENS += ("<|eom_id|>", "<|eot_id|>")

SHAPES = {
    "qwen2.5-base": (CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|endoftext|>"),
    "qwen2.5-instruct": (CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>"),
    "llama-3-base": (LLAMA3, _LLAMA3_TOKENS, "<|begin_of_text|>", "<|end_of_text|>"),
    "llama-3.1-instruct": (LLAMA31, _LLAMA3_TOKENS, "<|begin_of_text|>", "<|eot_id|>"),
    "yi-chat": (CHATML, ("<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|endoftext|>"),
    "vicuna": (VICUNA, ("<s>", "</s>"), "<s>", "</s>"),
    "deepseek-coder": (DEEPSEEK_CODER, ("<bos>", "<eos>", "<|EOT|>"), "<bos>", "<eos>"),
    "headers-only": (HEADERS_ONLY, ("<eos>", "<|user|>", "<|assistant|>"), None, "<eos>"),
}
"""By the model whose shape it is: chat template, special tokens, BOS and EOS."""
TEXTS = ["USER: What is hot? ASSISTANT: The sun is hot!", "user\nhello there", "### Response:\nYou are kind."] * 50


def shaped_tokenizer(name):
    """A byte-level BPE tokenizer with the special tokens and the chat template of a shape in `SHAPES`."""
    from transformers import AddedToken

    from jaxrlhf.data.demo import train_tokenizer

    template, tokens, bos, eos = SHAPES[name]
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], True)
    tokenizer.eos_token = eos
    if bos:
        tokenizer.bos_token = bos
    tokenizer.chat_template = template
    return tokenizer


def gpt2_tokenizer(size=300):
    """A byte-level BPE tokenizer with one special token, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def write_sentencepiece(folder, symbols=(), **config):
    """Trains a tiny SentencePiece model and writes it as `tokenizer.model`, with a Llama tokenizer_config.json."""
    import json

    from sentencepiece import SentencePieceTrainer

    folder.mkdir(parents=True, exist_ok=True)
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=list(symbols),
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    values = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    values |= {"add_bos_token": True, "add_eos_token": False, "legacy": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder
