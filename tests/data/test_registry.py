"""Named data sets: rows of the real shape, in our own words, become rows of a format; and registries of users."""

import pytest
from chat_tokenizers import chat_tokenizer
from datasets import Dataset, DatasetDict

from jaxrlhf.data import DataConfig, load_data
from jaxrlhf.data.columns import Columns, look_up
from jaxrlhf.data.formats import FORMATS, STEPS
from jaxrlhf.data.known_datasets import DEEPSPEED_CHAT, KNOWN
from jaxrlhf.data.registry import NamedDataset, find, load_registry
from jaxrlhf.errors import InputError

OPTIONAL = ("tools", "input", "scores", "ranks")
SKY, SEA = "What color is the sky?", "And the sea?"
MARKED = f"\n\nHuman: {SKY}\n\nAssistant:"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHAT = [user(SKY), assistant("Blue."), user(SEA), assistant("Blue too.")]
GREEN = [*CHAT[:3], assistant("Green.")]


def webgpt(score_0, score_1, answer_0="Blue [1], as air scatters light (Rayleigh) [2, 3].", answer_1="Green [1]."):
    question = {"dataset": "eli5", "id": "q1", "full_text": SKY}
    quotes = {"title": ["Sky"], "extract": ["It is blue."]}
    answers = {"answer_0": answer_0, "answer_1": answer_1, "score_0": score_0, "score_1": score_1}
    return {"question": question, "quotes_0": quotes, "quotes_1": quotes, **answers}


def shp(labels):
    scores = {"score_A": 9, "score_B": 4, "score_ratio": 2.25, "seconds_difference": 60.0}
    texts = {"history": SKY, "human_ref_A": "Blue.", "human_ref_B": "Green."}
    return {"post_id": "p1", "domain": "askscience_train", "upvote_ratio": 0.9, **texts, **scores, "labels": labels}


def mkqa(text):
    kind = "short_phrase" if text else "unanswerable"
    answers = [{"type": kind, "entity": "", "text": text, "aliases": []}]
    other = [{"type": kind, "entity": "", "text": "other", "aliases": []}]
    queries = {"en": "en?", "zh_cn": "天空是什么颜色?", "ja": "空は何色?"}
    return {
        "example_id": "7",
        "query": "en?",
        "queries": queries,
        "answers": {"en": other, "zh_cn": answers, "ja": answers},
    }


def passages(*texts):
    return [{"docid": f"1#{i}", "title": "Sky", "text": text} for i, text in enumerate(texts)]


def ultrafeedback(*scores):
    responses = ["Blue.", "Green.", "Grey."]
    completions = [
        {
            "model": "m",
            "principle": "honesty",
            "custom_system_prompt": "Be honest.",
            "response": response,
            "critique": "Fine.",
            "overall_score": score,
            "fine-grained_score": 4.0,
            "annotations": {"helpfulness": {"Rating": "4"}},
        }
        for response, score in zip(responses, scores, strict=False)
    ]
    return {"source": "sharegpt", "instruction": SKY, "models": ["m"] * len(scores), "completions": completions}


def helpsteer(prompt, response, helpfulness):
    grades = {"helpfulness": helpfulness, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}
    return {"prompt": prompt, "response": response, **grades}


HH = {"chosen": f"{MARKED} Blue.", "rejected": f"{MARKED} Green."}
DAHOAS = {"prompt": MARKED, "response": " Blue.", "chosen": " Blue.", "rejected": " Green."}
PAIR = {"prompt": SKY, "chosen": "Blue.", "rejected": "Green."}
ANSWERED = {"prompt": SKY, "completion": "Blue."}
JAQUAD = {"paragraph": "空は青い。海も青い。", "paragraph_id": "p1"}
QUESTION = "空は何色?"

# name -> (raw rows, the columns of the format that they give)
ROWS = {
    "Dahoas/rm-static": ([DAHOAS], [{"prompt": MARKED, "chosen": " Blue.", "rejected": " Green."}]),
    "Dahoas/full-hh-rlhf": ([DAHOAS], [{"prompt": MARKED, "chosen": " Blue.", "rejected": " Green."}]),
    "Dahoas/synthetic-instruct-gptj-pairwise": ([PAIR], [PAIR]),
    "yitingxie/rlhf-reward-datasets": (
        [
            {
                "prompt": f"Human: {SKY} ",
                "chosen": "Assistant: Blue. Assistant: is a word.",
                "rejected": "Assistant: Green.",
            }
        ],
        [{"prompt": f"Human: {SKY} Assistant:", "chosen": " Blue. Assistant: is a word.", "rejected": " Green."}],
    ),
    "openai/webgpt_comparisons": (
        [webgpt(0.5, -0.5), webgpt(-1.0, 1.0), webgpt(0.0, 0.0)],
        [
            {"prompt": SKY, "chosen": "Blue, as air scatters light (Rayleigh).", "rejected": "Green."},
            {"prompt": SKY, "chosen": "Green.", "rejected": "Blue, as air scatters light (Rayleigh)."},
        ],
    ),
    "stanfordnlp/SHP": (
        [shp(1), shp(0), shp(2)],
        [PAIR, {"prompt": SKY, "chosen": "Green.", "rejected": "Blue."}],
    ),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": (
        [{"prompt": f"USER: {SKY} ASSISTANT: Blue. USER: Which USER? ASSISTANT:", "label": "This one."}],
        [{"prompt": f"Human: {SKY} Assistant: Blue. Human: Which USER? Assistant:", "completion": " This one."}],
    ),
    "wangrui6/Zhihu-KOL": (
        [{"INSTRUCTION": "天空?", "RESPONSE": "蓝。", "SOURCE": "Zhihu", "METADATA": "{}"}],
        [{"prompt": "天空?", "completion": "蓝。"}],
    ),
    **{
        f"Cohere/miracl-{language}-queries-22-12": (
            [
                {
                    "query_id": "1",
                    "query": QUESTION,
                    "positive_passages": passages("空は青い。", "青。"),
                    "negative_passages": passages("海は広い。"),
                    "emb": [0.5, -0.5],
                }
            ],
            [{"prompt": QUESTION, "chosen": "空は青い。", "rejected": "海は広い。"}],
        )
        for language in ("zh", "ja")
    },
    "Hello-SimpleAI/HC3-Chinese": (
        [{"id": "0", "question": "天空?", "human_answers": ["蓝。", "青。"], "chatgpt_answers": ["天空是蓝色。"]}],
        [{"prompt": "天空?", "completion": "蓝。"}],
    ),
    "mkqa-Chinese": ([mkqa("蓝色"), mkqa(None)], [{"prompt": "天空是什么颜色?", "completion": "蓝色"}]),
    "mkqa-Japanese": ([mkqa("青"), mkqa(None)], [{"prompt": QUESTION, "completion": "青"}]),
    "lmqg/qg_jaquad": (
        [
            JAQUAD
            | {"question": QUESTION, "answer": "青", "sentence": "空は青い。", "sentence_answer": "空は<hl>青<hl>い。"}
        ],
        [{"prompt": QUESTION, "completion": "空は青い。"}],
    ),
    "lmqg/qag_jaquad": (
        [JAQUAD | {"questions": [QUESTION, "海は?"], "answers": ["青", "青"], "questions_answers": "…"}],
        [{"prompt": QUESTION, "completion": JAQUAD["paragraph"]}],
    ),
    "Anthropic/hh-rlhf": ([HH], [HH]),
    "HuggingFaceH4/ultrachat_200k": ([{"prompt": SKY, "prompt_id": "a1", "messages": CHAT}], [{"messages": CHAT}]),
    "HuggingFaceH4/ultrafeedback_binarized": (
        [
            {"prompt": SKY, "prompt_id": "a1", "messages": CHAT, "score_chosen": 8.0, "score_rejected": 3.0}
            | {"chosen": CHAT, "rejected": GREEN}
        ],
        [{"chosen": CHAT, "rejected": GREEN}],
    ),
    "openbmb/UltraFeedback": (
        [ultrafeedback(3.0, 7.5, 5.0), ultrafeedback(3.0, None), ultrafeedback()],
        [
            {"prompt": SKY, "responses": ["Blue.", "Green.", "Grey."], "scores": [3.0, 7.5, 5.0]},
            {"prompt": SKY, "responses": ["Blue."], "scores": [3.0]},
        ],
    ),
    "nvidia/HelpSteer2": (
        [
            helpsteer(SKY, "Blue.", 4),
            helpsteer(SKY, "Green.", 1),
            helpsteer(f"{SKY}\n\n<extra_id_1>Assistant\nBlue.\n\n<extra_id_1>User\n{SEA}", "Blue too.", 3),
            helpsteer(f"{SKY}\n\n<extra_id_1>Assistant\nBlue.\n\n<extra_id_1>User\n{SEA}", "Wet.", 3),
        ],
        [
            {"prompt": [user(SKY)], "responses": ["Blue.", "Green."], "scores": [4, 1]},
            {"prompt": CHAT[:3], "responses": ["Blue too.", "Wet."], "scores": [3, 3]},
        ],
    ),
    "HuggingFaceTB/smoltalk": ([{"messages": CHAT, "source": "everyday-conversations"}], [{"messages": CHAT}]),
    "allenai/tulu-3-sft-mixture": ([{"id": "1", "messages": CHAT, "source": "ai2-adapt"}], [{"messages": CHAT}]),
    "tatsu-lab/alpaca": (
        [{"instruction": "Name it.", "input": "the sky's color", "output": "Blue.", "text": "Below is …"}],
        [{"instruction": "Name it.", "input": "the sky's color", "output": "Blue."}],
    ),
    "databricks/databricks-dolly-15k": (
        [{"instruction": SKY, "context": "Air scatters light.", "response": "Blue.", "category": "closed_qa"}],
        [{"instruction": SKY, "input": "Air scatters light.", "output": "Blue."}],
    ),
    "openai/gsm8k": (
        [{"question": "2 plus 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}],
        [{"prompt": "2 plus 3?", "completion": "2 + 3 = <<2+3=5>>5\n#### 5", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}],
    ),
    "trl-lib/tldr": ([ANSWERED], [ANSWERED]),
    "trl-lib/ultrafeedback-prompt": ([{"prompt": [user(SKY)]}], [{"prompt": [user(SKY)]}]),
}


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "OpenAssistant/oasst1"])
def test_a_raw_row_becomes_a_row_of_the_format(name):
    dataset = KNOWN[name]
    raw, expected = ROWS[name]
    for step in dataset.steps:
        rows = list(dataset.rows(raw, step))
        kept = [{column: row[column] for column in want} for row, want in zip(rows, expected, strict=True)]
        assert kept == expected
        for row in rows:
            assert not FORMATS[dataset.format].missing(row, Columns({}))


@pytest.mark.parametrize("name", list(KNOWN))
def test_converted_rows_fit_one_arrow_table(name):
    """Each column has one type in all rows, so that `datasets` can hold them."""
    dataset = KNOWN[name]
    raw = TREES if name == "OpenAssistant/oasst1" else ROWS[name][0]
    for step in dataset.steps:
        rows = list(dataset.rows(raw, step))
        columns = sorted(rows[0])
        assert all(sorted(row) == columns for row in rows)
        assert len(Dataset.from_list(rows)) == len(rows)


def test_null_text_stays_null_for_the_check_of_the_format():
    assert KNOWN["openai/webgpt_comparisons"].convert_row(webgpt(1.0, -1.0, None))[0]["chosen"] is None
    assert KNOWN["wangrui6/Zhihu-KOL"].convert_row({"INSTRUCTION": "天空?", "RESPONSE": None})[0]["completion"] is None
    row = {"prompt": None, "chosen": "Assistant: Blue.", "rejected": None}
    assert KNOWN["yitingxie/rlhf-reward-datasets"].convert_row(row) == [
        {"prompt": None, "chosen": " Blue.", "rejected": None}
    ]
    row = {"prompt": "", "label": None}
    assert KNOWN["pvduy/sharegpt_alpaca_oa_vicuna_format"].convert_row(row) == [{"prompt": "", "completion": None}]


def test_a_miracl_row_without_negatives_keeps_its_answer_for_sft():
    row = {"query": QUESTION, "positive_passages": passages("空は青い。"), "negative_passages": []}
    (row,) = KNOWN["Cohere/miracl-ja-queries-22-12"].convert_row(row)
    assert (row["chosen"], row["rejected"]) == ("空は青い。", None)


def tree(message_id, parent_id, text, rank=None, deleted=False):
    role = "prompter" if text.endswith("?") else "assistant"
    state = {"message_tree_id": "t", "tree_state": "ready_for_export", "lang": "en", "review_result": True}
    return {"message_id": message_id, "parent_id": parent_id, "text": text, "role": role, **state} | {
        "rank": rank,
        "deleted": deleted,
    }


TREES = [
    tree("a", None, SKY),
    tree("c", "a", "Green.", 1),
    tree("b", "a", "Blue.", 0),
    tree("x", "a", "Nobody compared this.", None),
    tree("y", "a", "Spam.", 2, deleted=True),
    tree("d", "b", SEA),
    tree("e", "d", "Blue too.", None),
    tree("f", "e", "Why?"),
    tree("g", "c", "Really?"),
    tree("q", None, "Alone?"),
]


def test_the_best_path_of_an_oasst_tree_is_its_conversation_for_sft():
    assert list(KNOWN["OpenAssistant/oasst1"].rows(TREES, "sft")) == [{"messages": CHAT}]


@pytest.mark.parametrize("step", ["reward", "ppo", "dpo"])
def test_each_user_message_of_an_oasst_tree_ranks_its_replies(step):
    assert list(KNOWN["OpenAssistant/oasst1"].rows(TREES, step)) == [
        {"prompt": [user(SKY)], "responses": ["Blue.", "Green."], "ranks": [0, 1]},
        {"prompt": CHAT[:3], "responses": ["Blue too."], "ranks": [0]},
    ]


def test_the_sets_of_deepspeed_chat_are_all_there():
    assert len(DEEPSPEED_CHAT) == 15  # and local/jsonfile, which is any local file
    without_rejected = {"pvduy", "wangrui6", "Hello-SimpleAI", "apple", "lmqg"}
    for dataset in DEEPSPEED_CHAT:
        assert dataset.steps == (("sft",) if dataset.path.split("/")[0] in without_rejected else STEPS)


def test_a_set_is_found_by_name_with_or_without_config_and_split():
    assert find("openai/gsm8k") is find("openai/gsm8k:socratic@test") is KNOWN["openai/gsm8k"]
    assert find("mkqa-Japanese") is KNOWN["mkqa-Japanese"]
    assert find("local/jsonfile") is None
    assert find("rows.jsonl") is None


def test_a_dotted_path_reads_mappings_and_lists():
    row = {"question": {"full_text": "q"}, "answers": [{"text": "a"}], "a.b": "whole name"}
    assert look_up(row, "question.full_text", None) == "q"
    assert look_up(row, "answers.0.text", None) == "a"
    assert look_up(row, "a.b", None) == "whole name"
    for missing in ("answers.1.text", "answers.text", "question.full_text.0", "none", "question.none"):
        assert look_up(row, missing, None) is None


YAML = """
- path: acme/tickets
  licence: internal
  format: prompt_completion
  steps: [sft, ppo]
  fields: {prompt: question.text, completion: answers.0.text}
- path: data/tickets.jsonl
  name: tickets
  split: open
- path: openai/gsm8k
  fields: {prompt: question, completion: answer}
"""

PYTHON = """
from jaxrlhf.data.registry import NamedDataset

def longest(row):
    return {"prompt": row["q"], "completion": max(row["a"], key=len)}

def fails(row):
    return row["absent"]

DATASETS = [
    NamedDataset(path="acme/tickets", format="prompt_completion", convert=longest),
    NamedDataset(path="acme/broken", convert=fails),
]
"""


def test_a_yaml_registry_declares_sets_and_comes_before_ours(tmp_path):
    file = tmp_path / "sets.yaml"
    file.write_text(YAML)
    own = load_registry(str(file))
    assert list(own) == ["acme/tickets", "tickets", "openai/gsm8k"]
    row = {"question": {"text": SKY}, "answers": [{"text": "Blue."}], "id": 3}
    assert own["acme/tickets"].convert_row(row) == [row | ANSWERED]
    assert own["acme/tickets"].steps == ("sft", "ppo")
    assert own["tickets"].split == "open"
    assert own["tickets"].convert_row(ANSWERED) == [ANSWERED]
    assert find("acme/tickets", str(file)) == own["acme/tickets"]
    assert find("openai/gsm8k", str(file)).config == ""
    assert find("trl-lib/tldr", str(file)) is KNOWN["trl-lib/tldr"]


def test_a_python_registry_declares_conversions(tmp_path):
    file = tmp_path / "sets.py"
    file.write_text(PYTHON)
    own = load_registry(str(file))
    assert own["acme/tickets"].convert_row({"q": SKY, "a": ["No.", "Blue."]}) == [ANSWERED]
    with pytest.raises(InputError, match=r"acme/broken.*columns q.*KeyError.*absent"):
        list(own["acme/broken"].rows([{"q": SKY}], "sft"))


def test_a_failing_conversion_of_all_rows_names_the_set():
    with pytest.raises(InputError, match=r"HelpSteer2.*convert_all.*KeyError"):
        list(KNOWN["nvidia/HelpSteer2"].rows([{"text": "no prompt here"}], "sft"))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("- licence: mit", ["path"]),
        ("- path: ''", ["path"]),
        ("- path: a/b\n- path: a/b", ["a/b", "name"]),
        ("- path: a/b\n  colums: {}", ["a/b", "colums", "fields"]),
        ("- path: a/b\n  1: x", ["a/b", "1"]),
        ("- path: a/b\n  fields: {promt: q}", ["a/b", "promt", "prompt"]),
        ("- path: a/b\n  format: text\n  fields: {prompt: q}", ["a/b", "prompt", "text"]),
        ("- path: a/b\n  fields: [prompt]", ["a/b", "fields"]),
        ("- path: a/b\n  fields: {prompt: 3}", ["a/b", "fields"]),
        ("- path: a/b\n  format: pairs", ["a/b", "pairs", "preference"]),
        ("- path: a/b\n  steps: sft", ["a/b", "steps", "sft"]),
        ("- path: a/b\n  steps: [train]", ["a/b", "steps", "train"]),
        ("- path: a/b\n  split: 3", ["a/b", "split", "3"]),
        ("- path: a/b\n  convert: longest", ["a/b", "convert", "Python"]),
        ("a/b: {format: text}", ["list"]),
        ("- a/b", ["list"]),
        ("- path: [", ["YAML"]),
        ("", ["list"]),
    ],
)
def test_a_bad_yaml_registry_is_refused_with_file_and_field(tmp_path, text, names):
    file = tmp_path / "sets.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as refused:
        load_registry(str(file))
    assert all(name in str(refused.value) for name in [str(file), *names])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("x = 1", ["DATASETS"]),
        ("DATASETS = {'a/b': 1}", ["DATASETS", "NamedDataset"]),
        ("raise RuntimeError('boom')", ["RuntimeError", "boom"]),
        (
            "from jaxrlhf.data.registry import NamedDataset\nDATASETS = [NamedDataset(path='a/b', steps='sft')]",
            ["steps"],
        ),
        (
            "from jaxrlhf.data.registry import NamedDataset\nDATASETS = [NamedDataset(path='a/b', convert=3)]",
            ["convert"],
        ),
        (
            "from jaxrlhf.data.registry import NamedDataset\n"
            "DATASETS = [NamedDataset(path='a/b', convert=dict, fields={'prompt': 'q'})]",
            ["fields", "convert"],
        ),
    ],
)
def test_a_bad_python_registry_is_refused_with_file_and_field(tmp_path, text, names):
    file = tmp_path / "sets.py"
    file.write_text(text)
    with pytest.raises(InputError) as refused:
        load_registry(str(file))
    assert all(name in str(refused.value) for name in [str(file), *names])


@pytest.mark.parametrize("name", ["absent.yaml", "sets.toml", "."])
def test_a_registry_that_is_no_yaml_or_python_file_is_refused(tmp_path, name):
    (tmp_path / "sets.toml").write_text("")
    with pytest.raises(InputError, match="dataset_registry"):
        load_registry(str(tmp_path / name))


def test_a_declaration_defaults_to_its_path_as_name():
    assert NamedDataset(path="a/b").name == "a/b"
    assert NamedDataset(path="a/b", name="c").name == "c"


def test_the_dialogues_of_hh_rlhf_are_rendered_turn_by_turn(monkeypatch, tmp_path):
    dialogue = f"{MARKED} Blue.\n\nHuman: {SEA}\n\nAssistant:"
    rows = [{"chosen": f"{dialogue} Blue {i}.", "rejected": f"{dialogue} Green {i}."} for i in range(4)]
    splits = {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: DatasetDict(splits))
    config = DataConfig.create(data_path="Anthropic/hh-rlhf", data_cache_dir=str(tmp_path))
    tokenizer = chat_tokenizer("chatml")
    train, _ = load_data(config, tokenizer, "dpo")
    row = train.values([2], ["ids_0", "mask_0"])[0][0]
    turns = [user(SKY), assistant("Blue."), user(SEA), assistant("Blue 2.")]
    assert tokenizer.decode(row["ids_0"]) == tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    assert tokenizer.decode(row["ids_0"][row["mask_0"] == 1]) == "Blue 2.<|im_end|>"
