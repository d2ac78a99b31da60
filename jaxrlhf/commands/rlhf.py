"""All steps in one run, each in a subfolder, with one report and one summary: SFT, reward model, PPO; or SFT, DPO."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from jaxrlhf.config import field, save_yaml, to_dict
from jaxrlhf.config.files import write_json_atomic
from jaxrlhf.data import DataConfig
from jaxrlhf.distributed import from_primary, is_primary, joined
from jaxrlhf.errors import InputError
from jaxrlhf.models import read_config
from jaxrlhf.rl.config import PPOConfig, PPOOptions
from jaxrlhf.rl.run import train_ppo
from jaxrlhf.runs import what_is_there
from jaxrlhf.runs.report import write_report
from jaxrlhf.trainers.dpo import DPOConfig, DPOOptions, train_dpo
from jaxrlhf.trainers.reward import RewardConfig, RewardOptions, train_reward
from jaxrlhf.trainers.settings import FolderConfig, StartConfig, TrainingMeshConfig
from jaxrlhf.trainers.sft import SFTConfig, SFTOptions, train_sft

ALIGNMENTS = ("ppo", "dpo")
STEPS = ("sft", "reward", "ppo", "dpo")


@dataclass(frozen=True)
class BaseModelsConfig(StartConfig):
    """The models to start from."""

    actor_model_name_or_path: str | None = field(
        None, "language model that step 1 fine-tunes", aliases=("actor_model", "model_name_or_path")
    )
    reward_model_name_or_path: str | None = field(
        None,
        "language model that step 2 makes a reward model of; default: the result of step 1",
        aliases=("reward_model", "critic_model_name_or_path"),
    )


@dataclass(frozen=True)
class RLHFConfig(DataConfig, BaseModelsConfig, TrainingMeshConfig, FolderConfig):
    """The run of all steps."""

    data_split: str = field(
        "2,4,4", "shares of the training rows for sft,reward,ppo, without overlap; dpo takes those of reward and ppo"
    )
    alignment: str = field(
        "ppo", "what follows step 1. ppo: a reward model, then PPO; dpo: DPO in place of both", choices=ALIGNMENTS
    )
    sft: SFTOptions = field(SFTOptions(), "step 1")
    reward: RewardOptions = field(RewardOptions(), "step 2")
    ppo: PPOOptions = field(PPOOptions(), "step 3")
    dpo: DPOOptions = field(DPOOptions(), "step 2 of --alignment dpo")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment == "dpo" and self.reward_model_name_or_path is not None:
            raise InputError(
                f"reward_model_name_or_path={self.reward_model_name_or_path}: alignment=dpo trains no reward model; "
                "leave it out, or choose --alignment ppo"
            )


def check_exports(config: RLHFConfig) -> None:
    """Refuse steps that would leave only an adapter where the next step needs a model."""
    for name in ("sft", "reward") if config.alignment == "ppo" else ("sft",):
        if getattr(config, name).lora_export == "adapter":
            raise InputError(f"{name}.lora_export=adapter: the next step needs the merged model; choose merged or both")


def step_configs(config: RLHFConfig) -> dict[str, Any]:
    """The steps' own configs by name, in order: what they share from `config`, the rest from their sections."""

    def build(cls: type, section: Any, name: str, **changes: Any) -> Any:
        known = {f.name for f in fields(cls)}
        shared = {f.name: getattr(config, f.name) for f in fields(config) if f.name in known}
        own = {f.name: getattr(section, f.name) for f in fields(section)}
        return cls(**(shared | own | {"output_dir": str(Path(config.output_dir) / name)} | changes))

    sft = build(SFTConfig, config.sft, "sft", model_name_or_path=config.actor_model_name_or_path)
    start = config.reward_model_name_or_path or sft.output_dir
    none = {"model_type": None, "config_overrides": {}}
    if config.alignment == "dpo":
        return {"sft": sft, "dpo": build(DPOConfig, config.dpo, "dpo", model_name_or_path=sft.output_dir, **none)}
    reward = build(RewardConfig, config.reward, "reward", model_name_or_path=start, **none)
    models = {"actor_model_name_or_path": sft.output_dir, "critic_model_name_or_path": reward.output_dir}
    return {"sft": sft, "reward": reward, "ppo": build(PPOConfig, config.ppo, "ppo", **models)}


def train_rlhf(config: RLHFConfig) -> dict[str, Any]:
    """Run all steps and write `summary.json` and `report.html`; returns the summary.

    With `resume`, finished steps are kept and the unfinished one continues from its newest checkpoint.
    """
    if not config.output_dir:
        raise InputError("output_dir: name the folder that the run should write to")
    root = Path(config.output_dir)
    step_configs(config)["sft"].tokenizer_source  # noqa: B018 - refuses contradictory model flags before a write
    check_exports(config)
    config = joined(config)
    stages = step_configs(config)
    check_vocabularies(config)
    if is_primary():
        check_root(root, config)
        root.mkdir(parents=True, exist_ok=True)
        save_yaml(config, root / "config.yaml")
    train: dict[str, Callable[[Any], Any]] = {"sft": train_sft, "reward": train_reward, "ppo": train_ppo}
    train["dpo"] = train_dpo
    summaries = {}
    for number, (name, stage) in enumerate(stages.items(), start=1):
        say(f"── step {number} of {len(stages)}: {name} → {stage.output_dir}")
        done = from_primary(f"looking for a finished {name} step", partial(finished, stage)) if config.resume else None
        if done:
            say(f"   finished before ({done['steps']} steps), kept")
        else:
            train[name](stage)
        summaries[name] = from_primary(f"reading the summary of {name}", partial(summary_of, stage))
    summary = summarise(summaries)
    if is_primary():
        write_json_atomic(root / "summary.json", summary)
        write_report(root)
    return summary


def say(text: str) -> None:
    if is_primary():
        print(text, flush=True)


def summary_of(stage: Any) -> dict[str, Any]:
    return json.loads((Path(stage.output_dir) / "summary.json").read_text(encoding="utf-8"))


def check_vocabularies(config: RLHFConfig) -> None:
    """Refuse, before any step is trained, two base models that PPO could not use together."""
    names = (config.actor_model_name_or_path, config.reward_model_name_or_path)
    if None not in names:
        actor, reward = (read_config(name).vocab_size for name in names)
        if actor != reward:
            raise InputError(
                f"actor {names[0]} has {actor} tokens in its vocabulary, reward model {names[1]} has {reward}: they "
                "must share one tokenizer, because the reward model reads what the actor writes"
            )


def check_root(root: Path, config: RLHFConfig) -> None:
    found = [name for name in STEPS if what_is_there(root / name)]
    if found and not (config.resume or config.overwrite_output_dir):
        raise InputError(
            f"output_dir {root} already holds a run ({', '.join(found)}); choose another folder, continue it with "
            "--resume, or start over with --overwrite_output_dir"
        )


def finished(stage: Any) -> dict[str, Any] | None:
    """The summary of a step that ran to its end with the same settings (on whatever mesh), or None."""
    folder = Path(stage.output_dir)
    if not (folder / "summary.json").is_file() or not (folder / "config.yaml").is_file():
        return None
    from jaxrlhf.config import load_yaml

    before, now = (to_dict(c) for c in (load_yaml(type(stage), folder / "config.yaml"), stage))
    for name in ("resume", "overwrite_output_dir", "mesh_data", "mesh_fsdp", "mesh_tensor"):
        before.pop(name), now.pop(name)
    return summary_of(stage) if before == now else None


def summarise(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that tell how each step went, by names that say which."""
    figures = {
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
    found = {name: stages[step][when][what] for name, (step, when, what) in figures.items() if step in stages}
    return found | {"seconds": {name: stage["seconds"] for name, stage in stages.items()}}
