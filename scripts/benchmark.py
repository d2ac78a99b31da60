"""`jaxrlhf bench` as a script: how fast the programs are, against the device's limit and against peers.

    python scripts/benchmark.py --sections ppo --actor opt-125m --critic opt-125m --batch 8 --prompt 128 --answer 128 \
        --peers hf --json result.json

See docs/benchmarks.md and `--help`.
"""

import sys

from jaxrlhf.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
