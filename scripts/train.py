"""Runs the three steps (`jaxrlhf rlhf`) with the flags of DeepSpeed-Chat's train.py and e2e_rlhf.py.

    python scripts/train.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m --num-gpus 8
    python scripts/train.py --deployment-type single_node --actor-model 6.7b --step 1 2

--deployment-type single_gpu, single_node or multi_node: takes the recipe of examples/deepspeed_chat for the actor's
                size (default: 1.3b) on 1, 8 or 64 GPUs; other flags change it
--num-gpus N    the first N GPUs, or N simulated devices on the CPU where there is no GPU (default: all); with several
                processes, N devices in each
--step          steps to run, such as 1 2 (default: all); later ones start from results in --output-dir
--output-dir    default: output
--data_path     default: Dahoas/rm-static, whose prompts carry their own markup (--prompt_template raw)

Every flag of `jaxrlhf rlhf --help` works, including sections such as `--ppo.kl_coef 0.05`. With `--config file.yaml`
the script adds no defaults; a recipe has its own.
"""

import os
import sys
from pathlib import Path

from jaxrlhf.cli import main as run_command
from jaxrlhf.config.xla_flags import set_xla_flags
from jaxrlhf.errors import InputError

DEFAULTS = {
    "output_dir": ["--output_dir", "output"],
    "data_path": ["--data_path", "Dahoas/rm-static", "--prompt_template", "raw"],
}


RECIPES = Path(__file__).resolve().parents[1] / "examples" / "deepspeed_chat"
DEPLOYMENTS = {"single_gpu": "", "single_node": "-node", "multi_node": "-64"}
"""Ending of a recipe's name, after opt-SIZE or opt-SIZE-lora, by deployment type."""


def take(flag: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """Splits the arguments into the value of `flag`, with hyphens or underscores (the last one; or None), and the rest.

    A flag without a value has an empty one.
    """
    found, rest, tokens = None, [], iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name.replace("_", "-") != flag:
            rest.append(token)
        else:
            found = value if equals else next(tokens, "")
    return found, rest


def take_num_gpus(argv: list[str]) -> tuple[int | None, list[str]]:
    """Splits the arguments into the value of --num-gpus (or None) and the rest. Raises InputError for a wrong value."""
    value, rest = take("--num-gpus", argv)
    if value is not None and (not value.isdecimal() or int(value) < 1):
        raise InputError(f"--num-gpus takes a whole number of 1 or more, got {value!r}")
    return None if value is None else int(value), rest


def recipes(size: str, kind: str) -> list[Path]:
    """The recipes for an OPT actor of a size, such as 1.3b: with all parameters trained, and with adapters."""
    names = [f"opt-{size}{lora}{DEPLOYMENTS[kind]}.yaml" for lora in ("", "-lora")]
    return [RECIPES / name for name in names if (RECIPES / name).is_file()]


def with_recipe(argv: list[str]) -> list[str]:
    """`argv` with the recipe that --deployment-type and the actor's size choose, below the other flags.

    Raises InputError naming the recipes there are.
    """
    kind, rest = take("--deployment-type", argv)
    if kind is None:
        return argv
    if kind not in DEPLOYMENTS:
        raise InputError(f"--deployment-type {kind}: must be one of {', '.join(DEPLOYMENTS)}")
    if take("--config", rest)[0] is not None:
        raise InputError("--deployment-type and --config exclude each other: both name a recipe")
    actor = take("--actor-model", rest)[0] or "1.3b"
    found = recipes(Path(actor).name.removeprefix("opt-"), kind)
    if not found:
        known = {path.stem.split("-")[1] for path in RECIPES.glob("opt-*.yaml")}
        sizes = sorted((size for size in known if recipes(size, kind)), key=lambda size: float(size[:-1]))
        raise InputError(
            f"--deployment-type {kind} has no recipe for the actor {actor}; it has recipes for {', '.join(sizes)}. "
            "Name another one by --config"
        )
    print(f"recipe: {found[0]}", file=sys.stderr)
    number = ["--num-gpus", "1"] if kind == "single_gpu" and take("--num-gpus", rest)[0] is None else []
    return ["--config", str(found[0]), *number, *rest]


def with_defaults(argv: list[str]) -> list[str]:
    """`argv` with DEFAULTS for the flags that it lacks; unchanged when it names a config file."""
    given = {token[2:].partition("=")[0].replace("-", "_") for token in argv if token.startswith("--")}
    if "config" in given:
        return argv
    return argv + [part for name, parts in DEFAULTS.items() if name not in given for part in parts]


def restrict_devices(number: int, environment: dict[str, str]) -> dict[str, str]:
    """The environment variables that leave `number` devices visible; set them before JAX starts.

    The XLA flag has no effect where there is a GPU. Raises InputError when CUDA_VISIBLE_DEVICES names fewer devices.
    """
    flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={number}".strip()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1"):
        return {"XLA_FLAGS": flags}  # empty or -1 hides all GPUs
    devices = list(map(str, range(number))) if visible is None else [d for d in visible.split(",") if d.strip()]
    if len(devices) < number:
        raise InputError(
            f"--num-gpus {number}: CUDA_VISIBLE_DEVICES={visible} leaves only {len(devices)}; name more there"
        )
    return {"XLA_FLAGS": flags, "CUDA_VISIBLE_DEVICES": ",".join(devices[:number])}


def has_peers(argv: list[str]) -> bool:
    """True when this is one of several processes, which must connect before JAX starts."""
    from jaxrlhf.distributed.processes import ProcessConfig, detect

    flags = ("--num_processes", "--process_id", "--coordinator_address")
    given = any(
        token.partition("=")[0].replace("-", "_").startswith(f.replace("-", "_")) for token in argv for f in flags
    )
    return given or detect(ProcessConfig())[1] not in (None, 1)


def check_devices(number: int) -> None:
    """Start JAX and raise InputError unless it sees exactly `number` devices."""
    import jax

    found = jax.devices()
    kind = found[0].platform
    if len(found) != number:
        hint = "lower --num-gpus" if len(found) < number else "leave --num-gpus out: all of them are used"
        raise InputError(f"--num-gpus {number}: JAX sees {len(found)} {kind} device(s); {hint}")
    if kind == "cpu" and number > 1:
        print(f"no GPU found: {number} devices are simulated on the CPU", file=sys.stderr)


def main(argv: list[str]) -> int:
    """Selects the devices and runs `jaxrlhf rlhf`; returns its exit status."""
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip())
        return 0
    try:
        number, rest = take_num_gpus(with_recipe(argv))
        if number is not None:
            os.environ.update(restrict_devices(number, dict(os.environ)))
            set_xla_flags(os.environ)
            if not has_peers(rest):
                check_devices(number)
    except InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    return run_command(["rlhf", *with_defaults(rest)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
