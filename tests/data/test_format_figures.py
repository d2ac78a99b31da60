"""The figures of TRL for a row of every format (fixtures/formats.json) fit the tokenizers that tests make anew."""

import json
from pathlib import Path

import pytest
from chat_tokenizers import STYLES, chat_tokenizer, vocabulary_hash

from jaxrlhf.data.formats import FORMATS

FILE = json.loads((Path(__file__).parents[1] / "fixtures" / "formats.json").read_text(encoding="utf-8"))
WITHOUT_TRL = {"alpaca", "ranked"}  # TRL knows neither


@pytest.fixture(scope="module", params=STYLES)
def style(request):
    tokenizer, figures = chat_tokenizer(request.param), FILE["figures"][request.param]
    assert vocabulary_hash(tokenizer) == figures["vocabulary"], (
        "the tokenizer that this version of `tokenizers` trains is not that of the figures; run make_format_figures.py"
    )
    return tokenizer, figures["rows"]


def test_every_format_of_trl_has_rows():
    assert {row["format"] for row in FILE["rows"].values()} == set(FORMATS) - WITHOUT_TRL
    assert FILE["versions"]["trl"] == "1.12.0"


def test_conversations_have_the_ids_and_the_mask_of_the_chat_template(style):
    tokenizer, figures = style
    for name in ("messages", "messages/turns", "messages/tools"):
        (row,) = FILE["rows"][name]["rows"]
        rendered = tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert rendered["input_ids"] == figures[name]["sft"]["ids"]
        assert "".join(map(str, rendered["assistant_masks"])) == figures[name]["sft"]["assistant"]


def test_text_has_the_ids_of_the_tokenizer_and_one_eos(style):
    tokenizer, figures = style
    text = FILE["rows"]["text"]["rows"][0]["text"]
    assert figures["text"]["sft"]["ids"] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_steps_agree_on_the_sequences_of_a_row(style):
    """The parts of dpo make the sequences of reward, that of sft is the chosen one, and grpo has the prompt of dpo."""
    _, figures = style
    pairs = [row for row in figures.values() if "dpo" in row]
    assert len(pairs) == 9
    for row in pairs:
        parts = row["dpo"]
        assert parts["prompt"] + parts["chosen"] == row["reward"]["chosen"] == row["sft"]["ids"]
        assert parts["prompt"] + parts["rejected"] == row["reward"]["rejected"]
        assert row["sft"]["completion"] == "0" * len(parts["prompt"]) + "1" * len(parts["chosen"])
        assert row["grpo"]["prompt"] == parts["prompt"]
