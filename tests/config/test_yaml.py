"""Settings in YAML files: read as flags are, under them, and written such that they come back equal."""

import os

import pytest
from example_settings import SFT, Pipeline, Step, Training, error_of, flags, yaml_file

from jaxrlhf.config import load_yaml, read_yaml, save_yaml, to_dict
from jaxrlhf.config.files import read_json
from jaxrlhf.errors import InputError

YAML = """
data-path: [a.jsonl, "b,c.jsonl"]
data_split: 2,4,4
lr: 1e-4
dtype: none
remat: no
max_steps: 7
weights: [-1, 2]
config_overrides: {hidden_size: 64, act: gelu, eps: 1e-6, name: "64"}
specs: {length: 8}
"""


def test_yaml_reads_as_flags_do_and_flags_win(tmp_path):
    path = yaml_file(tmp_path, YAML)
    config = flags("--config", path, "--max_steps", "9", "--learning-rate", "2e-4")
    assert config == SFT.create(
        data_path=("a.jsonl", "b,c.jsonl"),
        data_split=(2, 4, 4),
        learning_rate=2e-4,
        remat=False,
        max_steps=9,
        weights=(-1.0, 2.0),
        config_overrides={"hidden_size": 64, "act": "gelu", "eps": 1e-6, "name": "64"},
        specs=("length:8",),
    )
    assert flags("--max_steps=9", f"--config={path}", "--lr", "2e-4") == config  # in any order
    assert flags("--config", yaml_file(tmp_path, "")) == SFT()


def test_sections_take_dotted_flags_and_yaml_mappings_over_their_own_defaults(tmp_path):
    path = yaml_file(tmp_path, "output_dir: runs/x\nsft:\n  lr: 1e-3\n  max-steps: 5\nppo.max_steps: 6\n")
    config = flags("--config", path, "--sft.max_steps", "8", "--sft.no_remat", config=Pipeline)
    assert config.sft == Step(Training(learning_rate=1e-3, max_steps=8, remat=False))
    assert config.ppo == Step(Training(learning_rate=1e-5, max_steps=6))
    assert config.data.data_path == ("demo",)
    assert flags("--output_dir", "x", config=Pipeline) == Pipeline("x")
    assert flags("--config", yaml_file(tmp_path, "output_dir: x\nsft:\n"), config=Pipeline) == Pipeline("x")


ODD = {
    "data_path": ("null", "a,b", "", " x ", "1e5", "yes", "多\n", "#x", "a: b", "-1"),
    "data_split": (1, 2, 3),
    "prompt_template": "none",
    "learning_rate": 1e-30,
    "offset": -1e9,
    "dtype": "bfloat16",
    "remat": False,
    "max_steps": 3,
    "system": "none",
    "weights": (1.0, -0.5),
    "config_overrides": {
        "a": "1",
        "b": 1,
        "c": 1.0,
        "d": "true",
        "e": False,
        "1": "null",
        "f": "1_0",
        "g": ".5",
        "h": 1e30,
        "i": "no",
        "j": "1e5",
        "k": "Human: {prompt}\n\nAssistant: {response}\n",
    },
}


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "config",
    [
        SFT(),
        SFT.create(**ODD),
        SFT.create(system="", prompt_template="Human: {prompt}\n\nAssistant: {response}\n"),
        Pipeline.create(output_dir="2024", sft={"weights": (2,)}, ppo={"max_steps": 2}),
    ],
)
def test_save_then_load_is_identity(tmp_path, config):
    save_yaml(config, tmp_path / "config.yaml")
    for loaded in (
        load_yaml(type(config), tmp_path / "config.yaml"),
        flags("--config", str(tmp_path / "config.yaml"), config=type(config)),
        type(config).create(**to_dict(config)),
    ):
        assert loaded == config
        assert repr(loaded) == repr(config) or "2024" in repr(config)  # 1 and 1.0 and True are equal but not the same


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("max_stps: 3", ["unknown setting max_stps", "did you mean max_steps?"]),
        ("max_steps: many", ["max_steps='many'", "whole number"]),
        ("max_steps: 0", ["max_steps=0", "at least 1"]),
        ("max_steps: [1]", ["max_steps", "one value", "1"]),
        ("max_steps: [[1]]", ["max_steps", "nested"]),
        ("data_path: [[a]]", ["data_path", "nested"]),
        ("learning_rate:", ["learning_rate=''", "a number"]),
        ("remat: maybe", ["remat='maybe'", "true or false"]),
        ("dtype: fp8", ["dtype='fp8'", "float32, bfloat16"]),
        ("no_remat: true", ["unknown setting no_remat", "did you mean remat"]),
        ("lr: 1\nlearning_rate: 2", ["learning_rate is given twice"]),
        ("learning_rate: 2\nlr: 1", ["learning_rate is given twice", "lr"]),
        ("max_steps: 1\nmax-steps: 2", ["max_steps is given twice"]),
        ("max_steps: 1\nmax_steps: 2", ["not valid YAML", "'max_steps' occurs twice", "line 2"]),
        ("max_steps: {a: 1}", ["max_steps", "nested"]),
        ("- a", ["found a list"]),
        ("text", ["found a str"]),
        ("a: [1", ["not valid YAML", "line"]),
        ("a: \0", ["not valid YAML"]),
        ("[" * 5000, ["not valid YAML"]),
        ("x: !!python/object:os.system {}", ["x"]),
        ("1: 2", ["unknown setting 1"]),
        ("a: &a [*a]", ["not valid YAML", "references"]),
        (LAUGHS, ["not valid YAML", "more than 100,000 values"]),
        ("a: " + "[" * 120 + "]" * 120, ["not valid YAML", "nested"]),
    ],
)  # fmt: skip
def test_mistakes_in_yaml_name_file_key_and_value(tmp_path, text, parts):
    path = yaml_file(tmp_path, text)
    message = error_of("--config", path)
    assert all(part in message for part in [path, *parts]), message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": ' * 101 + "1" + "}" * 101, "nested more than 100 deep"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 100 deep"),
        ('{"a": ' + "9" * 5000 + "}", "thousands of digits"),
        ('{"a": "\\ud800"}', r"\\ud800, half of a surrogate pair"),
        ("[1]", "must hold a JSON object"),
    ],
)
def test_json_beyond_the_bounds_is_refused_with_the_reason(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=rf"a\.json.*{reason}"):
        read_json(tmp_path / "a.json")


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    (tmp_path / "device").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for name, what in (("device", "a device"), ("pipe", "a pipe"), ("", "a folder")):
        for reader in (read_json, read_yaml):
            with pytest.raises(InputError, match=what):
                reader(tmp_path / name)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"a: \xff\xfe")
    assert "run.yaml" in error_of("--config", str(tmp_path / "run.yaml"))
    assert str(tmp_path) in error_of("--config", str(tmp_path))
