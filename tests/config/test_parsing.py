"""Settings from flags and in Python: read by type, reached by flat names, and mistakes named with the nearest name."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import pytest
from example_settings import SFT, Data, Pipeline, Step, Training, error_of, flags, yaml_file

from jaxrlhf import cli
from jaxrlhf.config import Lt, Settings, check_needs, default_of, lasting, settings, to_dict
from jaxrlhf.errors import InputError
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.trainers.sft import SFTConfig


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
        (
            ["--config_overrides", '{"a": 1, "b": "true", "c": false}'],
            "config_overrides",
            {"a": 1, "b": "true", "c": False},
        ),
    ],
)
def test_flags_are_read_by_type(argv, name, expected):
    value = flags(*argv).value(name)
    assert value == expected and repr(value) == repr(expected)


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


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--learing_rate", "1"], ["learing_rate", "did you mean learning_rate?"]),
        (["--learning_rat", "1"], ["learning_rat;", "did you mean learning_rate"]),  # no abbreviations
        (["--lrr", "1"], ["lrr", "did you mean lr"]),
        (["--lst", "cosine"], ["lst", "did you mean lr_scheduler_type"]),  # its abbreviation
        (["--prompt", "x"], ["prompt;", "did you mean prompt_template"]),  # its beginning, however much is missing
        (["--path", "x"], ["path;", "did you mean data_path"]),  # or its end
        (["--zzz"], ["unknown setting zzz", "--help"]),
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
        (["--max_steps", "1e13"], ["max_steps=10000000000000", "at most 1000000000"]),
        (["--offset", "-1e30"], ["offset=-1e+30", "at least -1000000000"]),
        (["--seed", "9" * 30], ["seed=999", "at most"]),
        (["--max_steps", "\u0661"], ["max_steps", "whole number"]),
        (["--data_path", "a\0b"], ["data_path", "other than NUL"]),
        (["--data_path", "\ud800"], ["data_path", "Unicode characters"]),
        (["--config_overrides", "=1"], ["config_overrides", "key=value"]),
        (["--config_overrides", '{"a": }'], ["config_overrides", "not a valid JSON object"]),
        (["--config_overrides", '{"a": [1]}'], ["config_overrides: a=[1]", "a number, true"]),
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


def test_all_missing_and_all_unknown_are_reported_together():
    @dataclass(frozen=True)
    class Two(Settings):
        """Two required values."""

        data_path: str
        model_name_or_path: str

    assert "data_path, model_name_or_path; --help" in error_of(config=Two)
    assert len(error_of("--a1", "--b1", config=Two).splitlines()) == 2


def test_a_setting_of_other_commands_is_named_with_them(capsys, tmp_path):
    said = "unknown setting kl_coef; see --help for all settings; it is a setting of ppo, grpo, dapo, dr_grpo, gspo, "
    said += "cispo, rloo, online_dpo, reinforce++, rlhf (--ppo.kl_coef)"
    path = yaml_file(tmp_path, "kl-coef: 0.1")
    for place, argv in (("", ["--kl_coef", "0.1"]), ("", ["--kl-coef=0.1"]), (f"{path}: ", ["--config", path])):
        assert cli.main(["sft", *argv]) == InputError.status
        assert capsys.readouterr().err.strip() == f"jaxrlhf: error: {place}{said}"
    for argv in (["sft", "--no_such_thing"], ["rlhf", "--max_steps", "2"]):  # rlhf has it, in its sections
        assert cli.main(argv) == InputError.status
        assert "t is a setting of" not in capsys.readouterr().err
    assert cli.main(["sft", "--model", "x"]) == InputError.status
    assert "did you mean model_name_or_path or model_type? It is a setting of" in capsys.readouterr().err


def test_a_mistaken_command_is_answered_with_commands_like_it_or_all(capsys):
    assert cli.main(["pppo", "--seed", "1"]) == InputError.status
    assert "'pppo'; did you mean ppo" in capsys.readouterr().err
    assert cli.main(["train"]) == InputError.status
    assert "sft, reward, dpo" in capsys.readouterr().err


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


def test_a_leading_tilde_is_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    paths = {"model_name_or_path": "~/model", "output_dir": "~/run", "data_cache_dir": "~/cache"}
    config = SFTConfig.create(data_path=("~/a.jsonl", "owner/name"), eval_data_path="~/b.jsonl", **paths)
    assert {name: config.value(name) for name in paths} == {n: p.replace("~", "/home/ada") for n, p in paths.items()}
    assert config.data.data_path == ("/home/ada/a.jsonl", "owner/name")
    assert config.data.eval_data_path == ("/home/ada/b.jsonl",)
    models = {"actor_model_name_or_path": "~/sft", "reward_model_name_or_path": "~/rm"}
    ppo = PPOConfig.create(**models, ptx_data_path=("~/t.txt",), ptx_coef=1.0)
    assert {name: ppo.value(name) for name in models} == {n: p.replace("~", "/home/ada") for n, p in models.items()}
    assert ppo.ptx.ptx_data_path == ("/home/ada/t.txt",)
