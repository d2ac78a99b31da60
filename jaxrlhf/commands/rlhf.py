"""All steps in one run, each in a subfolder, with one report and one summary: SFT, reward model, PPO; or SFT, DPO."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from jaxrlhf.config import (
    Ge,
    Le,
    PathName,
    Section,
    Settings,
    alias,
    deepspeed_chat,
    load_yaml,
    save_yaml,
    to_dict,
)
from jaxrlhf.config.files import check_output, read_json, write_json_atomic
from jaxrlhf.data import DataConfig, read_tokenizer
from jaxrlhf.distributed import from_primary, is_primary, joined
from jaxrlhf.errors import InputError
from jaxrlhf.models import read_config
from jaxrlhf.plan.fit import fitted, run_fitted
from jaxrlhf.rl.config import PPOConfig, PPOModels, PPOOptions, ZeroStage
from jaxrlhf.rl.run import train_ppo
from jaxrlhf.runs import what_is_there
from jaxrlhf.runs.report import write_report
from jaxrlhf.runs.working_folder import works_locally
from jaxrlhf.trainers.dpo import DPOConfig, DPOOptions, train_dpo
from jaxrlhf.trainers.reward import RewardConfig, RewardOptions, train_reward
from jaxrlhf.trainers.settings import FolderConfig, ModelConfig, SharedConfig, StartConfig, as_given, exchange_of
from jaxrlhf.trainers.sft import SFTConfig, SFTOptions, train_sft
from jaxrlhf.trainers.tokenizers import TokenizerConfig, check_reads_tokens

C = TypeVar("C", bound=SharedConfig)
Summary = dict[str, Any]
"""The values of a `summary.json`: metrics by name, and times."""
Step = SFTConfig | RewardConfig | DPOConfig | PPOConfig
MODELS = ("model_name_or_path", "actor_model_name_or_path", "reward_model_name_or_path")
"""Settings of the steps that name a model to start from."""


@dataclass(frozen=True)
class BaseModelsConfig(Settings):
    """The models to start from."""

    actor_model_name_or_path: PathName[Annotated[str | None, alias("actor_model", "model_name_or_path")]] = None
    """Language model that step 1 fine-tunes."""
    reward_model_name_or_path: PathName[Annotated[str | None, alias("reward_model", "critic_model_name_or_path")]] = (
        None
    )
    """Language model that step 2 makes a reward model of; default: the result of step 1."""
    start: StartConfig = StartConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()


@dataclass(frozen=True)
class RLHFConfig(SharedConfig):
    """The run of all steps."""

    OTHER_FLAGS = deepspeed_chat.RLHF

    data: DataConfig = DataConfig(data_split="2,4,4")
    models: BaseModelsConfig = BaseModelsConfig()
    alignment: Literal["ppo", "dpo"] = "ppo"
    """Steps after the first. ppo: a reward model, then PPO; dpo: DPO in place of both, on the rows of both."""
    steps: Annotated[tuple[Annotated[int, Ge(1), Le(3)], ...], alias("step")] = (1, 2, 3)
    """Numbers of the steps to run; the results of the steps before them must lie in output_dir."""
    reward_zero_stage: ZeroStage = None
    """zero_stage of step 2, and of the critic of step 3; default: zero_stage."""
    sft: Section[SFTOptions] = SFTOptions()
    reward: Section[RewardOptions] = RewardOptions()
    ppo: Section[PPOOptions] = PPOOptions()
    dpo: Section[DPOOptions] = DPOOptions()

    def check(self) -> None:
        reward = self.models.reward_model_name_or_path
        if self.alignment == "dpo" and reward is not None:
            raise InputError(
                f"reward_model_name_or_path={reward}: alignment=dpo trains no reward model; leave it out, or choose "
                "--alignment ppo"
            )
        if not self.steps or (self.alignment == "dpo" and min(self.steps) > 2):
            number = "1, 2 and 3" if self.alignment == "ppo" else "1 and 2"
            raise InputError(f"steps={' '.join(map(str, self.steps)) or 'none'}: the steps are {number}")


def check_exports(config: RLHFConfig) -> None:
    """Refuses steps that would leave only an adapter where the next step needs a model."""
    for name in ("sft", "reward") if config.alignment == "ppo" else ("sft",):
        if getattr(config, name).lora.lora_export == "adapter":
            raise InputError(f"{name}.lora_export=adapter: the next step needs the merged model; choose merged or both")


def start_of(config: RLHFConfig) -> ModelConfig:
    """The model that step 1 starts from."""
    models = config.models
    return ModelConfig(models.actor_model_name_or_path, models.start, models.tokenizer)


def step_configs(config: RLHFConfig) -> dict[str, Step]:
    """All steps' own configs by name, in order: shared parts from `config`, the others from their sections."""
    shared: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(SharedConfig)}
    base, tokenizer = config.models, config.models.tokenizer

    def build(cls: type[C], name: str, **models: Settings) -> C:
        section = getattr(config, name)
        own: dict[str, Any] = {f.name: getattr(section, f.name) for f in fields(section)}
        own |= models | {"folder": replace(config.folder, output_dir=folder_of(name), url=url_of(name))}
        own["fitting"] = replace(config.fitting, given=given_in(config, name))
        own["tracking"] = replace(config.tracking, run_name=f"{run_name}-{name}")
        return cls(**(shared | own))

    def folder_of(name: str) -> str:
        return str(Path(config.folder.output_dir) / name)

    def url_of(name: str) -> str:
        return f"{config.folder.url.rstrip('/')}/{name}" if config.folder.url else ""

    run_name = config.tracking.run_name or Path(config.folder.output_dir).resolve().name
    start = start_of(config)
    later = replace(base.start, model_type=None, config_overrides={})
    after_sft = ModelConfig(folder_of("sft"), later, tokenizer)
    steps: dict[str, Step] = {"sft": build(SFTConfig, "sft", model=start)}
    if config.alignment == "dpo":
        return steps | {"dpo": build(DPOConfig, "dpo", model=after_sft)}
    reward = replace(after_sft, model_name_or_path=base.reward_model_name_or_path or folder_of("sft"))
    compute, critic = config.compute, config.ppo.critic
    if config.reward_zero_stage is not None:
        compute = replace(compute, zero_stage=config.reward_zero_stage)
        if critic.critic_zero_stage is None:
            critic = replace(critic, critic_zero_stage=config.reward_zero_stage)
    models = PPOModels(folder_of("sft"), folder_of("reward"), tokenizer)
    return steps | {
        "reward": build(RewardConfig, "reward", model=reward, compute=compute),
        "ppo": build(PPOConfig, "ppo", models=models, critic=critic),
    }


def given_in(config: RLHFConfig, section: str) -> tuple[str, ...]:
    """Settings that were given for a step: those of all steps, and those of its section."""
    given = (name.removeprefix(f"{section}.") for name in config.fitting.given)
    return tuple(name for name in given if "." not in name)


@works_locally
def train_rlhf(config: RLHFConfig) -> Summary:
    """Runs the steps and writes `summary.json` and `report.html`; returns the summary.

    With `resume`, finished steps are kept and the unfinished one continues from its newest checkpoint.
    """
    if not config.folder.output_dir:
        raise InputError("output_dir: name the folder that the run should write to")
    root = Path(config.folder.output_dir)
    start_of(config).tokenizer_source  # noqa: B018 - refuses contradictory model flags before a write
    check_exports(config)
    config = joined(config)
    stages = step_configs(config)
    chosen = [name for number, name in enumerate(stages, start=1) if number in config.steps]
    check_vocabularies(config.models)
    if is_primary():
        check_root(root, config.folder, chosen)
        check_earlier(root, stages, chosen)
        check_output(root / "config.yaml", "output_dir")
        save_yaml(as_given(config), root / "config.yaml")
    train: dict[str, Callable[[Any], Any]] = {"sft": train_sft, "reward": train_reward, "ppo": train_ppo}
    train["dpo"] = train_dpo
    exchange = exchange_of(config.folder)
    summaries = {}
    for number, (name, stage) in enumerate(stages.items(), start=1):
        if name not in chosen:
            if from_primary(f"looking for the {name} step", partial(is_finished, stage)):
                summaries[name] = from_primary(f"reading the summary of {name}", partial(summary_of, stage))
            continue
        say(f"── step {number} of {len(stages)}: {name} → {stage.folder.output_dir}")
        if exchange:
            for path in starts_from(stage, root):
                exchange.bring(path)
        stage, done = fitted(stage, name), None
        if config.folder.resume:
            done = from_primary(f"looking for a finished {name} step", partial(finished, stage))
        if done:
            say(f"   finished before ({done['steps']} steps), kept")
        else:
            run_fitted(train[name], stage, name)
        summaries[name] = from_primary(f"reading the summary of {name}", partial(summary_of, stage))
    summary = summarise(summaries)
    if is_primary():
        write_json_atomic(root / "summary.json", summary)
        write_report(root)
    return summary


def say(text: str) -> None:
    if is_primary():
        print(text, flush=True)


def summary_of(stage: SharedConfig) -> Summary:
    return read_json(Path(stage.folder.output_dir) / "summary.json")


def check_vocabularies(models: BaseModelsConfig) -> None:
    """Refuses, before any step is trained, two base models that PPO could not use together."""
    names = (models.actor_model_name_or_path, models.reward_model_name_or_path)
    if names[0] is not None and names[1] is not None:
        labels = f"actor {names[0]}", f"reward model {names[1]}"
        check_reads_tokens(read_tokenizer(names[0]), read_config(names[0]), names[1], labels)


def check_root(root: Path, folder: FolderConfig, chosen: list[str]) -> None:
    """Refuses to run a step in a folder that holds one, except on request."""
    found = [name for name in chosen if what_is_there(root / name)]
    if found and not (folder.resume or folder.overwrite_output_dir):
        raise InputError(
            f"output_dir {root} already holds a run ({', '.join(found)}); choose another folder, continue it with "
            "--resume, or start over with --overwrite_output_dir"
        )


def check_earlier(root: Path, stages: dict[str, Step], chosen: list[str]) -> None:
    """Refuses to run a step without the results of the steps before it that it starts from."""
    for name in chosen:
        needed = starts_from(stages[name], root)
        for number, earlier in enumerate(stages, start=1):
            folder = root / earlier
            if folder in needed and earlier not in chosen and not is_finished(stages[earlier]):
                raise InputError(
                    f"{name} starts from {folder}, which holds no finished run; run step {number} first, by --step "
                    f"{number} with the same output_dir"
                )


def starts_from(stage: Step, root: Path) -> list[Path]:
    """The folders of earlier steps, below `root`, whose models a step starts from."""
    named = {Path(value) for part, value in stage.items() if part in MODELS and value}
    return sorted(path for path in named if path.parent == root)


def is_finished(stage: SharedConfig) -> bool:
    return (Path(stage.folder.output_dir) / "summary.json").is_file()


def finished(stage: SharedConfig) -> Summary | None:
    """The summary of a step that finished with the same settings (on any mesh), or None."""
    folder = Path(stage.folder.output_dir)
    if not is_finished(stage) or not (folder / "config.yaml").is_file():
        return None
    free = dict.fromkeys(
        (
            "resume_from_checkpoint",
            "allow_changes",
            "resume",
            "overwrite_output_dir",
            "mesh_data",
            "mesh_fsdp",
            "mesh_expert",
            "mesh_context",
            "mesh_tensor",
        )
    )
    before, now = (to_dict(c) | free for c in (load_yaml(type(stage), folder / "config.yaml"), as_given(stage)))
    return summary_of(stage) if before == now else None


def summarise(stages: dict[str, Summary]) -> Summary:
    """Metrics of all steps under names of their own."""
    metrics = {
        "sft_eval_loss_before": ("sft", "eval_before", "loss"),
        "sft_eval_loss_after": ("sft", "eval_after", "loss"),
        "reward_eval_accuracy": ("reward", "eval_after", "accuracy"),
        "ppo_reward_before": ("ppo", "eval_before", "scores"),
        "ppo_reward_before_std": ("ppo", "eval_before", "scores_std"),
        "ppo_reward_after": ("ppo", "eval_after", "scores"),
        "ppo_kl": ("ppo", "eval_after", "kl"),
        "dpo_eval_loss": ("dpo", "eval_after", "loss"),
        "dpo_eval_accuracy": ("dpo", "eval_after", "rewards/accuracies"),
        "dpo_eval_margin": ("dpo", "eval_after", "rewards/margins"),
    }
    found = {name: stages[step][when][what] for name, (step, when, what) in metrics.items() if step in stages}
    return found | {"seconds": {name: stage["seconds"] for name, stage in stages.items()}}
