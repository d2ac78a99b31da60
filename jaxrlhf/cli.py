"""The console command `jaxrlhf COMMAND`."""

import contextlib
import difflib
import importlib
import logging
import os
import sys
import traceback
from typing import NamedTuple

from jaxrlhf.config.allocator import keep_memory
from jaxrlhf.config.placeholders import placeholders
from jaxrlhf.config.secrets import redacted
from jaxrlhf.config.xla_flags import find_platform, set_xla_flags
from jaxrlhf.errors import InputError, Interrupted, RunError

PIPE_CLOSED = 141
"""Exit status when the reader of the output is gone, as of a process that SIGPIPE ends."""


class Command(NamedTuple):
    module: str
    config: str | type
    function: str
    help: str
    on_device: bool = True
    """Gets the device's compiler flags and, on a CPU, memory that is kept from step to step."""
    fits: bool = False
    """One trainer's run, which `jaxrlhf.plan.fit` fits to the devices."""

    def config_class(self) -> type:
        """The class of its settings."""
        if isinstance(self.config, str):
            return getattr(importlib.import_module(self.module), self.config)
        return self.config


def owners(setting: str) -> list[str]:
    """The commands that have a setting; those that have it in a section, with the flag that sets it there."""
    from jaxrlhf.config import places_of

    found = [(name, place) for name, c in commands().items() for place in places_of(c.config_class(), setting)]
    return [name if place == setting else f"{name} (--{place})" for name, place in found]


STEPS = {
    "sft": Command("jaxrlhf.trainers.sft", "SFTConfig", "train_sft", "step 1: supervised fine-tuning", fits=True),
    "reward": Command("jaxrlhf.trainers.reward", "RewardConfig", "train_reward", "step 2: reward model", fits=True),
    "dpo": Command(
        "jaxrlhf.trainers.dpo", "DPOConfig", "train_dpo", "steps 2 and 3 in one: DPO on preference pairs", fits=True
    ),
    "kto": Command(
        "jaxrlhf.trainers.kto", "KTOConfig", "train_kto", "steps 2 and 3 in one: KTO on labelled responses", fits=True
    ),
    "distill": Command(
        "jaxrlhf.trainers.distill",
        "DistillConfig",
        "train_distill",
        "a student learns a teacher's distributions",
        fits=True,
    ),
}
OTHERS = {
    "rlhf": Command(
        "jaxrlhf.commands.rlhf", "RLHFConfig", "train_rlhf", "all steps in one run: sft → reward → ppo, or sft → dpo"
    ),
    "sample": Command(
        "jaxrlhf.commands.sample", "SampleConfig", "sample", "best-of-n and rejection sampling: SFT data"
    ),
    "data": Command(
        "jaxrlhf.commands.data", "DataViewConfig", "show_data", "what a step sees of your data and trains on", False
    ),
    "eval": Command(
        "jaxrlhf.commands.eval", "EvalConfig", "evaluate", "compare models, measure a reward model, run lm-eval's tasks"
    ),
    "chat": Command("jaxrlhf.commands.chat", "ChatConfig", "chat", "talk to a model"),
    "serve": Command("jaxrlhf.commands.serve", "ServeConfig", "serve", "OpenAI-compatible server with a chat page"),
    "convert": Command(
        "jaxrlhf.commands.convert", "ConvertConfig", "convert", "Hugging Face folder ↔ checkpoint", False
    ),
    "plan": Command(
        "jaxrlhf.plan.command",
        "PlanConfig",
        "run_plan",
        "memory, time and cost of a training run before renting",
        False,
    ),
    "bench": Command("jaxrlhf.bench.command", "BenchConfig", "bench", "speed against the hardware's limit and peers"),
    "demo": Command("jaxrlhf.commands.demo", "DemoConfig", "run_demo", "the three steps on the embedded data, on CPU"),
}


def commands() -> dict[str, Command]:
    """All commands by name; those of step 3 are the declared algorithms."""
    from jaxrlhf.rl.algorithms import ALGORITHMS
    from jaxrlhf.rl.config import CONFIGS

    step_3 = {
        name: Command("jaxrlhf.rl.run", CONFIGS[name], "train_ppo", algorithm.summary, fits=True)
        for name, algorithm in ALGORITHMS.items()
    }
    return STEPS | step_3 | OTHERS


def usage() -> str:
    lines = [f"  {name:<11} {command.help}" for name, command in commands().items()]
    return "\n".join(
        [
            "usage: jaxrlhf [--verbose] COMMAND [--config file.yaml] [--flag value …]",
            "",
            "RLHF training for chat models in JAX.",
            "",
            *lines,
            "",
            "`jaxrlhf COMMAND --help` lists a command's flags; every flag is also a key of the YAML file.",
            "`--verbose` prints the flags of compiler and allocator that are set for the device, which kernels run,",
            "with reasons, and the trace of an error's cause.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or that of the error's kind (`jaxrlhf.errors`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    asks_for_help = not argv or argv[0] == "help" or bool({"-h", "--help"} & set(argv))
    try:
        with placeholders() if asks_for_help else contextlib.nullcontext():
            status = main_of(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough, as in `jaxrlhf --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes once more, and fails
        return PIPE_CLOSED
    return status


def main_of(argv: list[str]) -> int:
    """`main`, of the words of a command."""
    verbose = "--verbose" in argv
    argv = [word for word in argv if word != "--verbose"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name == "--version":
        from importlib.metadata import version

        print(f"jaxrlhf {version('jaxrlhf')}")
        return 0
    try:
        command = (STEPS | OTHERS).get(name) or commands().get(name)
        if command is None:
            raise InputError(unknown_command(name))
        if command.on_device and not {"-h", "--help"} & set(rest):
            platform = find_platform(os.environ)
            set_xla_flags(os.environ, platform, verbose=verbose)
            keep_memory(os.environ, platform, verbose=verbose)
        return run(name, command, rest, verbose)
    except Interrupted as stop:  # every process stops after the same step, so one line is enough
        from jaxrlhf.distributed import is_primary

        if is_primary():
            print(f"jaxrlhf: {stop}", file=sys.stderr)
        return stop.status
    except RunError as error:
        print(redacted(f"jaxrlhf: error: {error}"), file=sys.stderr)
        if verbose and error.__cause__ is not None:
            print(redacted("".join(traceback.format_exception(error.__cause__))), file=sys.stderr)
        tell_others(error, error.status)
        return error.status
    except KeyboardInterrupt as error:
        print("jaxrlhf: interrupted", file=sys.stderr)
        tell_others(error, 130)
        return 130


def unknown_command(name: str) -> str:
    """Names the commands that are spelled like `name`, or all of them."""
    near = difflib.get_close_matches(name.lower(), commands(), n=3, cutoff=0.6)
    if near:
        return f"there is no command {name!r}; did you mean {' or '.join(near)}? `jaxrlhf --help` lists all commands"
    return f"there is no command {name!r}; the commands are {', '.join(commands())}"


def tell_others(error: BaseException, status: int) -> None:
    """End the other processes of the run too, when there are any (and this one with them)."""
    if "jaxrlhf.distributed" in sys.modules:
        sys.modules["jaxrlhf.distributed"].fail(error, status)


def run(name: str, command: Command, argv: list[str], verbose: bool = False) -> int:
    # Transformers and tokenizers say much that is of no use here; ours is shown.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found", which nobody needs
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(hide_secrets)
    logging.getLogger("jaxrlhf").setLevel(logging.INFO)
    logging.getLogger("jaxrlhf.kernels").setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs a traceback per thread for what we say once
    from jaxrlhf.config import parse
    from jaxrlhf.config.compilation import CompilationConfig, use_compilation_cache

    config = parse(command.config_class(), argv, f"jaxrlhf {name}", command.help, owners)
    use_compilation_cache(getattr(config, "compilation", CompilationConfig()))
    function = getattr(importlib.import_module(command.module), command.function)
    if command.fits:
        from jaxrlhf.plan.fit import run_fitted

        run_fitted(function, config)
    else:
        function(config)
    return 0


def hide_secrets(record: logging.LogRecord) -> bool:
    """Replaces secrets in a log record (a filter)."""
    record.msg, record.args = redacted(record.getMessage()), None
    return True


if __name__ == "__main__":
    sys.exit(main())
