"""Runs `jaxrlhf bench`: the speed of the programs as a share of the device's limit and of peers' speed.

    python scripts/benchmark.py --sections ppo --actor opt-125m --critic opt-125m --batch 8 --prompt 128 --answer 128 \
        --peers hf --json result.json

See docs/benchmarks.md and `--help`.
"""

import sys

from jaxrlhf.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
