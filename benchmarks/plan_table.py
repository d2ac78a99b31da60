"""The planner's tables for DeepSpeed-Chat's published grid, as they stand in docs/planning.md.

    python benchmarks/plan_table.py

Prompts and answers of 256 tokens, 131.9 k prompts, OPT actors with OPT-350m as reward model, A100-80G at 4 dollars an
hour: the setting of arXiv 2308.01320. Each row is the asked setting or, where that does not fit, the nearest that does.
"""

from jaxrlhf.plan.command import make_plan
from jaxrlhf.plan.report import gib
from jaxrlhf.plan.settings import PlanConfig

MODELS = ("opt-1.3b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b", "opt-175b")
# Hours of an epoch of step 3's data as published: single node (table 1), 64 GPUs (table 2).
PUBLISHED = {
    (8, "opt-6.7b"): "4.1",
    (8, "opt-13b"): "9",
    (8, "opt-30b"): "18",
    (8, "opt-66b"): "50",
    (64, "opt-13b"): "1.25",
    (64, "opt-30b"): "4",
    (64, "opt-66b"): "7.5",
    (64, "opt-175b"): "20",
}
COLUMNS = (
    "model",
    "additional flags",
    "generate",
    "score",
    "train",
    "s/iteration",
    "hours",
    "cost",
    "published",
)


def row(actor: str, devices: int) -> list[str]:
    asked = PlanConfig.create(
        actor=actor,
        device="a100-80g",
        devices=devices,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        price_per_device_hour=4.0,
    )
    plan = make_plan(asked)
    flags = "none"
    if not plan.fits:
        if plan.nearest is None:
            return [actor, f"does not fit; needs `{plan.larger.flags}`" if plan.larger else "does not fit", *["-"] * 7]
        flags, plan = f"`{plan.nearest.flags}`", make_plan(plan.nearest.config)
    cost = plan.cost
    sizes = [gib(plan.programs[name].bytes_per_device) for name in ("generate", "score", "train")]
    times = [f"{cost.seconds_per_iteration:.1f}", f"{cost.hours:.2f}", f"{cost.cost:,.0f}"]
    return [actor, flags, *sizes, *times, PUBLISHED.get((devices, actor), "-")]


def main() -> None:
    for devices in (1, 8, 64):
        print(f"\n### {devices} × A100-80G\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for actor in MODELS:
            print(f"| {' | '.join(row(actor, devices))} |")


if __name__ == "__main__":
    main()
