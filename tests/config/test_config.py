"""Settings: flags and YAML say the same thing, flags win, and mistakes are named with the nearest valid name."""

import dataclasses
import importlib
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from jaxrlhf import cli
from jaxrlhf.config import (
    Derived,
    Fraction,
    FromYaml,
    Lasting,
    Lt,
    MayChange,
    NonNegative,
    PositiveInt,
    Section,
    Settings,
    alias,
    check_needs,
    default_of,
    lasting,
    load_yaml,
    parse,
    save_yaml,
    settings,
    to_dict,
)
from jaxrlhf.errors import InputError


@dataclass(frozen=True)
class Data(Settings, may_change=True):
    """Data and tokenisation."""

    data_path: tuple[str, ...] = ()
    """Files or folders, 100% of each."""
    data_split: tuple[int, ...] = ()
    """Shares of the steps."""
    prompt_template: str = "Human: {prompt} Assistant: {response}"
    """Template."""
    seed: Lasting[int] = 0
    """Seed."""


def specs_of(given):
    return [f"{name}:{value}" for name, value in given.items()] if isinstance(given, dict) else given


@dataclass(frozen=True)
class Training(Settings):
    """Training loop."""

    learning_rate: Annotated[NonNegative, alias("lr")] = 1e-4
    """Peak learning rate."""
    offset: float = 0.0
    """Any number."""
    lr_scheduler_type: Literal["linear", "cosine"] = "cosine"
    """Schedule."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """Stage."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype."""
    remat: bool = True
    """Rematerialise."""
    max_steps: MayChange[PositiveInt | None] = None
    """Steps."""
    share: Fraction = 0.5
    """Share of something."""
    system: str | None = None
    """Text, or none."""
    weights: tuple[float, ...] = ()
    """Weights."""
    config_overrides: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Overrides of the model's config."""
    specs: Annotated[tuple[str, ...], FromYaml(specs_of)] = ()
    """Written as a mapping in YAML."""
    rows: Derived[int] = 1
    """Taken from elsewhere."""


@dataclass(frozen=True)
class SFT(Settings):
    """Supervised fine-tuning."""

    HIDDEN = frozenset({"zero_stage"})

    data: Data = Data()
    training: Training = Training()
    loss_on: Literal["response", "all"] = "response"
    """Counted tokens."""

    def check(self) -> None:
        if self.loss_on == "all" and self.data.seed == 13:
            raise InputError("loss_on=all and seed=13 exclude each other")


@dataclass(frozen=True)
class Step(Settings):
    """A step of the run."""

    training: Training = Training(learning_rate=3e-4)


@dataclass(frozen=True)
class Pipeline(Settings):
    """Two steps."""

    output_dir: str
    """Run folder."""
    data: Data = Data(data_path=("demo",))
    sft: Section[Step] = Step()
    ppo: Section[Step] = Step(Training(learning_rate=1e-5))


def flags(*argv, config=SFT):
    return parse(config, list(argv), "jaxrlhf sft", "Fine-tune.")


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
        (["--lr", "2e-5"], "learning_rate", 2e-5),
        (["--offset", "-2e-5"], "offset", -2e-5),
        (["--max_steps", "12"], "max_steps", 12),
        (["--max_steps", "1e3"], "max_steps", 1000),
        (["--max_steps", "5", "--max_steps", "none"], "max_steps", None),
        (["--max_steps", "5", "--max-steps", "6"], "max_steps", 6),
        (["--seed", "-3"], "seed", -3),
        (["--remat"], "remat", True),
        (["--no_remat"], "remat", False),
        (["--no-remat"], "remat", False),
        *((["--remat", word], "remat", True) for word in ("true", "yes", "on", "1", "True")),
        *((["--remat", word], "remat", False) for word in ("false", "no", "off", "0", "FALSE")),
        (["--data_split", "2,4,4"], "data_split", (2, 4, 4)),
        (["--data-split", "2", "4", "4"], "data_split", (2, 4, 4)),
        (["--data_split", "2,", "4"], "data_split", (2, 4)),
        (["--weights", "-1", "-2.5"], "weights", (-1.0, -2.5)),
        (["--weights", "-1,-.5"], "weights", (-1.0, -0.5)),
        (["--data_path", "a.jsonl", "b.jsonl"], "data_path", ("a.jsonl", "b.jsonl")),
        (["--data_path", "a.jsonl,b.jsonl"], "data_path", ("a.jsonl", "b.jsonl")),
        (["--data_path", "-a", "- b", "-1"], "data_path", ("-a", "- b", "-1")),
        (["--data_path", ""], "data_path", ()),
        (["--data_path"], "data_path", ()),
        (["--prompt_template=--x {prompt} a=b"], "prompt_template", "--x {prompt} a=b"),
        (["--prompt_template", "- {prompt}"], "prompt_template", "- {prompt}"),
        (["--prompt_template=none"], "prompt_template", "none"),
        (["--prompt_template="], "prompt_template", ""),
        (["--system", "Be kind."], "system", "Be kind."),
        (["--system", "none"], "system", None),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--dtype", "null"], "dtype", None),
        (
            ["--config_overrides", "hidden_size=64,act=gelu,eps=1e-6,tied=true,url=a=b"],
            "config_overrides",
            {"hidden_size": 64, "act": "gelu", "eps": 1e-6, "tied": True, "url": "a=b"},
        ),
        (["--config_overrides", "a=1", "b=-2"], "config_overrides", {"a": 1, "b": -2}),
        (["--config_overrides", "none"], "config_overrides", {}),
    ],
)
def test_flags_are_read_by_type(argv, name, expected):
    value = flags(*argv).value(name)
    assert value == expected and repr(value) == repr(expected)


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


# ---- composition


def test_flat_names_reach_settings_wherever_they_lie():
    config = SFT.create(data_path=["a"], lr=1e-3, loss_on="all")
    assert config == SFT(Data(data_path=("a",)), Training(learning_rate=1e-3), "all")
    again = config.replace(max_steps=3)
    assert (again.training.max_steps, again.training.learning_rate, again.data) == (3, 1e-3, config.data)
    assert config.training.max_steps is None
    assert dict(again.items()).items() >= {"max_steps": 3, "loss_on": "all", "seed": 0}.items()
    assert default_of(Pipeline, "data_path") == ("demo",) and default_of(SFT, "data_path") == ()
    nested = Pipeline.create(output_dir="x", sft={"max_steps": 4}, ppo=Step())
    assert nested.sft == Step(Training(learning_rate=3e-4, max_steps=4)) and nested.ppo == Step()
    assert nested.replace(ppo={"lr": 1.0}).ppo == Step(Training(learning_rate=1.0))
    assert SFT.create(config_overrides={"n": "1"}).value("config_overrides") == {"n": "1"}


def test_mutable_defaults_are_not_shared():
    flags().training.config_overrides["a"] = 1
    Training().config_overrides["a"] = 1
    assert Training().config_overrides == {}


def test_derived_and_hidden_settings_are_neither_flags_nor_keys(tmp_path):
    assert not {"rows", "zero_stage"} & set(settings(SFT)) and "zero_stage" in settings(Step)
    assert not {"rows", "zero_stage"} & set(to_dict(SFT()))
    assert Training.create(rows=3).rows == 3
    for name in ("rows", "zero_stage"):
        assert name in error_of(f"--{name}", "2")
        assert name in error_of("--config", yaml_file(tmp_path, f"{name}: 2"))
    with pytest.raises(InputError, match="zero_stage"):
        SFT.create(zero_stage=2)


def test_what_a_resumed_run_may_change_is_left_out_of_lasting():
    assert set(settings(SFT)) - set(lasting(SFT())) == {"data_path", "data_split", "prompt_template", "max_steps"}


def test_an_option_without_what_it_needs_is_refused():
    needs = {"share": "system"}
    check_needs(SFT(), needs)
    check_needs(SFT.create(share=0.1, system="x"), needs)
    with pytest.raises(InputError, match=r"share=0\.1 requires system"):
        check_needs(SFT.create(share=0.1), needs)


# ---- files


ODD = {
    "data_path": ("null", "a,b", "", " x ", "1e5", "yes", "多\n", "#x", "a: b", "-1"),
    "data_split": (1, 2, 3),
    "prompt_template": "none",
    "learning_rate": 1e-30,
    "offset": float("-inf"),
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


REQUIRED = {
    "sample": {"model_name_or_path": "m", "output_file": "x.jsonl", "reward_model_name_or_path": "r"},
    "chat": {"model": "m"},
    "convert": {"input": "a", "output": "b"},
    "plan": {"device": "a100-80g", "actor": "opt-125m"},
    "grpo": {"samples_per_prompt": 4},
    "rloo": {"samples_per_prompt": 4},
}


@pytest.mark.parametrize("name", list(cli.commands()))
def test_every_command_s_settings_come_back_from_a_file_and_show_in_help(name, tmp_path, capsys):
    command = cli.commands()[name]
    kind = command.config
    if isinstance(kind, str):
        kind = getattr(importlib.import_module(command.module), kind)
    config = kind.create(**REQUIRED.get(name, {}))
    save_yaml(config, tmp_path / "config.yaml")
    assert load_yaml(kind, tmp_path / "config.yaml") == config == kind.create(**to_dict(config))
    with pytest.raises(SystemExit):
        flags("--help", config=kind)
    page = capsys.readouterr().out
    assert "--config FILE.yaml" in page
    assert all(f"--{flag}" in page for flag in settings(kind))


# ---- mistakes


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--learing_rate", "1"], ["learing_rate", "did you mean learning_rate?"]),
        (["--learning_rat", "1"], ["learning_rat;", "did you mean learning_rate"]),  # no abbreviations
        (["--lrr", "1"], ["lrr", "did you mean lr"]),
        (["--zzz"], ["unknown setting zzz", "--help"]),
        (["--kl_coef", "0.1"], ["unknown setting kl_coef"]),  # a flag of another command
        (["--no_max_steps"], ["max_steps"]),
        (["--max_steps", "1.5"], ["max_steps='1.5'", "whole number"]),
        (["--max_steps", "many"], ["max_steps='many'", "whole number"]),
        (["--max_steps", "true"], ["max_steps='true'"]),
        (["--max_steps", "inf"], ["max_steps='inf'", "whole number"]),
        (["--offset", "9" * 400], ["offset='9", "a number"]),
        (["--learning_rate", "fast"], ["learning_rate='fast'", "a number"]),
        (["--offset", "nan"], ["offset='nan'", "a number"]),
        (["--learning_rate"], ["learning_rate", "one value"]),
        (["--learning_rate", "1", "2"], ["learning_rate", "one value", "1 2"]),
        (["--learning_rate", "none"], ["learning_rate='none'"]),
        (["--remat", "maybe"], ["remat='maybe'", "true or false"]),
        (["--no_remat", "true"], ["no_remat", "did you mean remat"]),
        (["--lr_scheduler_type", "cos"], ["lr_scheduler_type='cos'", "linear, cosine"]),
        (["--dtype", "fp8"], ["dtype='fp8'", "float32, bfloat16"]),
        (["--data_split", "2,x"], ["data_split='x'", "whole number"]),
        (["--config_overrides", "x"], ["config_overrides", "'x'", "key=value"]),
        (["--max_steps", "0"], ["max_steps=0", "at least 1"]),
        (["--learning_rate", "-1"], ["learning_rate=-1.0", "at least 0"]),
        (["--learning_rate", "inf"], ["learning_rate=inf", "finite"]),
        (["--share", "1.5"], ["share=1.5", "at least 0 and at most 1"]),
        (["--loss_on", "all", "--seed", "13"], ["loss_on=all", "seed=13"]),
        (["--config"], ["--config", "got 0: none"]),
        (["--config", "a.yaml", "b.yaml"], ["--config", "got 2: a.yaml b.yaml"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file or directory"]),
        (["--config", "a\0b.yaml"], ["null byte"]),
        (["train", "--seed", "1"], ["unexpected argument 'train'"]),
        (["--help", "nope"], ["--help nope", "sections"]),
    ],
)  # fmt: skip
def test_mistakes_in_flags_name_flag_value_and_what_is_expected(argv, parts):
    message = error_of(*argv)
    assert all(part in message for part in parts), message


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
    ],
)  # fmt: skip
def test_mistakes_in_yaml_name_file_key_and_value(tmp_path, text, parts):
    path = yaml_file(tmp_path, text)
    message = error_of("--config", path)
    assert all(part in message for part in [path, *parts]), message


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"a: \xff\xfe")
    assert "run.yaml" in error_of("--config", str(tmp_path / "run.yaml"))
    assert str(tmp_path) in error_of("--config", str(tmp_path))


def test_all_missing_and_all_unknown_are_reported_together():
    @dataclass(frozen=True)
    class Two(Settings):
        """Two required values."""

        data_path: str
        model_name_or_path: str

    assert "data_path, model_name_or_path" in error_of(config=Two)
    assert len(error_of("--a1", "--b1", config=Two).splitlines()) == 2


def test_errors_around_sections_say_where(tmp_path):
    stray = error_of("--output_dir", "x", "--max_steps", "3", config=Pipeline)
    assert "max_steps" in stray and stray.endswith("did you mean sft.max_steps or ppo.max_steps?")
    for config in (("--ppo.max_steps", "0"), ("--config", yaml_file(tmp_path, "ppo: {max_steps: 0}"))):
        message = error_of("--output_dir", "x", *config, config=Pipeline)
        assert "in section ppo: max_steps=0" in message
    with pytest.raises(InputError, match="in section ppo: max_steps=0"):
        Pipeline.create(output_dir="x", ppo={"max_steps": 0})
    assert "in section ppo: unknown setting max_stps" in error_of("--ppo.max_stps", "0", config=Pipeline)
    assert "sft is a section" in error_of("--output_dir", "x", "--sft", "3", config=Pipeline)
    assert "sft is a section" in error_of("--config", yaml_file(tmp_path, "sft: [1]"), config=Pipeline)
    assert "output_dir" in error_of("--sft.lr", "1", config=Pipeline)
    assert "max_steps is given twice" in error_of(
        "--config", yaml_file(tmp_path, "sft.max_steps: 1\nsft: {max_steps: 2}"), config=Pipeline
    )


@pytest.mark.parametrize(
    "values",
    [
        {"max_steps": 1.5},
        {"max_steps": 0},
        {"remat": 1},
        {"learning_rate": True},
        {"learning_rate": "fast"},
        {"prompt_template": 3},
        {"dtype": "fp8"},
        {"share": 2},
        {"weights": ("a",)},
        {"max_stps": 1},
    ],
)
def test_create_and_replace_refuse_what_flags_refuse(values):
    for build in (SFT.create, SFT().replace):
        with pytest.raises(InputError, match=next(iter(values))):
            build(**values)


def test_ranges_of_an_optional_setting_hold_for_its_member_alone():
    @dataclass(frozen=True)
    class Cap(Settings):
        """A cap."""

        cap: Annotated[float, Lt(1)] | None = None

    assert Cap(0.5).cap == 0.5 and Cap().cap is None
    with pytest.raises(InputError, match=r"cap=1\.0"):
        Cap(1.0)
    with pytest.raises(InputError, match="cap=2"):
        dataclasses.replace(Cap(), cap=2)


# ---- help


def help_of(capsys, *argv, config=SFT):
    with pytest.raises(SystemExit) as stop:
        flags(*argv, config=config)
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_groups_settings_by_part_with_docs_and_defaults(capsys):
    page = help_of(capsys, "--seed", "1", "--help", "--lr", "1")
    places = [page.index(words) for words in ("--loss_on", "Data and tokenisation.", "--data_path", "Training loop.")]
    assert places == sorted(places)
    for part in (
        "Fine-tune.",
        "--config FILE.yaml",
        "Files or folders, 100% of each.",
        "Peak learning rate. (default: 0.0001)",
        "--lr",
        "{linear,cosine} Schedule. (default: cosine)",
        "--remat, --no_remat Rematerialise. (default: True)",
        "Overrides of the model's config.",
    ):
        assert part in page, part
    assert "--zero_stage" not in page and "--rows" not in page


def test_help_of_a_section_shows_its_flags_with_its_defaults(capsys):
    overview = help_of(capsys, "-h", config=Pipeline)
    assert "--sft.FLAG" in overview and "--help sft" in overview and "(required)" in overview
    assert "learning_rate" not in overview
    page = help_of(capsys, "--help", "sft", config=Pipeline)
    assert "--sft.FLAG" in page and "Peak learning rate. (default: 0.0003)" in page
    assert "sft, ppo" in error_of("--help", "nope", config=Pipeline)
