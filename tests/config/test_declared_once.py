"""Each setting of the commands is declared in one class, which every config that has the setting holds or extends."""

import dataclasses
import typing
from collections import defaultdict

import pytest

from jaxrlhf.bench.settings import BenchConfig
from jaxrlhf.commands.chat import ChatConfig
from jaxrlhf.commands.convert import ConvertConfig
from jaxrlhf.commands.data import DataViewConfig
from jaxrlhf.commands.demo import DemoConfig
from jaxrlhf.commands.rlhf import RLHFConfig
from jaxrlhf.commands.sample import SampleConfig
from jaxrlhf.config import settings
from jaxrlhf.engine import GenerationConfig, SamplingConfig
from jaxrlhf.models import KERNEL_OPTIONS
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.rl.config import CONFIGS, PPOConfig
from jaxrlhf.trainers.dpo import DPOConfig
from jaxrlhf.trainers.reward import RewardConfig
from jaxrlhf.trainers.settings import ComputeConfig, MeshConfig
from jaxrlhf.trainers.sft import SFTConfig

TRAINERS = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, **CONFIGS}
ALL = TRAINERS | {"rlhf": RLHFConfig, "sample": SampleConfig, "chat": ChatConfig, "plan": PlanConfig}
ALL |= {"bench": BenchConfig, "convert": ConvertConfig, "demo": DemoConfig, "data": DataViewConfig}

# Names with another meaning in another command. Everything else stands in one class.
OTHERWISE = {
    "seed": {"DataConfig", "ChatConfig", "BenchConfig"},  # of the order of rows too; of samples; of weights
    # Of step 2 and the critic; of the frozen reward model.
    "reward_zero_stage": {"RLHFConfig", "FrozenConfig"},
    "reference_free": {"DPOOptions", "FrozenConfig"},  # of the loss of pairs; of the penalty on rollouts
    "json": {"PlanConfig", "BenchConfig", "DataViewConfig"},  # the file of the plan; of the measurements; of the data
    "show": {"DataViewConfig", "SampleConfig"},  # rows of each source; episodes
    "actor": {"PlanConfig", "BenchConfig"},  # a model; the shape of one
    "save_dtype": {"RunConfig", "ConvertConfig"},  # of the export of a run; of a conversion, where dtype says the same
    # The model to train; the model to sample from, which is required.
    "model_name_or_path": {"ModelName", "SampleConfig"},
    # The start of step 1 and of step 2; the results of these steps; a scorer without a critic.
    "actor_model_name_or_path": {"PPOModels", "BaseModelsConfig"},
    "reward_model_name_or_path": {"PPOModels", "BaseModelsConfig", "SampleConfig"},
}


def declarations(config: type) -> dict[str, set[type]]:
    """{setting: classes that declare it}, of a config, its parts and its sections; derived values are no settings."""
    found: dict[str, set[type]] = defaultdict(set)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            for name, classes in declarations(typing.cast(type, kind)).items():
                found[name] |= classes
        elif field.name in settings(config):
            found[field.name] |= {c for c in config.__mro__ if field.name in vars(c).get("__annotations__", {})}
    return found


@pytest.fixture(scope="module")
def declared() -> dict[str, set[type]]:
    found: dict[str, set[type]] = defaultdict(set)
    for config in ALL.values():
        for name, classes in declarations(config).items():
            found[name] |= classes
    return found


def test_each_setting_stands_in_one_class_of_the_package(declared):
    several = {name: {c.__name__ for c in classes} for name, classes in declared.items() if len(classes) > 1}
    assert several == OTHERWISE


def test_every_flag_of_a_command_is_one_of_these_declarations(declared):
    for config in ALL.values():
        assert set(settings(config)) <= set(declared)


@pytest.mark.parametrize("name", ALL)
def test_within_a_command_no_two_parts_declare_the_same_flag(name):
    top: dict[str, set[type]] = defaultdict(set)
    hints = typing.get_type_hints(ALL[name], include_extras=True)
    for field in dataclasses.fields(ALL[name]):
        if typing.get_origin(hints[field.name]) is not typing.Annotated:  # sections have flags of their own
            kind = hints[field.name]
            inner = declarations(kind) if dataclasses.is_dataclass(kind) else {}
            for flag in inner:
                top[flag].add(kind)
    assert not {flag: kinds for flag, kinds in top.items() if len(kinds) > 1}


def test_the_homes_of_settings_that_many_commands_share(declared):
    assert declared["kv_cache_dtype"] == declared["generation_slots"] == {GenerationConfig}
    assert declared["max_new_tokens"] == declared["temperature"] == declared["samples_per_prompt"] == {SamplingConfig}
    assert declared["mesh_fsdp"] == declared["dtype"] == {MeshConfig}
    assert declared["attention_implementation"] == declared["zero_stage"] == {ComputeConfig}


# ---- choices


@pytest.mark.parametrize("name", KERNEL_OPTIONS)
def test_the_choices_of_kernels_are_those_of_the_models(name):
    assert typing.get_args(settings(PPOConfig)[name].hint.kind) == tuple(KERNEL_OPTIONS[name])
