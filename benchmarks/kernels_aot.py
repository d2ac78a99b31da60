"""Compile our kernels for an A100, an H200 and a TPU, none of them present, and note registers and spills.

    python benchmarks/kernels_aot.py [--json benchmarks/results/kernels_aot.json] [--device a100-80g h200 v5e]

Needs the extras `plan-cuda` and `plan-tpu`. `jaxrlhf bench --render` puts the file into docs/benchmarks.md.
"""

import argparse
import os
import sys
from pathlib import Path

OUTPUT = Path(__file__).parent / "results" / "kernels_aot.json"
PACKAGES = ("jax", "libtpu", "jax-cuda12-plugin")


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from compiled_kernels import TARGETS, kernel_table

    from jaxrlhf.bench.record import installed_version, provenance, write
    from jaxrlhf.config.files import check_output

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default=str(OUTPUT), help="file for the result")
    parser.add_argument("--device", nargs="+", choices=TARGETS, default=list(TARGETS), help="what to compile for")
    options = parser.parse_args()
    check_output(options.json, "json")
    origin = provenance()
    origin = {name: origin[name] for name in ("command", "commit", "time", "python")}
    versions = {name: found for name in PACKAGES if (found := installed_version(name))}
    write(options.json, origin | {"versions": versions, "kernels": kernel_table(tuple(options.device))})


if __name__ == "__main__":
    sys.exit(main())
