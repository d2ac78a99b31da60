"""End ids: one set for each shape of tokenizer, overruled by the user; training targets end at the first of them."""

import pytest
from end_tokenizers import SHAPES, shaped_tokenizer, write_sentencepiece

from jaxrlhf.data import TemplateConfig, answer_text, encode_rows, end_ids, load_tokenizer, with_end_ids, with_template
from jaxrlhf.errors import InputError

transformers = pytest.importorskip("transformers")

# What the model's files add, as tokens.
FILES = {
    "qwen2.5-base": {"config.json": "<|endoftext|>", "generation_config.json": "<|endoftext|>"},
    "qwen2.5-instruct": {"config.json": "<|im_end|>", "generation_config.json": ["<|im_end|>", "<|endoftext|>"]},
    "llama-3-base": {"config.json": "<|end_of_text|>", "generation_config.json": "<|end_of_text|>"},
    "llama-3.1-instruct": {"config.json": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]},
    "yi-chat": {"config.json": "<|endoftext|>", "generation_config.json": "<|im_end|>"},
    "vicuna": {"config.json": "</s>", "generation_config.json": "</s>"},
    "deepseek-coder": {"config.json": "<|EOT|>"},
}
ENDS = {
    "qwen2.5-base": ["<|endoftext|>", "<|im_end|>"],
    "qwen2.5-instruct": ["<|im_end|>", "<|endoftext|>"],
    "llama-3-base": ["<|end_of_text|>", "<|eot_id|>"],
    "llama-3.1-instruct": ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"],
    "yi-chat": ["<|endoftext|>", "<|im_end|>"],
    "vicuna": ["</s>"],
    "deepseek-coder": ["<eos>", "<|EOT|>"],
    "headers-only": ["<eos>"],
}
CLOSING = {
    "qwen2.5-base": "<|im_end|>",
    "qwen2.5-instruct": "<|im_end|>",
    "llama-3-base": "<|eot_id|>",
    "llama-3.1-instruct": "<|eot_id|>",
    "yi-chat": "<|im_end|>",
    "vicuna": "</s>",
    "deepseek-coder": "\n<|EOT|>",
}


def files_of(name, tokenizer):
    return {file: tokenizer.convert_tokens_to_ids(tokens) for file, tokens in FILES.get(name, {}).items()}


def told(name):
    """The tokenizer of a shape, after its model's files were read."""
    tokenizer = shaped_tokenizer(name)
    return with_end_ids(with_template(tokenizer, TemplateConfig()), files_of(name, tokenizer))


@pytest.mark.parametrize("name", SHAPES)
def test_the_set_is_that_of_tokenizer_template_config_and_generation_config(name):
    tokenizer = told(name)
    assert tokenizer.convert_ids_to_tokens(list(end_ids(tokenizer))) == ENDS[name]


@pytest.mark.parametrize("name", CLOSING)
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_a_training_target_is_cut_at_the_first_end_id(name, train_on):
    tokenizer = told(name)
    conversation = [
        {"role": "user", "content": "What is hot?"},
        {"role": "assistant", "content": "You are kind."},
        {"role": "user", "content": "hello"},
    ]
    (row,) = encode_rows(tokenizer, [conversation], [["The sun is hot!"]], train_on=train_on)
    ids, mask = row.responses[0]
    assert tokenizer.decode(ids).strip() == f"The sun is hot!{CLOSING[name]}"
    assert sum(i in end_ids(tokenizer) for i in ids) == 1 and mask[-1] == 1
    earlier = tokenizer.decode([i for i, m in zip(row.prompt, row.prompt_mask, strict=True) if m]).strip()
    assert earlier == (f"You are kind.{CLOSING[name]}" if train_on == "all" else "")


def test_the_next_header_of_a_template_that_ignores_the_generation_prompt_is_no_end():
    tokenizer = shaped_tokenizer("headers-only")
    assert tokenizer.convert_tokens_to_ids("<|assistant|>") not in end_ids(tokenizer)


@pytest.mark.parametrize(("given", "tokens"), [(["<|eot_id|>"], ["<|eot_id|>"]), ([301, "<|eom_id|>"], None)])
def test_ids_that_the_user_gives_overrule_all_others(given, tokens):
    tokenizer = shaped_tokenizer("llama-3.1-instruct")
    ends = end_ids(with_end_ids(tokenizer, files_of("llama-3.1-instruct", tokenizer), given))
    assert ends == tuple(tokenizer.convert_tokens_to_ids(tokens) if tokens else (301, 304))


def test_a_given_id_closes_the_targets_of_a_template_without_an_end():
    tokenizer = with_end_ids(with_template(shaped_tokenizer("vicuna"), TemplateConfig("raw")), {}, ["<s>"])
    (row,) = encode_rows(tokenizer, ["hello"], [["You"]])
    assert row.responses[0][0][-1] == tokenizer.bos_token_id


@pytest.mark.parametrize("given", [(["<|nope|>"]), ([10**6]), ([-1])])
def test_given_ids_outside_the_vocabulary_are_refused(given):
    with pytest.raises(InputError, match=r"eos_token_ids: .*(no token '<\|nope\|>'|outside the tokenizer)"):
        with_end_ids(shaped_tokenizer("vicuna"), {}, given)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"config.json": 128009},
            r"config.json: eos_token_id=128009 is outside the tokenizer's vocabulary of 302 tokens",
        ),
        ({"generation_config.json": [301, 151645]}, r"generation_config.json: eos_token_id=151645 .* another model"),
        (
            {"generation_config.json": [5, 6]},
            r"generation_config.json: .*plain tokens of this tokenizer \(5 is .*another",
        ),
        ({"config.json": "</s>"}, r"config.json: eos_token_id='</s>' must be an id or a list of ids"),
        ({"generation_config.json": [True]}, r"must be an id or a list of ids.*--eos_token_ids"),
        ({"config.json": -1}, r"eos_token_id=-1 is outside"),
    ],
)
def test_files_of_another_model_are_refused_unless_the_user_overrules(files, message):
    tokenizer = shaped_tokenizer("vicuna")
    with pytest.raises(InputError, match=message):
        with_end_ids(tokenizer, files)
    assert end_ids(with_end_ids(tokenizer, files, [7])) == (7,)


def test_files_of_a_model_that_is_given_another_tokenizer_count_where_they_name_its_special_tokens():
    files = {"config.json": [0, 5, 128009], "generation_config.json": 300}
    assert end_ids(with_end_ids(shaped_tokenizer("vicuna"), files, other_tokenizer=True)) == (301, 0, 300)


def test_a_plain_token_that_a_config_names_ends_responses_but_cuts_no_target(caplog):
    tokenizer = shaped_tokenizer("vicuna")
    plain = tokenizer("!")["input_ids"][-1]
    tokenizer = with_end_ids(with_template(tokenizer, TemplateConfig()), {"config.json": [301, plain]})
    assert end_ids(tokenizer) == (301, plain)
    assert "which ends responses, is the plain token '!'" in caplog.text
    (row,) = encode_rows(tokenizer, ["hello"], [["You! are kind."]])
    assert tokenizer.decode(row.responses[0][0]).endswith("You! are kind.</s>")


@pytest.mark.parametrize("name", SHAPES)
def test_the_end_of_a_sampled_answer_is_not_shown(name):
    tokenizer = told(name)
    ids = tokenizer("The sun is hot!", add_special_tokens=False)["input_ids"]
    for end in end_ids(tokenizer):
        assert answer_text(tokenizer, [*ids, end]) == "The sun is hot!"


def test_symbols_of_a_sentencepiece_model_are_found_and_not_shown(tmp_path):
    pytest.importorskip("sentencepiece")
    template = SHAPES["yi-chat"][0]
    write_sentencepiece(tmp_path, ["<|im_start|>", "<|im_end|>"], chat_template=template)
    tokenizer = load_tokenizer(tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_ids(tokenizer) == (tokenizer.eos_token_id, end) == (2, 4)
    (row,) = encode_rows(tokenizer, ["hello"], [["The sun is hot!"]])
    assert row.responses[0][0][-1] == end
    assert answer_text(tokenizer, row.responses[0][0]) == "The sun is hot!"
