"""The settings of `jaxrlhf eval`."""

import sys
from dataclasses import dataclass, field, fields
from typing import Annotated

from jaxrlhf.config import (
    NonNegativeInt,
    PathName,
    PositiveInt,
    Settings,
    alias,
    check_needs,
    deepspeed_chat,
)
from jaxrlhf.config.compilation import CompilationConfig
from jaxrlhf.data import DataConfig
from jaxrlhf.engine import GenerationConfig, SamplingConfig
from jaxrlhf.environments import EnvironmentConfig
from jaxrlhf.errors import InputError
from jaxrlhf.rewards import RewardsConfig
from jaxrlhf.trainers.settings import MeshConfig
from jaxrlhf.trainers.tokenizers import TokenizerConfig

SERVER = ("http://", "https://")


@dataclass(frozen=True)
class TasksConfig(Settings):
    """Tasks of lm-eval (the extra `eval`), run on JAX."""

    tasks: tuple[str, ...] = ()
    """Names of lm-eval's tasks, groups or tags, such as ifeval gsm8k, or YAML files of your own tasks."""
    include_path: PathName[tuple[str, ...]] = ()
    """Folders with YAML files of further tasks."""
    num_fewshot: NonNegativeInt | None = None
    """Examples in the prompt of each document; default: the task's own number."""
    apply_chat_template: bool = False
    """Put the prompts into the model's chat template, as chat models need it; default: as plain text, like lm-eval."""
    gen_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Change how tasks generate, such as max_gen_toks=256,temperature=0.7,do_sample=true."""
    output_dir: PathName[str | None] = None
    """Folder for the results and samples in lm-eval's format."""
    confirm_run_unsafe_code: bool = False
    """Allow tasks that run code which the model wrote."""


@dataclass(frozen=True)
class OutputConfig(Settings):
    """Files for the results, besides the terminal."""

    show: NonNegativeInt | None = None
    """Prompts whose responses, or pairs whose scores, the terminal shows; default: 4, or all where no data is named."""
    html: PathName[str | None] = None
    """Also write a page to this file."""
    json: PathName[str | None] = None
    """Also write the results as JSON to this file; -: to standard output, and nothing else."""
    jsonl: PathName[str | None] = None
    """Also write a line for each prompt with its responses and scores, or for each pair or text with its scores."""


@dataclass(frozen=True)
class EvalConfig(Settings):
    """Compares models, measures a reward model, checks verifiable answers, or runs tasks of lm-eval."""

    HIDDEN = frozenset(
        {"data_split", "eval_data_path", "eval_fraction", "packing", "group_by_length", "max_train_samples"}
        | {"max_eval_samples", "streaming", "shuffle_buffer", "max_prompt_seq_len", "train_on", "reward_model_weight"}
        | {"reward_weights"}
    )
    OTHER_FLAGS = deepspeed_chat.EVAL

    models: PathName[Annotated[tuple[str, ...], alias("model", "model_name_or_path", "actor_model_name_or_path")]] = ()
    """Language models: folders, names on the hub, or servers with an OpenAI-compatible API, as
    http://host:8000/v1 or, where one serves several models, http://host:8000/v1#NAME."""
    reward_model_name_or_path: PathName[Annotated[str | None, alias("reward_model")]] = None
    """With models: the reward model that scores their responses. Alone: the reward model to measure, on pairs or on
    texts to score."""
    prompts: tuple[str, ...] = ()
    """Prompts for the models, in place of data; default without data: a few built-in ones."""
    limit: NonNegativeInt = 0
    """Use at most this many rows, chosen at random (with tasks: the first documents of each); 0: all."""
    pass_score: float | None = None
    """A response passes with at least this score of a reward function or the environment, for pass@k; default: 1, where
    all scores are 0 or 1."""
    subset_field: str = ""
    """Column that names the subset of each pair, as in RewardBench; each subset is measured by itself too."""
    per_device_batch_size: PositiveInt = 8
    """Rows per device that are worked on at a time."""
    server_requests: PositiveInt = 8
    """Requests to a server at a time. Its key is read from OPENAI_API_KEY."""
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    rewards: RewardsConfig = RewardsConfig()
    environments: EnvironmentConfig = EnvironmentConfig()
    tasks: TasksConfig = TasksConfig()
    output: OutputConfig = OutputConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    generation: GenerationConfig = GenerationConfig()
    mesh: MeshConfig = MeshConfig()
    compilation: CompilationConfig = CompilationConfig()

    @property
    def mode(self) -> str:
        """The subject: "tasks", "responses" (of models) or "reward" (a reward model alone)."""
        return "tasks" if self.tasks.tasks else "responses" if self.models else "reward"

    @property
    def names_data(self) -> bool:
        """True when the settings name data, from a file or a hub."""
        return bool(self.data.data_path or self.data.data_mixture)

    @property
    def shown(self) -> int:
        """Prompts, or pairs, that the terminal shows."""
        default = 4 if self.names_data else sys.maxsize
        return default if self.output.show is None else self.output.show

    def check(self) -> None:
        if not self.models and self.reward_model_name_or_path is None:
            raise InputError(
                "nothing to evaluate: give models (to compare them, or to run tasks), or reward_model_name_or_path "
                "(to measure it on preference data)"
            )
        of_tasks = [f.name for f in fields(TasksConfig) if f.name != "tasks"]
        check_needs(self, dict.fromkeys(of_tasks, "tasks"))
        if not self.environments.environment:
            check_needs(self, {"pass_score": "reward_functions"})
        of_models = ("prompts", "reward_functions", "samples_per_prompt", "environment", "tools")
        check_needs(self, dict.fromkeys(of_models, "models"))
        if self.environments.used:
            self.check_episodes()
        if self.mode == "tasks":
            self.check_tasks()
        elif self.subset_field and self.models:
            raise InputError(f"subset_field={self.subset_field} names subsets of preference pairs; leave models out")
        elif self.mode == "reward" and not self.names_data:
            raise InputError("data_path: no data given; name pairs or texts for the reward model")
        elif self.prompts and self.names_data:
            raise InputError("prompts and data exclude each other: leave one out, or add the prompts to the data")
        if self.sampling.temperature == 0 and self.sampling.samples_per_prompt > 1:
            raise InputError(
                f"temperature=0 with samples_per_prompt={self.sampling.samples_per_prompt}: greedy responses to a "
                "prompt are all the same; raise the temperature, or take one sample"
            )
        if len(set(self.models)) < len(self.models):
            raise InputError(f"models={' '.join(self.models)}: one is named twice; name each once")

    def check_episodes(self) -> None:
        """Raises InputError for settings that episodes do not take."""
        if self.mode == "tasks":
            raise InputError("tasks bring their own prompts, and take no environment or tools; leave one of them out")
        servers = [name for name in self.models if is_server(name)]
        if servers:
            raise InputError(
                f"environment and tools need a model that is loaded here, and {servers[0]} is a server; name its folder"
            )
        self.environments.check_slots(self.generation.generation_slots, "lower per_device_batch_size")

    def check_tasks(self) -> None:
        """Raises InputError for settings that tasks do not take."""
        if not self.models:
            raise InputError("tasks need a language model: give models")
        servers = [name for name in self.models if is_server(name)]
        if servers:
            raise InputError(f"tasks run on models that are loaded here, and {servers[0]} is a server; name its folder")
        given = {"data_path": self.data.data_path, "data_mixture": self.data.data_mixture}
        given |= {"prompts": self.prompts, "reward_model_name_or_path": self.reward_model_name_or_path}
        given |= {"reward_functions": self.rewards.reward_functions, "html": self.output.html}
        given |= {"jsonl": self.output.jsonl}
        for name, value in given.items():
            if value:
                raise InputError(f"tasks bring their own data and scores, and take no {name}; leave it out")


def is_server(name: str) -> bool:
    """True for the address of a server."""
    return name.startswith(SERVER)
