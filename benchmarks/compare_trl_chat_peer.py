"""One run of TRL's SFT, DPO or GRPO for compare_trl_chat.py, by the interpreter of TRL's own environment.

    compare_trl_chat_peer.py TRAINER --config FILE [TRL's flags]

The environment names the order of the rows, COMPARE_ORDER, and the file of the result, COMPARE_RESULT.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from compare_trl_side import brief
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
}


class Clock(TrainerCallback):
    """Seconds from the end of a step to the end of the next; the first from its own beginning."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.ends:
            self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    trainer_class, config_class = TRAINERS[sys.argv[1]]
    parser = trl.TrlParser((trl.ScriptArguments, config_class, trl.ModelConfig))
    script, args, model_args = parser.parse_args_and_config(sys.argv[2:])
    args.disable_tqdm = True
    args.train_sampling_strategy, args.shuffle_dataset = "sequential", False  # the order is given
    args.eval_on_start = args.eval_strategy != "no"
    rows = load_dataset(script.dataset_name)
    order = np.load(os.environ["COMPARE_ORDER"])
    clock = Clock()
    more: dict[str, Any] = {"reward_funcs": [brief]} if sys.argv[1] == "grpo" else {}
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype=torch.float32),
        args=args,
        train_dataset=rows["train"].select(order),
        eval_dataset=rows["test"] if args.eval_on_start else None,
        processing_class=AutoTokenizer.from_pretrained(model_args.model_name_or_path),
        callbacks=[clock],
        **more,
    )
    trainer.train()
    result = {
        "seconds": np.diff(clock.ends).tolist(),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "log": trainer.state.log_history,
    }
    Path(os.environ["COMPARE_RESULT"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
