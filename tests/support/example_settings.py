"""Settings that the tests of config parse, save and print, as those of the commands are made."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from jaxrlhf.config import (
    Derived,
    Fraction,
    FromYaml,
    Lasting,
    MayChange,
    NonNegative,
    PositiveInt,
    Section,
    Settings,
    alias,
    parse,
)
from jaxrlhf.errors import InputError


@dataclass(frozen=True)
class Data(Settings, may_change=True):
    """Data and tokenisation."""

    data_path: tuple[str, ...] = ()
    """Files or folders, 100% of each."""
    data_split: tuple[int, ...] = ()
    """Shares of the steps."""
    prompt_template: str = "Human: {prompt} Assistant: {response}"
    """Template."""
    seed: Lasting[int] = 0
    """Seed."""


def specs_of(given):
    return [f"{name}:{value}" for name, value in given.items()] if isinstance(given, dict) else given


@dataclass(frozen=True)
class Training(Settings):
    """Training loop."""

    learning_rate: Annotated[NonNegative, alias("lr")] = 1e-4
    """Peak learning rate."""
    offset: float = 0.0
    """Any number."""
    lr_scheduler_type: Literal["linear", "cosine"] = "cosine"
    """Schedule."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """Stage."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype."""
    remat: bool = True
    """Rematerialise."""
    max_steps: MayChange[PositiveInt | None] = None
    """Steps."""
    share: Fraction = 0.5
    """Share of something."""
    system: str | None = None
    """Text, or none."""
    weights: tuple[float, ...] = ()
    """Weights."""
    config_overrides: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Overrides of the model's config."""
    specs: Annotated[tuple[str, ...], FromYaml(specs_of)] = ()
    """Written as a mapping in YAML."""
    rows: Derived[int] = 1
    """Taken from elsewhere."""


@dataclass(frozen=True)
class SFT(Settings):
    """Supervised fine-tuning."""

    HIDDEN = frozenset({"zero_stage"})

    data: Data = Data()
    training: Training = Training()
    loss_on: Literal["response", "all"] = "response"
    """Counted tokens."""

    def check(self) -> None:
        if self.loss_on == "all" and self.data.seed == 13:
            raise InputError("loss_on=all and seed=13 exclude each other")


@dataclass(frozen=True)
class Step(Settings):
    """A step of the run."""

    training: Training = Training(learning_rate=3e-4)


@dataclass(frozen=True)
class Pipeline(Settings):
    """Two steps."""

    output_dir: str
    """Run folder."""
    data: Data = Data(data_path=("demo",))
    sft: Section[Step] = Step()
    ppo: Section[Step] = Step(Training(learning_rate=1e-5))


def flags(*argv, config=SFT):
    return parse(config, list(argv), "jaxrlhf sft", "Fine-tune.")


def yaml_file(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def error_of(*argv, config=SFT):
    with pytest.raises(InputError) as caught:
        flags(*argv, config=config)
    return str(caught.value)
