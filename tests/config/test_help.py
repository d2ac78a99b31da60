"""The pages of `--help`, and what each command's settings say there and in a file."""

import pytest
from example_settings import SFT, Pipeline, error_of, flags

from jaxrlhf import cli
from jaxrlhf.config import load_yaml, save_yaml, settings, to_dict

REQUIRED = {
    "serve": {"model": ("model",)},
    "sample": {"model_name_or_path": "m", "output_file": "x.jsonl", "reward_model_name_or_path": "r"},
    "chat": {"model": "m"},
    "eval": {"models": ("m",), "data_path": ("demo",)},
    "convert": {"input": "a", "output": "b"},
    "plan": {"device": "a100-80g", "actor": "opt-125m"},
    "grpo": {"samples_per_prompt": 4},
    "rloo": {"samples_per_prompt": 4},
}


@pytest.mark.parametrize("name", list(cli.commands()))
def test_every_command_s_settings_come_back_from_a_file_and_show_in_help(name, tmp_path, capsys):
    kind = cli.commands()[name].config_class()
    config = kind.create(**REQUIRED.get(name, {}))
    save_yaml(config, tmp_path / "config.yaml")
    assert load_yaml(kind, tmp_path / "config.yaml") == config == kind.create(**to_dict(config))
    with pytest.raises(SystemExit):
        flags("--help", config=kind)
    page = capsys.readouterr().out
    assert "--config FILE.yaml" in page
    assert all(f"--{flag}" in page for flag in settings(kind))


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
