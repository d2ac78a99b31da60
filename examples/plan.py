"""Plans of the recipes that name devices: the tables of examples/README.md.

    python examples/plan.py [FILE.yaml …]

A recipe names its devices in a comment, `# devices: 8 x a100-80g`. Sizes are GiB per device, of the largest of the
three programs of step 3; hours are those of one epoch of 131.9 k prompts, or of the whole run for GSM8K, by the
roofline. GRPO is planned as PPO with a critic and a reward model of 0.5 B that it does not have: an upper bound.
"""

import re
import sys
from pathlib import Path
from typing import Any

from jaxrlhf.commands.rlhf import RLHFConfig, step_configs
from jaxrlhf.config import load_yaml
from jaxrlhf.plan.command import make_plan
from jaxrlhf.plan.report import gib
from jaxrlhf.plan.settings import SHOWN, PlanConfig
from jaxrlhf.rl.config import GRPOConfig

FOLDER = Path(__file__).parent
GSM8K = {"actor": "qwen2.5-1.5b", "reward": "qwen2.5-0.5b", "train_rows": 7473 * 8}


def devices_of(path: Path) -> tuple[int, str] | None:
    """The number and kind of devices that a recipe names; None where it names none."""
    found = re.search(r"^# devices: (\d+) x (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return None if found is None else (int(found.group(1)), found.group(2))


def plan_config(path: Path, **changes: Any) -> PlanConfig:
    """The planner's settings of step 3 of a recipe for `jaxrlhf rlhf` or `jaxrlhf grpo`, with `changes`."""
    count, device = devices_of(path)
    if path.stem == "grpo":
        step, models = load_yaml(GRPOConfig, path), GSM8K
    else:
        config = load_yaml(RLHFConfig, path)
        step = step_configs(config)["ppo"]
        models = config.models
        models = {"actor": models.actor_model_name_or_path, "reward": models.reward_model_name_or_path}
    values = {name: step.value(name) for name in SHOWN}
    return PlanConfig.create(**(values | models | {"device": device, "devices": count} | changes))


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]]
    recipes = sorted((FOLDER / "deepspeed_chat").glob("*.yaml"))
    with_ppo = [path for path in recipes if "jaxrlhf rlhf" in path.read_text(encoding="utf-8")]
    paths = paths or [*with_ppo, FOLDER / "gsm8k" / "grpo.yaml"]
    print("| recipe | devices | responses per step | GiB per device | hours |\n|---|---|---|---|---|")
    for path in paths:
        plan = make_plan(plan_config(path))
        size = f"{gib(plan.peak)} of {gib(plan.capacity)}" + ("" if plan.fits else ": does not fit")
        count, device = devices_of(path)
        name = f"{path.parent.name}/{path.name}"
        print(f"| `{name}` | {count} × {device} | {plan.system.rows} | {size} | {plan.cost.hours:.1f} |")


if __name__ == "__main__":
    main()
