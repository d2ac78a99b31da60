"""TRL's YAML files as jaxrlhf reads them: honoured, advised or refused, with TRL's defaults; every key is known."""

import ast
import importlib.util
import logging
from pathlib import Path

import pytest

from jaxrlhf.cli import commands
from jaxrlhf.config import parse
from jaxrlhf.config.settings import names_of
from jaxrlhf.errors import InputError

TRAINERS = ("sft", "reward", "dpo", "kto", "ppo", "grpo", "rloo")
VARIANTS = ("dapo", "dr_grpo", "gspo", "cispo")
SFT_FULL = """
model_name_or_path: Qwen/Qwen2.5-1.5B
model_revision: main
torch_dtype: bfloat16
attn_implementation: flash_attention_2
dataset_name: open-r1/Mixture
dataset_config: math
dataset_test_split: test_math
dataset_num_proc: 4
eval_strategy: steps
eval_steps: 100
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
learning_rate: 4.0e-05
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
max_length: 2048
num_train_epochs: 1
output_dir: runs/x
overwrite_output_dir: true
packing: true
per_device_train_batch_size: 16
push_to_hub: true
report_to: [wandb, tensorboard]
save_steps: 100
save_strategy: steps
save_total_limit: null
seed: 7
use_liger_kernel: true
warmup_ratio: 0.05
assistant_only_loss: true
"""
PEFT_MIXTURE = """
model_name_or_path: Qwen/Qwen3-0.6B
datasets:
  - {path: trl-lib/ultra, name: clean, split: train_sft}
  - path: json
    data_files: [a.jsonl, b.jsonl]
  - path: json
    data_files: a.jsonl
test_split_size: 0.02
eval_strategy: steps
logging_steps: 20
use_peft: true
lora_r: 64
use_rslora: true
warmup_steps: 0.03
bf16: false
"""
PPO = """
dataset_name: trl-internal-testing/descriptiveness-sentiment-trl-style
dataset_train_split: descriptiveness
learning_rate: 3e-6
output_dir: runs/ppo
per_device_train_batch_size: 64
gradient_accumulation_steps: 1
num_mini_batches: 2
total_episodes: 10000
sft_model_path: EleutherAI/pythia-1b-deduped
reward_model_path: reward
missing_eos_penalty: 1.0
stop_token: eos
vf_coef: 0.2
local_rollout_forward_batch_size: 16
report_to: none
"""
GRPO = """
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
model_init_kwargs: {dtype: bfloat16}
dataset_name: trl-lib/DeepMath-103K
reward_funcs: [my.rewards.accuracy, think_format_reward]
num_generations: 16
max_completion_length: 1024
use_vllm: true
per_device_train_batch_size: 8
gradient_accumulation_steps: 4
steps_per_generation: 8
max_steps: 100
save_strategy: "no"
loss_type: dr_grpo
scale_rewards: none
epsilon_high: 0.28
"""


@pytest.fixture
def read(tmp_path, caplog):
    """Parses a YAML text as a command does; returns the config and the lines of advice."""

    def parsed(command, text, *flags):
        path = tmp_path / "trl.yaml"
        path.write_text(text)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            config = parse(commands()[command].config_class(), ["--config", str(path), *flags], "", "")
        return config, caplog.messages

    return parsed


def differences(config, **expected):
    return {name: config.value(name) for name, value in expected.items() if config.value(name) != value}


def test_an_sft_file_is_honoured(read):
    config, advice = read("sft", SFT_FULL)
    assert not differences(
        config,
        model_name_or_path="Qwen/Qwen2.5-1.5B",
        dtype="bfloat16",
        dataset_num_proc=4,
        eval_steps=100,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=4e-5,
        lr_scheduler_type="cosine",
        min_lr_ratio=0.1,
        max_length=2048,
        num_train_epochs=1.0,
        packing=True,
        report_to=("wandb", "tensorboard"),
        save_steps=100,
        save_total_limit=2,
        warmup_ratio=0.05,
        train_on="all",
        adam_beta2=0.999,
    )
    (source,) = config.data.sources
    assert (source.path, source.split, source.evaluation) == (
        "open-r1/Mixture:math", "", "open-r1/Mixture:math@test_math",
    )  # fmt: skip
    assert len([line for line in advice if "ignored" in line]) == 3
    assert any("attn_implementation=flash_attention_2 is ignored" in line for line in advice)
    assert any("TRL's defaults, --adam_beta2 0.999" in line for line in advice)


def test_a_mixture_with_adapters_is_honoured(read):
    config, advice = read("reward", PEFT_MIXTURE)
    paths = {source.path: source for source in config.data.sources}
    assert set(paths) == {"trl-lib/ultra:clean", "a.jsonl", "b.jsonl"} and len(config.data.sources) == 4
    assert paths["trl-lib/ultra:clean"].split == "train_sft" and paths["b.jsonl"].evaluation == "held_out"
    assert not differences(
        config,
        eval_fraction=0.02,
        eval_steps=20,
        lora_r=64,
        lora_alpha=32 * 8.0,
        lora_dropout=0.05,
        warmup_ratio=0.03,
        dtype="float32",
        disable_dropout=True,
        max_length=1024,
        num_train_epochs=3.0,
        learning_rate=1e-4,
    )
    assert any(line.startswith("lora_target_modules") for line in advice)
    without, advice = read("reward", PEFT_MIXTURE.replace("use_peft: true", "use_peft: false"))
    assert without.value("lora_r") == 0 and any("ignored without use_peft" in line for line in advice)
    assert read("dpo", PEFT_MIXTURE)[0].value("lora_dropout") == 0


def test_a_ppo_file_is_the_same_run(read):
    config, advice = read("ppo", PPO)
    assert not differences(
        config,
        actor_model_name_or_path="EleutherAI/pythia-1b-deduped",
        reward_model_name_or_path="reward",
        total_episodes=10000,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        num_mini_batches=2,
        ppo_epochs=4,
        kl_coef=0.05,
        temperature=0.7,
        max_new_tokens=53,
        clip_reward=None,
        max_grad_norm=0.0,
        critic_learning_rate=3e-6,
        missing_eos_penalty=1.0,
        report_to=("none",),
    )
    assert config.rows_per_device == 64 and config.total_steps(lambda: 0, rows=64) == 157
    (source,) = config.data.sources
    assert config.value("eval_fraction") == 0.01 and any("eval_strategy is no" in line for line in advice)
    assert (source.split, source.evaluation) == ("descriptiveness", "own")
    assert {line.partition("=")[0] for line in advice if "ignored" in line} == {
        "vf_coef", "local_rollout_forward_batch_size",
    }  # fmt: skip
    assert read("ppo", PPO, "--total_episodes", "64", "--kl_coef", "0.1")[0].value("kl_coef") == 0.1


def test_a_grpo_file_counts_rollouts_where_trl_counts_updates(read):
    config, advice = read("grpo", GRPO)
    assert not differences(
        config,
        dtype="bfloat16",
        num_mini_batches=2,
        max_steps=50,
        save_steps=0,
        samples_per_prompt=16,
        max_new_tokens=1024,
        kl_coef=0.0,
        loss_aggregation="fixed-length",
        scale_by_std=False,
        cliprange_high=0.28,
        reward_functions=("my.rewards:accuracy", "trl.rewards:think_format_reward"),
        max_prompt_seq_len=512,
    )
    assert any("max_steps=100 updates are 50 steps" in line for line in advice)
    assert config.value("reference_free") and any("beta is 0: no reference is kept" in line for line in advice)
    for kept in (("--kl_coef", "0.1"), ("--reference_free", "false"), ("--offload_reference_model",)):
        assert not read("grpo", GRPO + "beta: 0.0\n", *kept)[0].value("reference_free")
    moving, _ = read("grpo", GRPO + "sync_ref_model: true\n")
    assert not moving.value("reference_free") and moving.value("reference_sync_steps") == 256
    assert moving.value("reference_mixup") == 0.6
    still, _ = read("grpo", GRPO + "sync_ref_model: false\nref_model_sync_steps: 64\n")
    assert still.value("reference_sync_steps") == 0
    weighed = "dataset_name: x\nreward_model_name_or_path: m\nreward_funcs: [a.b, c.d]\nreward_weights: [2, 0.5, 0.1]\n"
    expected = {"reward_model_weight": 2.0, "reward_weights": (0.5, 0.1), "reward_functions": ("a:b", "c:d")}
    assert not differences(read("grpo", weighed)[0], **expected)
    scored = "dataset_name: x\ncenter_rewards_coefficient: 0.01\n"
    assert read("reward", scored)[0].center_rewards_coefficient == 0.01
    assert read("reward", scored.replace("0.01", "null"))[0].center_rewards_coefficient == 0
    rloo = "dataset_name: x\nnormalize_advantages: true\nreward_clip_range: [-3, 3]\nbeta: 0.1\n"
    assert not differences(
        read("rloo", rloo)[0], whiten_advantages=True, clip_reward=3.0, kl_coef=0.1, samples_per_prompt=2
    )


def test_offline_losses_have_trls_names_and_its_defaults(read):
    text = "dataset_name: x\nprecompute_ref_log_probs: true\nprecompute_ref_batch_size: 4\n"
    several = "loss_type: [sigmoid, hinge, sft]\nloss_weights: [0.8, 0.2, 1.0]\n"
    config, advice = read("dpo", text + several)
    assert not differences(
        config,
        loss_type=("sigmoid", "hinge", "sft"),
        loss_weights=(0.8, 0.2, 1.0),
        beta=0.1,
        max_length=1024,
        precompute_ref_log_probs=True,
    )
    assert any("precompute_ref_batch_size=4 is ignored" in line for line in advice)
    weights = "loss_type: apo_zero_unpaired\ndesirable_weight: 1.3\nundesirable_weight: 0.9\n"
    config, _ = read("kto", text + weights)
    assert not differences(
        config,
        loss_type="apo_zero_unpaired",
        desirable_weight=1.3,
        undesirable_weight=0.9,
        beta=0.1,
        learning_rate=1e-6,
        max_length=1024,
        precompute_ref_log_probs=True,
    )


def test_ratios_of_whole_responses_have_trls_name(read):
    config, _ = read("grpo", GRPO + "importance_sampling_level: sequence\n")
    assert config.value("ratio_level") == "sequence"


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        ("dapo", "loss_type: dapo\nepsilon_high: 0.25\n", {"cliprange_high": 0.25, "loss_aggregation": "token-mean"}),
        ("dapo", "num_generations: 4\n", {"cliprange_high": 0.28, "dynamic_sampling": 4, "samples_per_prompt": 4}),
        ("dr_grpo", "loss_type: dr_grpo\n", {"loss_aggregation": "fixed-length", "scale_by_std": False}),
        (
            "gspo",
            "loss_type: grpo\nimportance_sampling_level: sequence\nepsilon: 3e-4\nepsilon_high: 5e-4\n",
            {"ratio_level": "sequence", "cliprange_high": 5e-4, "loss_aggregation": "sequence-mean"},
        ),
        ("gspo", "steps_per_generation: 4\n", {"ratio_level": "sequence", "cliprange": 3e-4, "num_mini_batches": 4}),
        ("cispo", "loss_type: cispo\nepsilon: 0.2\nepsilon_high: 5.0\n", {"cliprange_high": 4.0}),
    ],
)
def test_variants_read_grpo_files_and_keep_what_makes_them_variants(read, command, text, expected):
    config, _ = read(command, f"dataset_name: x\n{text}")
    shared = {"kl_coef": 0.0, "max_new_tokens": 512, "learning_rate": 1e-6, "samples_per_prompt": 8}
    assert not differences(config, **shared | expected)
    assert config.value("policy_loss") == ("cispo" if command == "cispo" else "clip")


def test_an_online_dpo_file_counts_prompts(read):
    text = "dataset_name: x\nreward_model_path: reward\nbeta: [0.2]\nmax_new_tokens: 53\nmissing_eos_penalty: 1.0\n"
    config, advice = read("online_dpo", text + "per_device_train_batch_size: 4\njudge: null\ntop_k: 0\n")
    assert not differences(
        config,
        reward_model_name_or_path="reward",
        kl_coef=0.2,
        samples_per_prompt=2,
        per_device_train_batch_size=8,
        max_new_tokens=53,
        max_prompt_seq_len=512 - 53,
        temperature=0.9,
        learning_rate=5e-7,
        missing_eos_penalty=1.0,
    )
    assert any("4 prompts are 8 rows here" in line for line in advice)


def test_a_gkd_file_is_honoured(read):
    text = "dataset_name: x\nmodel_name_or_path: student\nteacher_model_name_or_path: teacher\nbf16: true\n"
    config, advice = read("distill", text + "teacher_model_init_kwargs: {dtype: bfloat16}\nseq_kd: false\n")
    assert not differences(
        config,
        teacher_model_name_or_path="teacher",
        lmbda=0.5,
        beta=0.5,
        temperature=0.9,
        kd_temperature=1.0,
        max_new_tokens=128,
        max_length=1024,
        train_on="last",
        disable_dropout=True,
        packing=False,
        learning_rate=2e-5,
        dtype="bfloat16",
    )
    assert any("teacher_top_k" in line for line in advice)
    config, advice = read("distill", text + "lmbda: 0.0\nbeta: 1.0\ntemperature: 0.7\nteacher_top_k: 0\n")
    assert not differences(config, lmbda=0.0, beta=1.0, temperature=1.0, teacher_top_k=0)
    assert any("max_new_tokens, temperature: ignored with lmbda: 0" in line for line in advice)
    config, advice = read("distill", text + "lmbda: 0.0\nseq_kd: true\ntemperature: 0.7\n")
    assert not differences(config, lmbda=0.0, seq_kd=True, temperature=0.7, max_new_tokens=128, packing=False)
    assert not any("ignored" in line for line in advice)


def test_our_own_files_and_flags_are_left_alone(read):
    config, advice = read("sft", "data_path: demo\nlora_r: 8\neval_steps: 10\n", "--num_train_epochs", "2")
    assert not differences(config, lora_r=8, eval_steps=10, num_train_epochs=2.0, adam_beta2=0.95) and not advice


def test_a_flag_of_trl_does_not_turn_a_file_of_ours_into_one_of_trl(read):
    with pytest.raises(InputError, match=r"--save_strategy: .*trl\.yaml has none of TRL's.*Write --save_steps instead"):
        read("sft", "data_path: a.jsonl\nlearning_rate: 1e-4\n", "--save_strategy", "no")
    with pytest.raises(InputError, match=r"--use_vllm: .* Leave it out"):
        read("grpo", "kl_coef: 0.1\n", "--use-vllm")
    config, _ = read("sft", "dataset_name: a\nlearning_rate: 1e-4\n", "--save_strategy", "no")
    assert config.value("packing") is False and config.value("save_steps") == 0


def test_flags_of_trl_need_no_file():
    argv = ["--dataset_name", "x", "--use_peft", "--lora_r=8", "--report_to", "wandb,trackio", "--eval_strategy", "no"]
    config = parse(commands()["sft"].config_class(), argv, "", "")
    assert not differences(config, lora_r=8, report_to=("wandb", "trackio"), num_train_epochs=3.0)
    assert config.data.sources[0].path == "x"


def test_flags_of_trl_without_a_value_are_true():
    argv = ["--dataset_name", "x", "--use_peft", "--bf16", "--eval_strategy", "no", "--load_in_4bit"]
    assert not differences(parse(commands()["sft"].config_class(), argv[:-1], "", ""), lora_r=16, dtype="bfloat16")
    with pytest.raises(InputError, match="load_in_4bit=true: there is no quantised training"):
        parse(commands()["sft"].config_class(), argv, "", "")


def test_the_flags_of_trls_own_command_lines_are_read():
    argv = ["--dataset_name", "x", "--no_remove_unused_columns", "--accelerate_config", "zero2", "--num_processes=4"]
    argv += ["--eos_token", "<|im_end|>", "--lr_scheduler_type", "cosine_with_min_lr"]
    argv += ["--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}', "--no-push-to-hub"]
    config = parse(commands()["sft"].config_class(), argv, "", "")
    assert not differences(config, eos_token_ids=("<|im_end|>",), min_lr_ratio=0.1, num_processes=None)
    argv += ["--coordinator_address", "host:1", "--process_id", "0"]
    assert not differences(parse(commands()["sft"].config_class(), argv, "", ""), num_processes=4)
    with pytest.raises(InputError, match=r"lr_scheduler_kwargs=\[1\]: must be a mapping"):
        parse(commands()["sft"].config_class(), [*argv, "--lr_scheduler_kwargs", "[1]"], "", "")


def test_a_long_row_is_cut_as_with_keep_end(read):
    for mode, differs in (("keep_start", True), ("keep_end", False)):
        _, advice = read("dpo", f"dataset_name: x\ntruncation_mode: {mode}\n")
        assert any("loses the beginning of its prompt" in line for line in advice) is differs


def test_data_path_replaces_the_data_of_a_file(read):
    config, advice = read("sft", SFT_FULL, "--data_path", "demo")
    assert config.data.data_path == ("demo",) and any("data_path names the data" in line for line in advice)


@pytest.mark.parametrize(
    ("command", "line", "part"),
    [
        ("sft", "load_in_4bit: true", "load_in_4bit=true: there is no quantised"),
        ("sft", "max_length: null", "max_length=null: rows have a bound here"),
        ("sft", "fp16: true", "bf16: true"),
        ("sft", "optim: adafactor", "optim=adafactor: the optimizer is AdamW"),
        ("sft", "neftune_noise_alpha: 5", "neftune_noise_alpha=5: leave it out"),
        ("sft", "eval_strategy: epoch", "eval_strategy=epoch: not by epochs"),
        ("sft", "save_strategy: epoch", "save_strategy=epoch"),
        ("sft", "lr_scheduler_type: polynomial", "lr_scheduler_type=polynomial: write linear"),
        ("sft", "loss_type: dft", "loss_type=dft"),
        ("sft", "dataset_train_split: 'train[:10]'", "max_train_samples"),
        ("sft", "datasets: [{path: a, weigth: 1}]", "unknown key weigth"),
        ("sft", "learnin_rate: 1", "unknown setting learnin_rate; did you mean learning_rate"),
        ("sft", "use_dora: true\nlearnin_rate: 1", "unknown setting learnin_rate"),
        ("dpo", "loss_type: aot", "must be one or several of"),
        ("kto", "sync_ref_model: true", "sync_ref_model=true"),
        ("dpo", "loss_type: bco_pair", "bco_pair"),
        ("dpo", "sync_ref_model: true", "sync_ref_model=true"),
        ("ppo", "stop_token: x", "write stop_token: eos"),
        ("ppo", "num_mini_batches: 3", "num_mini_batches=3 must divide the 8 rows"),
        ("ppo", "total_episodes: 10\nmax_steps: 3", "exclude each other"),
        ("grpo", "loss_type: sapo", "write dapo, bnpo, grpo or dr_grpo"),
        ("grpo", "generation_batch_size: 64", "steps_per_generation"),
        ("grpo", "reward_funcs: my_reward", "write reward_functions"),
        ("rloo", "reward_clip_range: [0, 3]", "must be [-x, x]"),
        ("dapo", "loss_type: grpo", "loss_type=grpo: write dapo, or run `jaxrlhf grpo`"),
        ("dr_grpo", "loss_type: dapo", "loss_type=dapo: write dr_grpo"),
        ("gspo", "importance_sampling_level: token", "importance_sampling_level=token: write sequence"),
        ("cispo", "loss_type: dapo", "loss_type=dapo: write cispo"),
        ("cispo", "epsilon_high: 0.2", "epsilon_high=0.2: must be above 1"),
        ("online_dpo", "loss_type: ipo", "loss_type=ipo: the loss is DPO's"),
        ("online_dpo", "beta: [0.1, 0.2]", "beta=0.1 0.2: one β for all epochs"),
        ("online_dpo", "max_new_tokens: 512", "max_length=512 must be above max_new_tokens=512"),
        ("distill", "teacher_model_init_kwargs: {revision: x}", "teacher_model_init_kwargs"),
        ("distill", "packing: true", "lmbda=0.5 with packing"),
    ],
)
def test_what_would_change_results_is_refused_by_name(read, command, line, part):
    with pytest.raises(InputError) as error:
        read(command, f"dataset_name: x\n{line}\n")
    assert part in str(error.value)


def fields_of(package, path, *classes):
    """Annotated fields of dataclasses in a package's file, read without importing it."""
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    tree = ast.parse((folder / path).read_text())
    found = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    return {
        item.target.id
        for name in classes
        for item in found[name].body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and "ClassVar" not in ast.dump(item)
    } - {"_VALID_DICT_FIELDS"}


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="needs trl")
@pytest.mark.parametrize("command", (*TRAINERS, *VARIANTS, "online_dpo", "distill"))
def test_every_key_of_trl_is_known(command):
    configs = {name: (f"trainer/{name}_config.py", f"{name.upper()}Config") for name in TRAINERS}
    configs |= dict.fromkeys(VARIANTS, configs["grpo"]) | {"distill": configs["sft"]}
    configs |= {"online_dpo": ("experimental/online_dpo/online_dpo_config.py", "OnlineDPOConfig")}
    configs |= {"reward": ("trainer/reward_config.py", "RewardConfig")}
    configs |= {"ppo": ("experimental/ppo/ppo_config.py", "PPOConfig")}
    keys = fields_of("transformers", "training_args.py", "TrainingArguments")
    keys |= fields_of("trl", "scripts/utils.py", "ScriptArguments", "DatasetMixtureConfig")
    keys |= fields_of("trl", "trainer/model_config.py", "ModelConfig") | fields_of("trl", *configs[command])
    if command in ("grpo", "rloo", *VARIANTS):
        script = "rloo" if command == "rloo" else "grpo"
        keys |= fields_of("trl", f"scripts/{script}.py", f"{script.upper()}ScriptArguments")
    if command == "distill":
        keys |= fields_of("trl", "experimental/gkd/gkd_config.py", "GKDConfig")
    cls = commands()[command].config_class()
    assert len(keys) > 120 and not sorted(keys - set(names_of(cls)) - set(cls.TRL_KEYS.flags))
