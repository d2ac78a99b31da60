"""Chat templates from strangers: they end, they stay small, and they reach nothing outside."""

import pytest

from jaxrlhf.data import TemplateConfig, encode_prompts, load_tokenizer
from jaxrlhf.errors import InputError

CONTENT = "{{ messages[0]['content'] }}"


def loop(body, times=60):
    return f"{{% set n = namespace(x='xx') %}}{{% for i in range({times}) %}}{body}{{% endfor %}}{CONTENT}"


MACROS = "{% macro a0() %}x{% endmacro %}" + "".join(
    f"{{% macro a{i}() %}}{{{{ a{i - 1}() }}}}{{{{ a{i - 1}() }}}}{{% endmacro %}}" for i in range(1, 40)
)
GROWING = [
    "{% set n.x = n.x + n.x %}",
    "{% set n.x = n.x ~ n.x %}",
    "{% set n.x = [n.x, n.x] | join %}",
    "{% set n.x = n.x.join(['a', 'b', n.x]) %}",
    "{% set n.x = n.x.replace('x', 'xx') %}",
    "{% set n.x = n.x | replace('x', 'xx') %}",
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}",
    "{% set n.x = n.x * 2 %}",
    "{% set n.x = 99 if i == 0 else n.x * n.x %}",
]
HUGE = [
    "{{ 'x' * 10000000000 }}",
    "{{ 'x' | center(10000000000) }}",
    "{{ 'x'.ljust(10000000000) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ lipsum(n=100000000) }}",
    "{{ ('\n' * 90000) | indent(900000) }}",
    "{{ ([1] * 90000) | tojson(indent=900000) }}",
    "{{ [0] * 10000000000 }}",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


def template_of(tmp_path, text):
    (tmp_path / "own.jinja").write_text(text)
    return TemplateConfig(chat_template=str(tmp_path / "own.jinja"))


@pytest.mark.parametrize("text", [*map(loop, GROWING), *(text + CONTENT for text in HUGE)])
def test_a_template_that_grows_without_bound_is_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"own.jinja': it (makes|gives|pads|computes|indents)"):
        load_tokenizer("demo", template_of(tmp_path, text))


@pytest.mark.parametrize(
    "text", [loop("{% for j in range(9999) %}{% endfor %}", 9999), MACROS + "{{ a39() }}" + CONTENT]
)
def test_a_template_that_computes_without_end_is_refused(tmp_path, text, monkeypatch):
    monkeypatch.setattr("jaxrlhf.data.template_limits.MAX_STEPS", 10_000)
    with pytest.raises(InputError, match=r"own.jinja': it takes more than 10,000 steps"):
        load_tokenizer("demo", template_of(tmp_path, text))


def test_a_template_that_loops_for_one_row_alone_ends_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrlhf.data.template_limits.MAX_STEPS", 10_000)
    text = "{% if messages | length > 1 %}" + loop("{% for j in range(9999) %}{% endfor %}", 9999) + "{% endif %}"
    tokenizer = load_tokenizer("demo", template_of(tmp_path, text + CONTENT))
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    with pytest.raises(InputError, match=r"chat template is refused: it takes more than 10,000 steps"):
        encode_prompts(tokenizer, [turns])


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/hostname' %}",
    ],
)
def test_a_template_reaches_no_object_or_file(tmp_path, text):
    tokenizer = load_tokenizer("demo", template_of(tmp_path, text + CONTENT))
    with pytest.raises(InputError, match=r"chat template refuses a conversation"):
        encode_prompts(tokenizer, ["hello"])


def test_the_operations_of_real_templates_stay_within_the_bounds(tmp_path):
    text = (
        "{% macro show(m) %}{{ m['content'].split('|')[-1].strip().replace('a', 'b') | indent(2) }}{% endmacro %}"
        "{% for m in messages | list %}{{ '<' ~ m.role ~ '>' + '%s' % m['role'][:1] * 2 }}{{ show(m) }}"
        "{{ {'k': [1, 2]} | tojson(indent=2) }}{{ ', '.join(['x', 'y']) }}{{ messages | map(attribute='role') | join }}"
        "{{ '{:>3}'.format(loop.index) }}{{ m.content }}{% endfor %}"
    )
    tokenizer = load_tokenizer("demo", template_of(tmp_path, text))
    shown = tokenizer.decode(encode_prompts(tokenizer, ["x|a c"])[0])
    assert shown == '<user>uub c{\n  "k": [\n    1,\n    2\n  ]\n}x, yuser  1x|a c'


def test_a_long_conversation_renders(tokenizer):
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 200} for i in range(401)]
    assert len(encode_prompts(tokenizer, [turns])[0]) > 401
