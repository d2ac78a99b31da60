"""Loading of tokenizers, and the choice of the chat template that an export carries."""

import pytest

from jaxrlhf.data import TemplateConfig, encode_prompts, encode_rows, load_tokenizer, pad_token_id, with_template
from jaxrlhf.data.demo import train_tokenizer
from jaxrlhf.data.tokenizer import BUILT_IN, check_template
from jaxrlhf.errors import InputError

transformers = pytest.importorskip("transformers")

TEXTS = ["Human: What is hot? Assistant: The sun is hot.", "user\nhello there", "You are kind."] * 50
OWN = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
CONVERSATION = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "You"},
    {"role": "user", "content": "What is hot?"},
]


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer without a chat template."""
    train_tokenizer(TEXTS, vocab_size=320).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def own(folder, template=OWN):
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def prompt_of(tokenizer, prompt="hello"):
    return tokenizer.decode(encode_prompts(tokenizer, [prompt])[0])


def test_the_order_is_chat_template_prompt_template_own_default(folder, tmp_path):
    assert prompt_of(load_tokenizer(folder)) == "Human: hello Assistant:"
    assert prompt_of(load_tokenizer(own(folder))) == "[user]hello<eos>"
    assert prompt_of(load_tokenizer(folder, TemplateConfig("raw"))) == "hello"
    (tmp_path / "mine.jinja").write_text("{{ '«' + messages[0].content + '»' }}", encoding="utf-8")
    config = TemplateConfig("raw", chat_template=str(tmp_path / "mine.jinja"))
    assert prompt_of(load_tokenizer(folder, config)) == "«hello»"


def test_a_tilde_in_the_path_of_a_template_is_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content + '!' }}")
    assert prompt_of(load_tokenizer(folder, TemplateConfig(chat_template="~/mine.jinja"))) == "hello!"


def test_one_of_several_named_templates_is_chosen(folder):
    own(folder, {"default": OWN, "tool_use": OWN.replace("[", "(")})
    assert prompt_of(load_tokenizer(folder)) == "[user]hello<eos>"
    assert prompt_of(load_tokenizer(folder, TemplateConfig(chat_template="tool_use"))) == "(user]hello<eos>"
    with pytest.raises(InputError, match=r"chat_template 'other': .* \(its names: default, tool_use\).*chatml, llama3"):
        load_tokenizer(folder, TemplateConfig(chat_template="other"))
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    tokenizer.chat_template = {"rag": OWN, "tool_use": OWN}
    with pytest.raises(InputError, match=r"no template of that name \(its names: rag, tool_use\)"):
        with_template(tokenizer, TemplateConfig())


def test_unusable_template_files_are_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jinja': cannot be read .*check the path"):
        load_tokenizer(folder, TemplateConfig(chat_template=str(tmp_path / "nowhere.jinja")))
    (tmp_path / "bad.jinja").write_text("{{ 1 }}\n{% for m in %}")
    with pytest.raises(InputError, match=r"bad\.jinja': line 2 is not valid"):
        load_tokenizer(folder, TemplateConfig(chat_template=str(tmp_path / "bad.jinja")))


SETTINGS = [
    {},
    {"prompt_template": "raw"},
    {"prompt_template": "### Q: {prompt}\\n### A: {response} ###"},
    {"system_prompt": 'Be "kind" {{ now }}\n'},
    {"system_prompt": "Be kind.", "system_role": "merge"},
    *[{"chat_template": name} for name in BUILT_IN],
    {"chat_template": "chatml", "system_prompt": "Be kind."},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_export_prompts_as_the_run_did(folder, tmp_path, settings):
    config = TemplateConfig(**settings)
    tokenizer = load_tokenizer(folder, config)
    tokenizer.save_pretrained(tmp_path / "export")
    export = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for prompt in (CONVERSATION[:1], CONVERSATION):
        (row,) = encode_rows(tokenizer, [prompt], [["The sun"]])
        messages = [*prompt, {"role": "assistant", "content": "The sun"}]
        assert export.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False) == row.prompt
        whole = export.apply_chat_template(messages, return_dict=False)
        ids = row.prompt + row.responses[0][0]
        assert whole[: len(ids)] == ids and export.decode(whole[len(ids) :]).strip() == ""
    again = load_tokenizer(tmp_path / "export", config)
    assert again.chat_template == tokenizer.chat_template and len(again) == len(tokenizer)
    assert load_tokenizer(tmp_path / "export").chat_template == tokenizer.chat_template


BUILT_IN_TEXTS = {
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nYou"
        "<|im_end|>\n<|im_start|>user\nWhat is hot?<|im_end|>\n<|im_start|>assistant\nThe sun<|im_end|>"
    ),
    "hermes": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nYou"
        "<|im_end|>\n<|im_start|>user\nWhat is hot?<|im_end|>\n<|im_start|>assistant\nThe sun<|im_end|>"
    ),
    "llama3": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "hello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYou<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nWhat is hot?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nThe sun<|eot_id|>"
    ),
    "vicuna": "Be kind. USER: hello ASSISTANT: You<eos>USER: What is hot? ASSISTANT: The sun<eos>",
    "deepspeed_chat": "Be kind. Human: hello Assistant: You<eos> Human: What is hot? Assistant: The sun<eos>",
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_on_a_base_model(folder, name):
    tokenizer = load_tokenizer(folder, TemplateConfig(chat_template=name))
    (row,) = encode_rows(tokenizer, [[{"role": "system", "content": "Be kind."}, *CONVERSATION]], [["The sun"]])
    ids, mask = row.prompt + row.responses[0][0], row.prompt_mask + row.responses[0][1]
    assert tokenizer.decode(ids) == BUILT_IN_TEXTS[name]
    end = {"chatml": "<|im_end|>", "hermes": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "<eos>")
    assert tokenizer.eos_token == end
    assert len(tokenizer) == len(load_tokenizer(folder)) + len(BUILT_IN[name])
    trained = tokenizer.decode([i for i, bit in zip(ids, mask, strict=True) if bit])
    space = "" if BUILT_IN[name] else " "
    assert trained == f"{space}You{end}{space}The sun{end}"


def test_a_built_in_template_begins_with_the_start_token_where_the_tokenizer_adds_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    tokenizer.bos_token = "<pad>"
    ids = encode_prompts(with_template(tokenizer, TemplateConfig(chat_template="llama3")), ["hello"])[0]
    assert ids[0] == 0 and ids.count(0) == 1


def test_a_system_prompt_stands_where_a_conversation_has_none(folder):
    tokenizer = load_tokenizer(own(folder), TemplateConfig(system_prompt="Be kind."))
    assert prompt_of(tokenizer) == "[system]Be kind.<eos>[user]hello<eos>"
    with_own = [{"role": "system", "content": "Be short."}, *CONVERSATION[:1]]
    assert prompt_of(tokenizer, with_own) == "[system]Be short.<eos>[user]hello<eos>"
    other = with_template(tokenizer, TemplateConfig(system_prompt="Be new."))
    assert prompt_of(other) == "[system]Be new.<eos>[user]hello<eos>"


THINKS = (
    OWN + "{% if add_generation_prompt %}{% if enable_thinking is defined and enable_thinking is false %}"
    "<no thoughts>{% endif %}{{ name }}:{% endif %}"
)


def test_variables_of_a_template_are_defaults_that_a_new_run_or_a_caller_replaces(folder):
    tokenizer = load_tokenizer(own(folder, THINKS), TemplateConfig(chat_template_kwargs={"enable_thinking": False}))
    assert prompt_of(tokenizer) == "[user]hello<eos><no thoughts>:"
    given = tokenizer.apply_chat_template(
        CONVERSATION[:1], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert given == "[user]hello<eos>:"
    settings = TemplateConfig(chat_template_kwargs={"name": 'a "b" %}'}, system_prompt="Be kind.")
    other = with_template(tokenizer, settings)
    assert prompt_of(other) == '[system]Be kind.<eos>[user]hello<eos>a "b" %}:'
    assert prompt_of(with_template(other, TemplateConfig())) == prompt_of(other)


@pytest.mark.parametrize(
    ("name", "part"),
    [("enable_thinkin", "reads no 'enable_thinkin'"), ("a b", "reads no 'a b'"), ("tools", "comes from the conv")],
)
def test_variables_that_a_template_does_not_read_are_refused(folder, name, part):
    with pytest.raises(InputError, match=f"chat_template_kwargs: .*{part}"):
        load_tokenizer(own(folder, THINKS), TemplateConfig(chat_template_kwargs={name: True}))


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + OWN


def test_a_template_that_refuses_a_system_message_names_the_choice_to_merge_it(folder):
    own(folder, REFUSES)
    with pytest.raises(InputError, match=r"system_prompt: .* refuses it: no system; set system_role to merge"):
        load_tokenizer(folder, TemplateConfig(system_prompt="Be kind."))
    tokenizer = load_tokenizer(folder, TemplateConfig(system_prompt="Be kind.", system_role="merge"))
    assert prompt_of(tokenizer) == "[user]Be kind.\n\nhello<eos>"
    own(folder, OWN.replace("{{", "{% if m.role != 'system' %}{{").replace("}}", "}}{% endif %}"))
    with pytest.raises(InputError, match="does not show it; set system_role to merge"):
        load_tokenizer(folder, TemplateConfig(system_prompt="Be kind."))


def test_a_line_break_at_the_start_of_a_template_stays(folder):
    own(folder, "\n" + OWN)
    tokenizer = load_tokenizer(folder, TemplateConfig(system_prompt="Be kind.", system_role="merge"))
    assert prompt_of(tokenizer) == "\n[user]Be kind.\n\nhello<eos>"


def test_a_tokenizer_that_was_not_loaded_here_is_refused():
    with pytest.raises(InputError, match="has no chat template; load it with load_tokenizer"):
        encode_prompts(train_tokenizer(TEXTS, vocab_size=320), ["hello"])


def test_pad_is_an_id_that_exists_and_eos_stays_eos():
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    size = len(tokenizer)
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id == 0
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id == 1
    assert len(tokenizer) == size
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"has no EOS token.*set eos_token in its tokenizer_config\.json"):
        pad_token_id(tokenizer)


@pytest.mark.parametrize("template", ["{prompt}", "{response} {prompt}", "{prompt} {prompt} {response}", ""])
def test_a_template_without_prompt_then_response_is_refused(template):
    with pytest.raises(InputError, match=r"must hold \{prompt\} and after it \{response\}"):
        check_template(template)


def test_unreadable_tokenizer_folders_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere': no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no tokenizer files; copy tokenizer\.json"):
        load_tokenizer(tmp_path)
    train_tokenizer(TEXTS, vocab_size=320).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).eos_token == "<eos>"
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(InputError, match=r"tokenizer\.json: not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path)
