"""The data sets that jaxrlhf knows by name: those of DeepSpeed-Chat, and those in wide use today.

Columns, splits and licences are those of the cards on the hub. Where DeepSpeed-Chat has a rule for labels or markup,
it is kept, except that ties are left out. A set that DeepSpeed-Chat reads for sft alone serves sft alone.
"""

from jaxrlhf.data import conversions
from jaxrlhf.data.registry import NamedDataset, by_name

PAIR = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
PARQUET = "refs/convert/parquet"
"""Branch with the hub's own Parquet files, for sets whose main branch holds a loading script (datasets 4 runs none)."""
SFT = ("sft",)
SFT_AND_PPO = ("sft", "ppo")

DEEPSPEED_CHAT = (
    NamedDataset(
        path="Dahoas/rm-static",
        eval_split="test",
        format="preference",
        fields=PAIR,
        prompt_template="raw",  # "\n\nHuman: … \n\nAssistant:" is in the prompt
    ),
    NamedDataset(
        path="Dahoas/full-hh-rlhf",
        eval_split="test",
        format="preference",
        fields=PAIR,
        prompt_template="raw",
    ),
    NamedDataset(
        path="Dahoas/synthetic-instruct-gptj-pairwise",
        format="preference",
        fields=PAIR,
    ),
    NamedDataset(
        path="yitingxie/rlhf-reward-datasets",
        eval_split="test",
        format="preference",
        convert=conversions.yitingxie,
        prompt_template="raw",
    ),
    NamedDataset(
        path="openai/webgpt_comparisons",
        revision=PARQUET,
        format="preference",
        convert=conversions.webgpt,
    ),
    NamedDataset(
        path="stanfordnlp/SHP",
        licence="unknown (Reddit posts, under the terms of its API)",
        eval_split="validation",
        format="preference",
        convert=conversions.shp,
    ),
    NamedDataset(
        path="pvduy/sharegpt_alpaca_oa_vicuna_format",
        steps=SFT,
        eval_split="test",
        format="prompt_completion",
        convert=conversions.vicuna_markup,
        prompt_template="raw",
    ),
    NamedDataset(
        path="wangrui6/Zhihu-KOL",
        steps=SFT,
        format="prompt_completion",
        fields={"prompt": "INSTRUCTION", "completion": "RESPONSE"},
    ),
    *(
        NamedDataset(
            path=f"Cohere/miracl-{language}-queries-22-12",
            licence="apache-2.0",
            eval_split="dev",
            format="preference",
            fields={
                "prompt": "query",
                "chosen": "positive_passages.0.text",
                "rejected": "negative_passages.0.text",
            },
        )
        for language in ("zh", "ja")
    ),
    NamedDataset(
        path="Hello-SimpleAI/HC3-Chinese",
        licence="cc-by-sa-4.0",
        steps=SFT,
        revision=PARQUET,
        data_dir="all",  # the other folders hold parts of it
        format="prompt_completion",
        fields={"prompt": "question", "completion": "human_answers.0"},
    ),
    *(
        NamedDataset(
            path="apple/mkqa",
            name=f"mkqa-{name}",
            licence="cc-by-3.0",
            steps=SFT,
            revision="refs/pr/5",  # Parquet files; the hub converted none by itself
            format="prompt_completion",
            convert=conversions.mkqa(language),
        )
        for name, language in (("Chinese", "zh_cn"), ("Japanese", "ja"))
    ),
    NamedDataset(
        path="lmqg/qg_jaquad",
        licence="cc-by-sa-3.0",
        steps=SFT,
        eval_split="validation",
        revision=PARQUET,
        format="prompt_completion",
        fields={"prompt": "question", "completion": "sentence"},
    ),
    NamedDataset(
        path="lmqg/qag_jaquad",
        licence="cc-by-sa-4.0",
        steps=SFT,
        eval_split="validation",
        revision=PARQUET,
        format="prompt_completion",
        fields={"prompt": "questions.0", "completion": "paragraph"},
    ),
)

TODAY = (
    NamedDataset(
        path="Anthropic/hh-rlhf",
        licence="mit",
        eval_split="test",
        format="preference_implicit",  # its turns become messages, which the chat template renders
    ),
    NamedDataset(
        path="HuggingFaceH4/ultrachat_200k",
        licence="mit",
        steps=SFT_AND_PPO,
        split="train_sft",
        eval_split="test_sft",
        format="messages",
    ),
    NamedDataset(
        path="HuggingFaceH4/ultrafeedback_binarized",
        licence="mit",
        split="train_prefs",
        eval_split="test_prefs",
        format="preference_implicit",  # `prompt` repeats the first message
    ),
    NamedDataset(
        path="openbmb/UltraFeedback",
        licence="mit",
        format="ranked",
        convert=conversions.ultrafeedback,
    ),
    NamedDataset(
        path="nvidia/HelpSteer2",
        licence="cc-by-4.0",
        eval_split="validation",
        format="ranked",
        convert_all=conversions.helpsteer2,
    ),
    NamedDataset(
        path="HuggingFaceTB/smoltalk",
        licence="apache-2.0 for its own parts; other parts have their sources' licences",
        steps=SFT_AND_PPO,
        config="all",
        eval_split="test",
        format="messages",
    ),
    NamedDataset(
        path="allenai/tulu-3-sft-mixture",
        licence="odc-by; parts of it have their own licences, some non-commercial",
        steps=SFT_AND_PPO,
        format="messages",
    ),
    NamedDataset(
        path="OpenAssistant/oasst1",
        licence="apache-2.0",
        eval_split="validation",
        convert_all=conversions.oasst,  # messages for sft, ranked for the other steps
    ),
    NamedDataset(
        path="tatsu-lab/alpaca",
        licence="cc-by-nc-4.0",
        steps=SFT_AND_PPO,
        format="alpaca",  # `text` repeats the other columns
    ),
    NamedDataset(
        path="databricks/databricks-dolly-15k",
        licence="cc-by-sa-3.0",
        steps=SFT_AND_PPO,
        format="alpaca",
        fields={"instruction": "instruction", "input": "context", "output": "response"},
    ),
    NamedDataset(
        path="openai/gsm8k",
        licence="mit",
        steps=SFT_AND_PPO,
        config="main",
        eval_split="test",
        format="prompt_completion",
        fields={"prompt": "question", "completion": "answer"},
    ),
    NamedDataset(
        path="trl-lib/tldr",
        steps=SFT_AND_PPO,
        eval_split="validation",
        format="prompt_completion",
        fields={"prompt": "prompt", "completion": "completion"},
    ),
    NamedDataset(
        path="trl-lib/ultrafeedback-prompt",
        steps=("ppo",),
        eval_split="test",
        format="prompt",
        fields={"prompt": "prompt"},
    ),
)

KNOWN = by_name((*DEEPSPEED_CHAT, *TODAY))
