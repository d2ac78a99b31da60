"""Contents made by hand: programs in data, ways out of a folder, loops without an end, bombs."""

from __future__ import annotations

import bz2
import gzip
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Change = Callable[[Path], None]


class Attack(NamedTuple):
    """A content by name. `harmless`: a reader may accept it, such as code that it never runs."""

    name: str
    content: str | Change
    harmless: bool = False


def changed(name: str, harmless: bool = False, **values: Any) -> Attack:
    """Values set in a JSON file."""

    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return Attack(name, change, harmless)


class Touch:
    """Unpickled by pickle itself, this makes a file EXECUTED beside the pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.folder}/EXECUTED",)


def _pickled(make: Callable[[Path], Any], torch_format: bool) -> Change:
    def change(path: Path) -> None:
        value = make(path.parent)
        if torch_format:
            import torch

            torch.save(value, path)
        else:
            path.write_bytes(pickle.dumps(value))

    return change


def _tensor(make: Callable[[Any], Any]) -> Change:
    """A state dict whose embedding is what `make` returns."""

    def change(path: Path) -> None:
        import torch

        state = torch.load(path, weights_only=True)
        state["model.embed_tokens.weight"] = make(torch)
        torch.save(state, path)

    return change


def _zip_outside(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../EXECUTED", "x")


PICKLES = (
    Attack("pickle that runs a program", _pickled(Touch, False)),
    Attack("torch file that runs a program", _pickled(Touch, True)),
    Attack("program beside tensors", _pickled(lambda folder: {"a": Touch(folder)}, True)),
    Attack("pickle of eval", lambda path: _write(path, b"cbuiltins\neval\n(S'1'\ntR.")),
    Attack("pickle of a function", _pickled(lambda folder: json.dumps, True)),
    Attack("a list", _pickled(lambda folder: [1, 2], True)),
    Attack("a number", _pickled(lambda folder: 3, True)),
    Attack("an empty dict", _pickled(lambda folder: {}, True)),
    Attack("numbers by name", _pickled(lambda folder: {"a": 1}, True)),
    Attack("archive with ../", _zip_outside, harmless=True),
    Attack("sparse tensor", _tensor(lambda torch: torch.zeros(320, 16).to_sparse())),
    Attack("meta tensor", _tensor(lambda torch: torch.zeros(320, 16, device="meta"))),
    Attack("float8 tensor", _tensor(lambda torch: torch.zeros(320, 16).to(torch.float8_e4m3fn))),
    Attack(
        "quantised tensor",
        _tensor(lambda torch: torch.quantize_per_tensor(torch.zeros(320, 16), 1.0, 0, torch.qint8)),
    ),
    Attack("overflowing float64", _tensor(lambda torch: torch.full((320, 16), 1e300, dtype=torch.float64))),
    Attack("complex tensor", _tensor(lambda torch: torch.zeros(320, 16, dtype=torch.complex64))),
    Attack("scalar tensor", _tensor(lambda torch: torch.zeros(()))),
    Attack("not a tensor", _tensor(lambda torch: "text")),
    Attack("NaN weights", _tensor(lambda torch: torch.full((320, 16), float("nan")))),
)

CODE = "import pathlib\npathlib.Path(__file__).with_name('EXECUTED').touch()\nclass Evil:\n    pass\n"


def _with_code(**values: Any) -> Change:
    def change(path: Path) -> None:
        path.with_name("evil.py").write_text(CODE)
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change


CONFIGS = (
    Attack(
        "auto_map with code",
        _with_code(auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, trust_remote_code=True),
        harmless=True,
    ),
    Attack("another class with code", _with_code(architectures=["Evil"], auto_map={"AutoModel": "evil.Evil"})),
    changed("model_type is a list", model_type=["llama"]),
    changed("model_type is a path", model_type="../llama"),
    changed("rope_parameters is text", rope_parameters="text"),
    changed("yarn by NaN", rope_scaling={"rope_type": "yarn", "factor": float("nan")}, rope_parameters=None),
    changed("odd head_dim", head_dim=3),
    changed("hidden_size of 10^12", hidden_size=10**12),
    changed("10^7 layers", num_hidden_layers=10**7),
    changed("vocabulary of 10^9", vocab_size=10**9),
    changed("sizes of 10^9", intermediate_size=10**9, num_hidden_layers=10**4),
    changed("eps is NaN", rms_norm_eps=float("nan")),
    changed("eps is negative", rms_norm_eps=-1),
    changed("context of 10^9", max_position_embeddings=10**9, harmless=True),
    changed("quantised", quantization_config={"quant_method": "gptq"}),
)

INDEXES = (
    Attack("names a parent's file", '{"weight_map": {"a": "../model.safetensors"}}'),
    Attack("names an absolute path", '{"weight_map": {"a": "/etc/passwd"}}'),
    Attack("names a file below", '{"weight_map": {"a": "x/model.safetensors"}}'),
    Attack("names a windows path", '{"weight_map": {"a": "..\\\\model.safetensors"}}'),
    Attack("names dots", '{"weight_map": {"a": ".."}}'),
    Attack("names NUL", '{"weight_map": {"a": "a\\u0000b"}}'),
    Attack("names a long file", '{"weight_map": {"a": "%s"}}' % ("a" * 5000)),
    Attack("names a number", '{"weight_map": {"a": 3}}'),
    Attack("has an empty map", '{"weight_map": {}}'),
    Attack("has a list", '{"weight_map": ["a"]}'),
    Attack("lists what is not there", '{"weight_map": {"a": "model-00001-of-00003.safetensors"}}'),
)

TOKENIZERS = (
    Attack(
        "auto_map with code",
        _with_code(auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, trust_remote_code=True),
        harmless=True,
    ),
    Attack(
        "a class with code", _with_code(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}), True
    ),
    changed("class is a path", tokenizer_class="../Evil", harmless=True),
    changed("id of 2^40", added_tokens_decoder={str(2**40): {"content": "<x>"}}),
    changed("wrong type of lstrip", added_tokens_decoder={"0": {"content": "<x>", "lstrip": "text"}}),
    changed("template without text", chat_template=[{"name": "a"}]),
    changed("template is a number", chat_template={"a": 3}),
)

_MESSAGE = "{{ messages[0]['content'] }}"
_MACROS = (
    "{% macro a0() %}x{% endmacro %}"
    + "".join(f"{{% macro a{i}() %}}{{{{ a{i - 1}() }}}}{{{{ a{i - 1}() }}}}{{% endmacro %}}" for i in range(1, 60))
    + "{{ a59() }}"
)


def _loop(times: str, body: str) -> str:
    return f"{{% for i in range({times}) %}}{body}{{% endfor %}}"


def _grown(step: str) -> str:
    """A template that makes a text grow in each pass of a loop."""
    return "{% set n = namespace(x='x') %}" + _loop("60", step) + _MESSAGE


TEMPLATES = (
    Attack("endless loop", _loop("1000000000000", "") + _MESSAGE),
    Attack(
        "nested loops", "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}" + _MESSAGE
    ),
    Attack("loop over joined ranges", "{% for i in range(90000) | list * 90000 %}{% endfor %}" + _MESSAGE),
    Attack("huge output", _loop("99999", "{{ 'x' * 99999 }}") + _MESSAGE),
    Attack("huge text", "{{ 'x' * 10000000000 }}" + _MESSAGE),
    Attack("huge padding", "{{ 'x' | center(10000000000) }}" + _MESSAGE),
    Attack("huge format", "{{ '%9999999999d' % 1 }}" + _MESSAGE),
    Attack("huge format method", "{{ '{:>9999999999}'.format(1) }}" + _MESSAGE),
    Attack("huge power", "{{ 10 ** (10 ** 10) }}" + _MESSAGE),
    Attack("huge list", "{% set x = [0] * 10000000000 %}" + _MESSAGE),
    Attack("huge filler", "{{ lipsum(n=100000000) }}" + _MESSAGE),
    Attack("doubling", _grown("{% set n.x = n.x + n.x %}")),
    Attack("replacing", _grown("{% set n.x = n.x.replace('x', 'xx') %}")),
    Attack("endless macro", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + _MESSAGE),
    Attack("doubling by ~", _grown("{% set n.x = n.x ~ n.x %}")),
    Attack("doubling by a block", _grown("{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}")),
    Attack("doubling by join", _grown("{% set n.x = [n.x, n.x] | join %}")),
    Attack(
        "squaring",
        "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}" + _MESSAGE,
    ),
    Attack("wide indent", "{{ ('\n' * 90000) | indent(900000) }}" + _MESSAGE),
    Attack("wide JSON", "{{ ([1] * 90000) | tojson(indent=900000) }}" + _MESSAGE),
    Attack("computed width", "{{ '%*d' % (999999999, 1) }}{{ '{:{}}'.format(1, 99999999) }}" + _MESSAGE),
    Attack("macros that call each other", _MACROS + _MESSAGE),
    Attack("way out by class", "{{ ''.__class__.__mro__[1].__subclasses__() }}" + _MESSAGE),
    Attack("way out by globals", "{{ messages.__init__.__globals__ }}{{ cycler.__init__.__globals__.os.system('x') }}"),
    Attack("way out by format", "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}"),
    Attack("reads a file", "{% include '/etc/passwd' %}" + _MESSAGE),
    Attack("loses the content", "hello"),
    Attack("not closed", "{% for i in messages %}"),
    Attack("unknown filter", "{{ messages | nothing }}"),
    Attack("divides by zero", "{{ 1 // 0 }}"),
    Attack("nested deeply", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}" + _MESSAGE),
    Attack("many blocks", "{% if true %}" * 3000 + "x" + "{% endif %}" * 3000 + _MESSAGE),
)

ADAPTERS = (
    changed("rank pattern that explodes", rank_pattern={"(a+)+$": 4}),
    changed("alpha pattern that explodes", alpha_pattern={"(a|aa)+$": 4}),
    changed("pattern that is none", alpha_pattern={"(": 4}),
    changed("target pattern that explodes", target_modules="(a+)+$", harmless=True),
    changed("exclude pattern that explodes", exclude_modules="(a+)+$", harmless=True),
    changed("rank of 0", r=0),
    changed("rank is text", r="4"),
    changed("rank of 2.5", r=2.5),
    changed("alpha of 0", lora_alpha=0),
    changed("another kind", peft_type="PROMPT_TUNING"),
    changed("base is a path", base_model_name_or_path="../../../etc", harmless=True),
    changed("auto_mapping", auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}, harmless=True),
)

SAVED = (
    changed("file of the parent", _data_files=[{"filename": "../../rows.arrow"}]),
    changed("absolute file", _data_files=[{"filename": "/etc/passwd"}]),
    changed("file without a name", _data_files=[{}]),
    changed("no files", _data_files=[]),
)
SPLITS = (
    changed("split of the parent", splits=["../saved/train"]),
    changed("absolute split", splits=["/etc"]),
    changed("no splits", splits=[]),
)

_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
YAMLS = (
    Attack("python object", "!!python/object/apply:os.system ['touch EXECUTED']\n"),
    Attack("python name", "show: !!python/name:os.system\n"),
    Attack("python new", "show: !!python/object/new:tuple [[1]]\n"),
    Attack("unknown tag", "show: !evil 1\n"),
    Attack("billion laughs", _LAUGHS),
    Attack("list of laughs", "- " + _LAUGHS.replace("\n", "\n  ").rstrip() + "\n"),
    Attack("refers to itself", "show: &a [*a]\n"),
    Attack("list that refers to itself", "&a [*a]\n"),
    Attack("merge", "<<: {show: 1}\nnothing: 1\n"),
    Attack("nested deep", "a: " + "[" * 3000 + "]" * 3000 + "\n"),
    Attack("nested mappings", "a: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n"),
    Attack("number out of range", "show: 1e400\n"),
    Attack("huge integer", f"show: {'9' * 5000}\n"),
    Attack("NUL in a path", 'data_path: "a\\0b"\n'),
    Attack("surrogate in a path", 'data_path: "\\ud800"\n'),
    Attack("doubled key", "show: 1\nshow: 2\n"),
    Attack("list at the top", "- 1\n- 2\n"),
    Attack("nested value", "show: {a: {b: 1}}\n"),
    Attack("null key", "? null\n: 1\n"),
    Attack("complex key", "? [a, b]\n: 1\n"),
    Attack("two documents", "show: 1\n---\nshow: 2\n"),
    Attack("tabs", "\tshow: 1\n"),
    Attack("long key", "a" * 100_000 + ": 1\n"),
    Attack("a date", "show: 2020-01-01\n"),
)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _bomb(compress: Callable[[bytes], bytes], size: int = 300_000_000) -> Change:
    return lambda path: _write(path, compress(b"0" * size))


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.compress(data)


BOMBS: dict[str, Attack] = {
    ".gz": Attack("bomb", _bomb(lambda data: gzip.compress(data, 9))),
    ".bz2": Attack("bomb", _bomb(bz2.compress)),
    ".zst": Attack("bomb", _bomb(_zstd)),
}
