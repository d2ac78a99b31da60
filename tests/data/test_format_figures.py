"""Rows of every format have the token ids and masks that TRL gives them (fixtures/formats.json)."""

import json
from pathlib import Path

import pytest
from chat_tokenizers import STYLES, chat_tokenizer, vocabulary_hash
from rows import encoded, write_lines

from jaxrlhf.data import DataConfig, load_data
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


# ---- ours


@pytest.fixture(scope="module")
def ours(style, tmp_path_factory):
    """`ours(step, **options)`: name of a row -> (prompt length, then ids and mask of each sequence), of all formats."""
    tokenizer, figures = style
    folder = tmp_path_factory.mktemp("figures")
    files = {}
    for name, row in FILE["rows"].items():
        files.setdefault(row["format"] + ("-text" if name.endswith("text") else ""), []).append(name)
    sources = []
    for file, names in files.items():
        form = file.removesuffix("-text")
        path = write_lines(folder / f"{file}.jsonl", [row for name in names for row in FILE["rows"][name]["rows"]])
        template = {"preference_implicit-text": r"\n\nHuman: {prompt}\n\nAssistant: {response}"}.get(file, "raw")
        template = {"template": template} if file.endswith("-text") else {}
        sources.append({"path": path, "steps": list(FORMATS[form].steps), **template})
    held = write_lines(folder / "held.jsonl", [{"prompt": "Is it?", "chosen": "Yes", "rejected": "No"}])
    mixture = folder / "mixture.yaml"
    mixture.write_text(json.dumps(sources))

    def load(step, **options):
        config = DataConfig.create(
            data_mixture=str(mixture),
            eval_data_path=held,
            data_cache_dir=str(folder / "cache"),
            packing=False,
            **options,
        )
        train, _ = load_data(config, tokenizer, step)
        found = {}
        for unit, (row,) in enumerate(encoded(train)):
            file, number = train.source(unit)
            name = files[file][0] if file.startswith("unpaired") else files[file][number]
            found[name] = row
        assert set(found) == {name for name in figures if step in FORMATS[FILE["rows"][name]["format"]].steps}
        return found

    return load


def untailed(tokenizer, ids):
    """TRL's ids up to the last EOS: the template of ChatML puts a line break after it, which ours leaves out."""
    return ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


def as_bits(mask):
    return "".join(map(str, mask))


def test_sft_has_the_ids_of_trl_and_trains_on_every_assistant_turn(style, ours):
    tokenizer, figures = style
    compared = set()
    for name, (_, ids, mask) in ours("sft").items():
        expected = figures[name]["sft"]
        assert ids == untailed(tokenizer, expected["ids"]), name
        if name == "text":
            marks = "0" + "1" * (len(ids) - 1)
        elif name == "sharegpt":
            marks = figures["messages/turns"]["sft"]["assistant"]
        else:
            marks = expected.get("assistant") or expected["completion"]
        assert as_bits(mask) == marks[: len(ids)], name
        compared.add(FILE["rows"][name]["format"])
    assert compared == set(FORMATS) - WITHOUT_TRL - {"prompt"}


def test_sft_on_the_last_turn_has_the_mask_of_trl_for_completions(style, ours):
    _, figures = style
    checked = 0
    for name, (length, ids, mask) in ours("sft", train_on="last").items():
        marks = figures[name]["sft"].get("completion")
        if name == "prompt_completion/tools":  # TRL trains on the tool's result too
            assert sum(mask) and as_bits(mask)[:length] == "0" * length
        elif marks:
            assert as_bits(mask) == marks[: len(ids)], name
            checked += 1
    assert checked == 12


def test_sft_on_everything_counts_every_token_but_the_first(ours):
    for _, ids, mask in ours("sft", train_on="everything").values():
        assert mask == [0, *[1] * (len(ids) - 1)]


@pytest.mark.parametrize("step", ["reward", "dpo"])
def test_pairs_have_the_ids_of_trl(style, ours, step):
    tokenizer, figures = style
    found = ours(step)
    assert len(found) == 9
    for name, (length, *sequences) in found.items():
        parts, whole = figures[name]["dpo"], figures[name]["reward"]
        for side, ids, mask in zip(("chosen", "rejected"), sequences[::2], sequences[1::2], strict=True):
            assert ids == untailed(tokenizer, whole[side]), name
            assert ids[:length] == parts["prompt"], name
            assert ids[length:] == untailed(tokenizer, parts[side]), name
            assert mask == [0] * length + [1] * (len(ids) - length), name


def test_prompts_have_the_ids_of_trl(style, ours):
    _, figures = style
    for name, (length, ids, _) in ours("ppo").items():
        if name != "prompt_completion/tools":
            assert ids == figures[name]["grpo"]["prompt"], name
        assert length == len(ids)
