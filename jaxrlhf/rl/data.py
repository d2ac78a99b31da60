"""Data of a run of step 3: prompts with the columns that score responses, and pretraining text."""

from dataclasses import dataclass

from jaxrlhf.data import PromptData, TextBlocks, Tokenizer, load_data, load_text
from jaxrlhf.data.settings import cache_folder
from jaxrlhf.environments import Environments
from jaxrlhf.rewards import Rewards
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.outcomes import data_columns


@dataclass(frozen=True)
class RLData:
    """Data of a run: prompts to train on and held-out prompts, and blocks of pretraining text."""

    train: PromptData
    held_out: PromptData
    text: TextBlocks | None = None
    held_out_text: TextBlocks | None = None


def read_data(
    config: PPOConfig, tokenizer: Tokenizer, rewards: Rewards, environments: Environments | None = None
) -> RLData:
    """Reads prompts and, with ptx_coef, pretraining text."""
    train, held_out = load_data(config.data, tokenizer, "ppo", *data_columns(rewards, environments))
    if not config.algorithm.ptx_coef:
        return RLData(train, held_out)
    text = load_text(
        config.ptx.ptx_data_path,
        tokenizer,
        field=config.ptx.ptx_field,
        block=config.ptx.ptx_block_size or config.data.max_prompt_seq_len + config.sampling.max_new_tokens,
        held_out=config.data.eval_fraction,
        cache=cache_folder(config.data),
        segments=config.data.packing is not False,
        seed=config.data.seed,
    )
    return RLData(train, held_out, *text)
