"""Configs: flags and YAML say the same thing, flags win, and mistakes are named with the nearest valid name."""

import dataclasses
from typing import Literal

import pytest

from jaxrlhf.config import REQUIRED, field, from_dict, help_text, load_yaml, parse, save_yaml, to_dict
from jaxrlhf.errors import InputError


@dataclasses.dataclass(frozen=True)
class Data:
    """Data and tokenisation.

    More words that are no title.
    """

    data_path: tuple[str, ...] = field(REQUIRED, "Files or folders, 100% of each.")
    data_split: tuple[int, int, int] | None = field(None, "Shares of the steps.")
    prompt_template: str = field("Human: {prompt} Assistant: {response}", "Template.")


@dataclasses.dataclass(frozen=True)
class Training:
    """Training loop."""

    learning_rate: float = field(1e-4, "Peak learning rate.", aliases=("lr",))
    lr_scheduler_type: str = field("cosine", "Schedule.", choices=("linear", "cosine"))
    dtype: Literal["float32", "bfloat16"] | None = field(None, "Compute dtype.")
    remat: bool = field(True, "Rematerialise.")
    max_steps: int | None = field(None, "Steps.")
    lora_targets: tuple[str, ...] = field(("query", "value"), "Modules.", choices=("query", "key", "value"))
    config_overrides: dict[str, str | int | float | bool] = field({}, "Overrides of the model's config.")

    def __post_init__(self):
        if self.max_steps is not None and self.max_steps < 1:
            raise InputError(f"max_steps is {self.max_steps}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class SFT(Data, Training):
    """Supervised fine-tuning."""

    loss_on: str = field("response", "Counted tokens.", choices=("response", "all"))


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Three steps."""

    output_dir: str = field(REQUIRED, "Run folder.")
    sft: SFT = field(SFT(data_path=("demo",), learning_rate=3e-4), "First step.")
    ppo: Training = field(Training(learning_rate=1e-5), "Third step.")


def flags(*argv, config=SFT):
    return parse(config, list(argv), "jaxrlhf sft", "Fine-tune.")


def with_data(*argv):
    return flags("--data_path", "a", *argv)


def yaml_file(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def error_of(*argv, config=SFT):
    with pytest.raises(InputError) as caught:
        flags(*argv, config=config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("argv", "name", "expected"),
    [
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning-rate=3"], "learning_rate", 3.0),
        (["--lr", "-2e-5"], "learning_rate", -2e-5),
        (["--max_steps", "12"], "max_steps", 12),
        (["--max_steps", "1e3"], "max_steps", 1000),
        (["--max_steps", "5", "--max_steps", "none"], "max_steps", None),
        (["--remat"], "remat", True),
        (["--remat", "false"], "remat", False),
        (["--no_remat"], "remat", False),
        (["--no-remat"], "remat", False),
        (["--data_split", "2,4,4"], "data_split", (2, 4, 4)),
        (["--data-split", "2", "4", "4"], "data_split", (2, 4, 4)),
        (["--data_path", "a.jsonl", "b.jsonl"], "data_path", ("a.jsonl", "b.jsonl")),
        (["--data_path", "a.jsonl,b.jsonl"], "data_path", ("a.jsonl", "b.jsonl")),
        (["--lora_targets", ""], "lora_targets", ()),
        (["--prompt_template=--x {prompt} a=b"], "prompt_template", "--x {prompt} a=b"),
        (["--prompt_template=none"], "prompt_template", "none"),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--dtype", "null"], "dtype", None),
        (
            ["--config_overrides", "hidden_size=64,act=gelu,eps=1e-6,tied=true"],
            "config_overrides",
            {"hidden_size": 64, "act": "gelu", "eps": 1e-6, "tied": True},
        ),
        (["--config_overrides", "a=1", "b=2"], "config_overrides", {"a": 1, "b": 2}),
    ],
)
def test_flags_are_read_by_type(argv, name, expected):
    value = getattr(with_data(*argv), name)
    assert value == expected and type(value) is type(expected)


YAML = """
data-path: [a.jsonl, "b,c.jsonl"]
data_split: 2,4,4
lr: 1e-4
dtype: none
remat: no
max_steps: 7
lora_targets: [key]
config_overrides: {hidden_size: 64, act: gelu, eps: 1e-6, name: "64"}
"""


def test_yaml_reads_as_flags_do_and_flags_win(tmp_path):
    path = yaml_file(tmp_path, YAML)
    config = flags("--config", path, "--max_steps", "9", "--learning-rate", "2e-4")
    assert config == SFT(
        data_path=("a.jsonl", "b,c.jsonl"),
        data_split=(2, 4, 4),
        learning_rate=2e-4,
        remat=False,
        max_steps=9,
        lora_targets=("key",),
        config_overrides={"hidden_size": 64, "act": "gelu", "eps": 1e-6, "name": "64"},
    )
    assert flags("--max_steps=9", f"--config={path}", "--lr", "2e-4") == config  # in any order


def test_sections_take_dotted_flags_and_yaml_mappings_over_their_own_defaults(tmp_path):
    path = yaml_file(tmp_path, "output_dir: runs/x\nsft:\n  lr: 1e-3\n  max-steps: 5\nppo.max_steps: 6\n")
    config = flags("--config", path, "--sft.max_steps", "8", "--sft.no_remat", config=Pipeline)
    assert config.sft == SFT(data_path=("demo",), learning_rate=1e-3, max_steps=8, remat=False)
    assert config.ppo == Training(learning_rate=1e-5, max_steps=6)


@pytest.mark.parametrize(
    "config",
    [
        SFT(data_path=("a",)),
        SFT(
            data_path=("null", "a,b", "", " x ", "1e5", "yes", "多\n", "#x", "a: b"),
            data_split=(1, 2, 3),
            prompt_template="none",
            learning_rate=1e-30,
            dtype="bfloat16",
            remat=False,
            max_steps=3,
            lora_targets=(),
            config_overrides={
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
            },
        ),
        SFT(data_path=(), learning_rate=float("inf"), prompt_template="Human: {prompt}\n\nAssistant: {response}\n"),
        Pipeline(output_dir="2024", sft=SFT(data_path=("x",), lora_targets=("key",)), ppo=Training(max_steps=2)),
    ],
)
def test_save_then_load_is_identity(tmp_path, config):
    save_yaml(config, tmp_path / "config.yaml")
    for loaded in (
        load_yaml(type(config), tmp_path / "config.yaml"),
        flags("--config", str(tmp_path / "config.yaml"), config=type(config)),
        from_dict(type(config), to_dict(config)),
    ):
        assert loaded == config
        assert repr(loaded) == repr(config)  # 1 and 1.0 and True are equal but not the same


PAIRS = "key=value,key=value"
KEYS = "values, each one of query, key, value"
SPLIT = "3 values separated by spaces or commas, each a whole number, or none"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learing_rate", "1"], "unknown flag --learing_rate; did you mean --learning_rate?"),
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),  # no abbreviations
        (["--zzz"], "unknown flag --zzz; see --help for all of them"),
        (["--no_max_steps"], "unknown flag --no_max_steps; did you mean --max_steps?"),
        (["--max_steps", "1.5"], "--max_steps: expected a whole number or none, got '1.5'"),
        (["--max_steps", "many"], "--max_steps: expected a whole number or none, got 'many'"),
        (["--learning_rate", "fast"], "--learning_rate: expected a number, got 'fast'"),
        (["--learning_rate", "nan"], "--learning_rate: expected a number, got 'nan'"),
        (["--learning_rate"], "--learning_rate needs a value: a number"),
        (["--learning_rate", "1", "2"], "--learning_rate takes one value (a number), got 2: 1 2"),
        (["--remat", "maybe"], "--remat: expected true or false, got 'maybe'"),
        (["--no_remat", "true"], "--no_remat takes no value; use --remat true"),
        (["--lr_scheduler_type", "cos"], "--lr_scheduler_type: expected one of linear, cosine, got 'cos'"),
        (["--dtype", "fp8"], "--dtype: expected one of float32, bfloat16 or none, got 'fp8'"),
        (["--lora_targets", "key,mlp"], f"--lora_targets: expected {KEYS}, got 'key,mlp'"),
        (["--data_split", "2,4"], f"--data_split: expected {SPLIT}, got '2,4' (2 values)"),
        (["--data_split", "2,,4"], f"--data_split: expected {SPLIT}, got '2,,4' (an element is empty)"),
        (["--config_overrides", "x"], f"--config_overrides: expected {PAIRS}, got 'x' ('x' is not key=value)"),
        (["--max_steps", "0"], "max_steps is 0; it must be at least 1"),
        (["--config"], "--config takes one YAML file, got 0: none"),
        (["--config", "nowhere.yaml"], "cannot read the config file nowhere.yaml: No such file or directory"),
    ],
)  # fmt: skip
def test_mistakes_in_flags_name_flag_value_and_what_is_expected(argv, message):
    assert error_of("--data_path", "a", *argv) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_stps: 3", "unknown setting max_stps in {path}; did you mean max_steps?"),
        ("max_steps: many", "max_steps in {path}: expected a whole number or none, got 'many'"),
        ("max_steps: [1]", "max_steps in {path}: expected a whole number or none, got ['1']"),
        ("learning_rate:", "learning_rate in {path}: expected a number, got nothing"),
        ("no_remat: true", "unknown setting no_remat in {path}; did you mean remat?"),
        ("lr: 1\nlearning_rate: 2", "learning_rate in {path}: given twice, it is another name of learning_rate"),
        ("max_steps: 1\nmax-steps: 2", "max_steps is given twice"),
        ("- a", "{path} must hold 'flag_name: value' lines, found a list"),
        ("max_steps: {a: 1}", "max_steps in {path}: expected a whole number or none, got {'a': '1'}"),
    ],
)
def test_mistakes_in_yaml_name_file_key_and_value(tmp_path, text, message):
    path = yaml_file(tmp_path, text)
    assert error_of("--config", path, "--data_path", "a") == message.replace("{path}", path)


@pytest.mark.parametrize("text", ["max_steps: 1\nmax_steps: 2", "a: [1", "x: !!python/object:os.system {}"])
def test_malformed_yaml_is_refused_with_the_file_and_line(tmp_path, text):
    path = yaml_file(tmp_path, text)
    message = error_of("--config", path)
    assert message.startswith(f"{path} is not valid YAML") and "line" in message


def test_all_missing_and_all_unknown_are_reported_together():
    @dataclasses.dataclass(frozen=True)
    class Two(Data):
        """Two required values."""

        model_name_or_path: str = field(REQUIRED, "Model.")

    assert "--data_path, --model_name_or_path" in error_of(config=Two)
    assert len(error_of("--a1", "--b1", config=Two).splitlines()) == 2


def test_errors_around_sections_say_where():
    assert error_of("--output_dir", "x", "--max_steps", "3", config=Pipeline).endswith(
        "did you mean --sft.max_steps or --ppo.max_steps?"
    )
    assert error_of("--output_dir", "x", "--ppo.max_steps", "0", config=Pipeline).startswith(
        "in section ppo: max_steps"
    )
    assert "--sft is a section" in error_of("--output_dir", "x", "--sft", "3", config=Pipeline)
    assert error_of("--sft.lr", "1", config=Pipeline).startswith("missing required settings: --output_dir")


def test_a_stray_word_is_refused():
    assert error_of("train", "--data_path", "a") == "unexpected argument 'train': settings are given as --flag value"


def test_from_dict_keeps_types_and_refuses_wrong_ones():
    assert SFT.create(**{"data_path": ["a"], "config_overrides": {"n": "1"}}).config_overrides == {"n": "1"}
    for values in ({"max_steps": 1.5}, {"remat": 1}, {"learning_rate": True}, {"prompt_template": 3}):
        with pytest.raises(InputError, match=f"{next(iter(values))}: expected"):
            SFT.create(**{"data_path": ["a"], **values})


def test_mutable_defaults_are_not_shared():
    with_data().config_overrides["a"] = 1
    assert with_data().config_overrides == {}


def test_help_groups_by_declaring_class_and_wraps(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    with pytest.raises(SystemExit) as stop:
        flags("--data_path", "a", "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 70
    order = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert order == ["General", "Supervised fine-tuning", "Data and tokenisation", "Training loop"]
    words = " ".join(text.split())
    for part in (
        "--data_path TEXT ... Files or folders, 100% of each. (required)",
        "--data_split INT,INT,INT Shares of the steps. (default: none)",
        "--learning_rate FLOAT Peak learning rate. (also --lr) (default: 0.0001)",
        "--lr_scheduler_type {linear,cosine} Schedule. (default: cosine)",
        "--dtype {float32,bfloat16} Compute dtype. (default: none)",
        "--remat true|false Rematerialise. (default: true)",
        "--config_overrides KEY=VALUE,... Overrides of the model's config. (default: empty)",
    ):
        assert part in words


def test_help_of_a_section_shows_its_flags_with_its_defaults():
    overview = help_text(Pipeline, "jaxrlhf rlhf", "All.")
    assert "--sft.FLAG" in overview and "jaxrlhf rlhf --help sft" in " ".join(overview.split())
    assert "learning_rate" not in overview
    words = " ".join(help_text(Pipeline, "jaxrlhf rlhf", "All.", "sft").split())
    assert "--sft.learning_rate FLOAT Peak learning rate. (also --lr) (default: 0.0003)" in words
    assert "--sft.data_path TEXT ... Files or folders, 100% of each. (default: demo)" in words
    assert (
        error_of("--help", "nope", config=Pipeline)
        == "--help nope: there is no section of that name; sections are sft, ppo"
    )
