"""DeepSpeed-Chat's command lines: every flag is honoured, explained or refused, and whole lines mean the same."""

import logging
import re
import shlex
from pathlib import Path

import pytest
from deepspeed_chat_lines import COMPANIONS, LINES, NEEDED, SCRIPTS

from jaxrlhf import cli
from jaxrlhf.commands.rlhf import step_configs
from jaxrlhf.config import parse
from jaxrlhf.config.settings import names_of, settings
from jaxrlhf.data.settings import packs
from jaxrlhf.errors import InputError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "coming-from-deepspeed-chat.md"


def class_of(command):
    return cli.commands()[command].config_class()


def flags_of(line):
    """{flag as it is written: its words}."""
    found = {}
    for word in shlex.split(line):
        if word.startswith("--"):
            name = found[word[2:]] = []
        else:
            name.append(word)
    return found


PAIRS = [
    pytest.param(script, flag, words, id=f"{script}: {flag}")
    for script, (_, line) in SCRIPTS.items()
    for flag, words in flags_of(line).items()
]


def outcome(command, flag):
    """(kind, our setting) of a flag, as declared."""
    cls, name = class_of(command), flag.replace("-", "_")
    entry = cls.OTHER_FLAGS.flags.get(name)
    if entry is not None:
        kind = "same name" if entry.setting == name else entry.kind
        return kind, entry.setting
    setting = names_of(cls)[name]
    return ("same name" if setting == name else "alias"), setting


@pytest.mark.parametrize(("script", "flag", "words"), PAIRS)
def test_every_flag_changes_its_setting_or_is_explained_in_a_line_or_refused(script, flag, words, caplog):
    command, _ = SCRIPTS[script]
    cls, (kind, setting) = class_of(command), outcome(command, flag)
    needed = shlex.split(NEEDED.get(command, ""))
    given = [*([] if flag == "path" else needed), *shlex.split(COMPANIONS.get(flag, "")), f"--{flag}", *words]
    caplog.set_level(logging.WARNING, "jaxrlhf")
    if kind == "refused":
        with pytest.raises(InputError, match=rf"--{flag.replace('-', '_')} .*: .{{20}}"):
            parse(cls, given, "", "")
        return
    config = parse(cls, given, "", "")
    if kind == "obsolete":
        (line,) = caplog.messages
        assert line.startswith(f"--{flag}") and ": " in line
    else:
        assert setting in settings(cls)
        assert config.value(setting) != parse(cls, needed, "", "").value(setting)


def table():
    """The rows of the page's table, from the declarations."""
    seen = {}
    for command, line in SCRIPTS.values():
        for flag in flags_of(line):
            kind, setting = outcome(command, flag)
            entry = class_of(command).OTHER_FLAGS.flags.get(flag.replace("-", "_"))
            said = {"same name": "the same name", "alias": f"`--{setting}`"}
            parts = [said.get(kind) or (f"not needed: {entry.advice}" if entry.advice else f"refused: {entry.remedy}")]
            if entry and entry.remedy and kind != "refused":
                parts.append(f"other values are refused: {entry.remedy}")
            seen.setdefault((flag, "; ".join(parts)), []).append(f"`{command}`")
    rows = [f"| `--{flag}` | {', '.join(dict.fromkeys(c))} | {said} |" for (flag, said), c in seen.items()]
    return sorted(rows, key=lambda row: row.replace("-", "_"))


def totals():
    kinds = [outcome(SCRIPTS[script][0], flag)[0] for script, flag, _ in (pair.values for pair in PAIRS)]
    counts = {kind: kinds.count(kind) for kind in ("same name", "alias", "obsolete", "refused")}
    return len(kinds), len({pair.values[1].replace("-", "_") for pair in PAIRS}), counts


def test_the_page_has_every_flag_and_their_totals():
    page = PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `--")]
    assert rows == table(), "\n".join(table())
    every, different, counts = totals()
    said = (
        f"{every} flags, {different} of them different: {counts['same name']} have the same name here, "
        f"{counts['alias']} are aliases, {counts['obsolete']} are not needed, {counts['refused']} are refused."
    )
    assert said in " ".join(page.split()), said


def test_help_shows_none_of_these_flags(capsys):
    with pytest.raises(SystemExit):
        parse(class_of("ppo"), ["--help"], "jaxrlhf ppo", "")
    page = capsys.readouterr().out
    assert not re.search(r"--(inference_tp_size|deepspeed|local_rank)", page)


# ---- whole lines: those of DeepSpeed-Chat's shell scripts

# What decides results, beside the rows of an update.
COMPARED = """num_train_epochs learning_rate weight_decay lr_scheduler_type warmup_steps lora_r lora_alpha
  max_new_tokens ppo_epochs num_mini_batches kl_coef critic_learning_rate critic_lora_r data_split seed max_length
  max_prompt_seq_len gradient_checkpointing offload_optimizer offload_reference_model generate_tensor_parallel"""
APART = {"opt-1.3b ppo": {"seed": (42, 1234)}}  # this script leaves the seed to chance


@pytest.mark.parametrize(("name", "line"), LINES, ids=[name for name, _ in LINES])
def test_a_line_of_a_training_script_gives_the_run_of_its_recipe(name, line):
    recipe, command = name.split()
    path = PAGE.parents[1] / "examples" / "deepspeed_chat" / f"{recipe}.yaml"
    kind = "rlhf" if "jaxrlhf rlhf" in path.read_text() else command
    expected = parse(class_of(kind), ["--config", str(path)], "", "")
    if kind == "rlhf":
        expected = step_configs(expected)[command]
    config = parse(class_of(command), shlex.split(line), "", "")
    found, theirs = compared(config, command), compared(expected, command)
    assert {key: (found[key], theirs[key]) for key in found if found[key] != theirs[key]} == APART.get(name, {})


def compared(config, command):
    values = {key: config.value(key) for key in COMPARED.split() if key in settings(class_of(command))}
    rows = config.run.per_device_train_batch_size * config.run.gradient_accumulation_steps
    return values | {"rows of an update": rows, "packing": packs(config.data, command)}


@pytest.mark.parametrize(
    ("command", "line", "values"),
    [
        # A rollout of several updates, and an update of several rollouts.
        ("ppo", "{batch} 8 --per_device_training_batch_size 2", {"num_mini_batches": 4, "generation_batches": 1}),
        (
            "ppo",
            "{batch} 4 --per_device_training_batch_size 4 --generation_batches 4 --gradient_accumulation_steps 2",
            {"num_mini_batches": 2, "generation_batches": 4, "gradient_accumulation_steps": 2},
        ),
        (
            "ppo",
            "{batch} 4 --per_device_training_batch_size 2 --gradient_accumulation_steps 8 --enable_test_mode "
            "--test_stop_step 9",
            {"num_mini_batches": 1, "generation_batches": 4, "max_steps": 3},
        ),
        ("ppo", "--generation_batches 2", {"generation_batches": 2, "num_mini_batches": 1}),
        ("ppo", "--enable_test_mode --num_train_epochs 3", {"num_train_epochs": 1.0, "max_steps": -1}),
        ("ppo", "--print_answers_interval 5 --print_answers", {"sample_steps": 5}),
        ("ppo", "--deepspeed --unsupervised_dataset_name w", {"ptx_data_path": ("w",), "ptx_coef": 27.8}),
        ("ppo", "--deepspeed --unsup_coef 3", {"ptx_coef": 0.0}),
        ("grpo", "--n 4 --inference_tp_size 2 --actor_zero_stage 1", {"generate_tensor_parallel": 2, "zero_stage": 1}),
        # With adapters, their own learning rate.
        ("sft", "--lora_dim 4 --lora_learning_rate 1e-3 --learning_rate 1e-5", {"learning_rate": 1e-3}),
        ("sft", "--lora_dim 4 --learning_rate 1e-5", {"learning_rate": 1e-5, "lora_alpha": 32.0}),
        ("sft", "--deepspeed --lora_dim 4 --lora_alpha 8", {"learning_rate": 5e-4, "lora_alpha": 8.0}),
        ("sft", "--lora_learning_rate 1e-3 --lora_dim 0", {"learning_rate": 9.65e-6}),
        # Defaults give way to what stands on the line, by whatever name.
        (
            "sft",
            "--deepspeed --max_length 64 --data_path x",
            {"data_path": ("x",), "learning_rate": 1e-3, "seed": 1234},
        ),
        ("sft", "--deepspeed --data_mixture m.yaml", {"data_path": (), "data_mixture": ("m.yaml",)}),
        ("ppo", "--deepspeed --warmup_steps 3 --per_device_train_batch_size 4", {"warmup_steps": 3}),
        ("ppo", "--deepspeed --lr_scheduler_type constant --num_warmup_steps 5", {"warmup_steps": 0}),
        ("ppo", "--lr_scheduler_type constant_with_warmup --num_warmup_steps 5", {"lr_scheduler_type": "constant"}),
        ("sft", "--eot_token <|endoftext|>", {}),
        ("rlhf", "--actor-model ./opt-1.3b --reward_model 125m", {"actor_model_name_or_path": "./opt-1.3b"}),
    ],
)
def test_flags_that_belong_together_are_read_together(command, line, values):
    line = line.replace("{batch}", "--per_device_generation_batch_size")
    config = parse(class_of(command), shlex.split(line), "", "")
    assert {name: config.value(name) for name in values} == values


def test_data_for_sft_alone_becomes_a_source_of_a_mixture():
    line = ["--data_path", "a", "b", "--sft_only_data_path", 'c,"d', "e"]
    sources = parse(class_of("sft"), line, "", "").data.sources
    assert [(s.path, "ppo" in s.steps) for s in sources] == [("a", True), ("b", True), ('c,"d', False), ("e", False)]


@pytest.mark.parametrize(
    ("command", "line", "message"),
    [
        ("sft", "--dtype fp16", "--dtype fp16: there is no loss scaling"),
        ("sft", "--dropout 0.1", "--dropout 0.1: give 0 for none"),
        ("sft", "--eot_token <|im_end|>", "save a tokenizer that has the token"),
        ("ppo", "--actor_dropout 1e-1", "--actor_dropout 1e-1: leave it out"),
        ("ppo", "--lr_scheduler_type polynomial", "polynomial is linear with --min_lr_ratio"),
        ("ppo", "--inference_tp_size two", "generate_tensor_parallel='two' must be a whole number"),
        ("ppo", "--per_device_generation_batch_size 8", "requires --per_device_training_batch_size"),
        ("ppo", "{batch} 8 --per_device_training_batch_size 3", "=8 must be a multiple of .*=3"),
        ("ppo", "{batch} 0 --per_device_training_batch_size 3", "per_device_generation_batch_size=0 must be a whole"),
        (
            "ppo",
            "{batch} 4 --per_device_training_batch_size 4 --generation_batches 2 --gradient_accumulation_steps 3",
            "8 rows are generated .* and 12 make an update .* multiple of the other",
        ),
        (
            "ppo",
            "{batch} 4 --per_device_training_batch_size 4 --gradient_accumulation_steps 2 --ppo_epochs 2",
            "with ppo_epochs above 1, the first of the second",
        ),
        ("ppo", "{batch} 4 --per_device_training_batch_size 4 --num_mini_batches 2", "num_mini_batches follows from"),
        ("ppo", "--unsupervised_dataset_config_name x", "requires unsupervised_dataset_name"),
        ("sft", "--sft_only_data_path a --data_mixture b", "exclude each other: add the data to the mixture"),
        ("eval", "--models a --data_path demo --num_beams 4", "--num_beams 4: there is no beam search"),
        ("sft", "--dtype fp16 --deepspeed_config c.json", r"(?s)--dtype fp16: .*\n--deepspeed_config c.json: "),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_remedy(command, line, message):
    line = line.replace("{batch}", "--per_device_generation_batch_size")
    with pytest.raises(InputError, match=message):
        parse(class_of(command), shlex.split(line), "", "")


def test_a_flag_of_another_script_is_named_with_the_command_that_reads_it(capsys):
    assert cli.main(["sft", "--inference_tp_size", "2"]) == InputError.status
    assert "it is a setting of ppo, grpo" in capsys.readouterr().err


def test_with_a_config_file_only_its_settings_and_the_flags_hold(tmp_path):
    (tmp_path / "run.yaml").write_text("lora_r: 4\nlearning_rate: 1e-4\n")
    line = ["--deepspeed", "--config", str(tmp_path / "run.yaml")]
    config = parse(class_of("sft"), line, "", "")
    assert (config.optimizer.learning_rate, config.lora.lora_alpha, config.data.seed) == (1e-4, 32.0, 42)
    assert parse(class_of("sft"), [*line, "--lora_learning_rate", "1e-3"], "", "").optimizer.learning_rate == 1e-3
