"""Runs all three steps (`jaxrlhf rlhf`) on the first N devices, with the flags of DeepSpeed-Chat's train.py.

    python scripts/train.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m --num-gpus 8

--num-gpus N    the first N GPUs, or N simulated devices on the CPU where there is no GPU (default: all); with several
                processes, N devices in each
--output-dir    default: output
--data_path     default: Dahoas/rm-static, whose prompts carry their own markup (--prompt_template raw)

Every flag of `jaxrlhf rlhf --help` works, including sections such as `--ppo.kl_coef 0.05`. With `--config file.yaml`
the script adds no defaults.
"""

import os
import sys

from jaxrlhf.cli import main as run_command
from jaxrlhf.errors import InputError
from jaxrlhf.xla_flags import set_xla_flags

DEFAULTS = {
    "output_dir": ["--output_dir", "output"],
    "data_path": ["--data_path", "Dahoas/rm-static", "--prompt_template", "raw"],
}


def take_num_gpus(argv: list[str]) -> tuple[int | None, list[str]]:
    """Splits the arguments into the value of --num-gpus (or None) and the rest. Raises InputError for a wrong value."""
    number, rest, tokens = None, [], iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name not in ("--num-gpus", "--num_gpus"):
            rest.append(token)
            continue
        value = value if equals else next(tokens, "")
        if not value.isdecimal() or int(value) < 1:
            raise InputError(f"--num-gpus takes a whole number of 1 or more, got {value!r}")
        number = int(value)
    return number, rest


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
        number, rest = take_num_gpus(argv)
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
