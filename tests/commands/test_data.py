"""`jaxrlhf data`: recognised formats, marked tokens, counts, duplicates, and that terminal, page and JSON agree."""

import html
import io
import json
import re

import numpy as np
import pytest
from chat_tokenizers import chat_tokenizer
from lab import LLAMA, tiny_model
from rows import write_lines

from jaxrlhf import cli
from jaxrlhf.commands.data import DataViewConfig, show_data
from jaxrlhf.commands.data_page import page_of
from jaxrlhf.commands.data_terminal import histogram, print_inspection
from jaxrlhf.commands.inspection import inspect_data
from jaxrlhf.data import DataConfig, load_data, read_tokenizer
from jaxrlhf.errors import InputError
from jaxrlhf.models import save_pretrained

PAIRS = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}, not at all"} for i in range(40)]
CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"Is {i} blue?"},
            {"role": "assistant", "content": "It is."},
            {"role": "user", "content": "And the sea?"},
            {"role": "assistant", "content": f"Blue {i}."},
        ]
    }
    for i in range(30)
]
MARKUP = "<script>alert('sky')</script> & [bold]"


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """Lines wrap at the width of the terminal."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer("chatml").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def look(tmp_path, tokenizer):
    """Inspects rows of one file."""

    def look(rows, step="sft", show=2, batch_size=8, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig.create(data_path=str(path), data_cache_dir=str(tmp_path / "cache"), **options)
        return inspect_data(config, chat_tokenizer("chatml"), step, show=show, batch_size=batch_size)

    return look


def printed(found, stream=None):
    stream = io.StringIO() if stream is None else stream
    print_inspection(found, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("rows", "words", "format", "steps"),
    [
        (PAIRS, "preference, explicit prompt, text", "preference", ("sft", "reward", "ppo", "dpo", "kto")),
        (CHAT, "language modelling, conversational", "messages", ("sft", "ppo")),
        ([{"text": f"sky {i}"} for i in range(30)], "language modelling, text", "text", ("sft",)),
    ],
)
def test_the_format_is_named_with_the_steps_that_it_serves(look, rows, words, format, steps):
    found = look(rows)
    (source,) = found.sources
    assert (source.recognised, source.format, source.steps, source.files) == (words, format, steps, ("rows.jsonl",))
    assert f"recognised as {words} (data_format {format})" in printed(found)


def test_every_assistant_turn_is_marked_with_the_token_that_ends_it(look):
    text = printed(look(CHAT, show=1))
    start = text.index("<|im_start|>")
    lines = [line.strip() for line in text[start : text.index("The first packed row")].strip().splitlines()]
    (number,) = re.findall(r"Is (\d+) blue", text)
    assert lines == [
        "<|im_start|>user",
        f"Is {number} blue?<|im_end|>",
        "<|im_start|>assistant",
        "⟦It is.<|im_end|>⟧",
        "<|im_start|>user",
        "And the sea?<|im_end|>",
        "<|im_start|>assistant",
        f"⟦Blue {number}.<|im_end|>⟧",
    ]


def test_labels_and_margins_stand_beside_their_rows(look):
    rows = [{"prompt": f"Is {i} even?", "completion": "Yes.", "label": i % 2 == 0} for i in range(8)]
    text = printed(look(rows, "kto", show=8))
    shown = re.findall(r"trained on, (good|bad)\s.*?Is (\d)", text, re.DOTALL)
    assert len(shown) >= 4
    assert all((label == "good") == (int(number) % 2 == 0) for label, number in shown)
    pairs = [{**row, "margin": i / 2 if i % 2 else None} for i, row in enumerate(PAIRS)]
    found = look(pairs, "reward", show=len(pairs))
    given = {int(re.search(r"line (\d+)", row.place)[1]) - 1: row.given for row in found.sources[0].train.rows}
    assert given and given == {i: f"margin {i / 2:g}" if i % 2 else "" for i in given}
    assert f", {given[next(i for i in given if given[i])]}<" in page_of(found)


def test_the_marked_pieces_are_the_tokens_of_the_training_batch(look, tmp_path):
    found = look(CHAT, show=3, packing=False)
    config = DataConfig.create(
        data_path=str(tmp_path / "rows.jsonl"), data_cache_dir=str(tmp_path / "cache"), packing=False
    )
    train, _ = load_data(config, chat_tokenizer("chatml"), "sft")
    batch = train.batch([0, 1, 2])
    for i, row in enumerate(found.sources[0].train.rows):
        prompt, response = row.passages
        n = len(prompt.ids) + len(response.ids)
        np.testing.assert_array_equal([*prompt.ids, *response.ids], batch["input_ids"][i, :n])
        np.testing.assert_array_equal([*prompt.mask, *response.mask], batch["loss_mask"][i, :n])
        assert batch["attention_mask"][i].sum() == n
        decoded = train.tokenizer.decode([*prompt.ids, *response.ids], skip_special_tokens=False)
        assert "".join(piece.text for passage in row.passages for piece in passage.pieces) == decoded


def test_a_pair_is_shown_with_its_prompt_once_and_both_responses(look):
    found = look(PAIRS, "dpo", show=1)
    (row,) = found.sources[0].train.rows
    assert [passage.name for passage in row.passages] == ["prompt", "chosen", "rejected"]
    assert not sum(row.passages[0].mask) and all(sum(p.mask) == len(p.ids) for p in row.passages[1:])
    text = printed(found)
    assert text.count("<|im_start|>user") == 1
    assert re.search(r"- chosen.*\n *⟦yes \d+<\|im_end\|>⟧\s+- rejected.*\n *⟦no \d+, not at all<\|im_end\|>⟧", text)


def test_counts_and_reasons_are_those_of_the_data(look):
    rows = [*PAIRS, {"prompt": "", "chosen": "a", "rejected": "b"}, {"prompt": None, "chosen": "a", "rejected": "b"}]
    rows += [{"prompt": "", "chosen": "c", "rejected": "b"}, {"prompt": "sky " * 400, "chosen": "a", "rejected": "b"}]
    found = look(rows, "reward", max_length=64, long_prompts="drop", eval_fraction=0.01)
    reports = found.sources[0].reports.values()
    totals = {name: sum(report.counts[name] for report in reports) for name in found.sources[0].train.counts}
    assert (totals["rows"], totals["kept"], totals["skipped"], totals["dropped_too_long"]) == (44, 40, 3, 1)
    reasons = {reason.what: reason for report in reports for reason in report.reasons}
    assert reasons["skipped: 'prompt' is empty"].rows == 2
    assert [place.split("/")[-1] for place in reasons["skipped: 'prompt' is empty"].places] == [
        "rows.jsonl line 41",
        "rows.jsonl line 43",
    ]
    assert reasons["skipped: 'prompt' is null"].rows == reasons["dropped: too long"].rows == 1
    text = " ".join(printed(found).split())
    assert "skipped: 'prompt' is empty: 2 (rows.jsonl line 41, rows.jsonl line 43)" in text


def test_tokens_lengths_and_histogram_add_up(look):
    found = look(CHAT, eval_fraction=0.1)
    report = found.sources[0].train
    assert report.counts["kept"] == sum(report.histogram) == 27
    assert report.mean == pytest.approx(report.tokens / 27)
    share = f"{report.trained_tokens / report.tokens:.0%}"
    cells = ["rows", "train", f"{report.tokens:,}", share, f"{report.mean:.0f}", f"{report.median:.0f}"]
    lines = [line.split() for line in printed(found).splitlines()]
    assert [*cells, str(report.longest)] in lines
    assert ["rows", "train", f"{report.padding['batches']:.1%}", f"{report.padding['packed']:.1%}"] in lines
    assert 0 < report.trained_tokens < report.tokens
    assert found.edges[-1] >= report.longest >= report.median
    used = sum(segment.tokens for segment in found.packed)
    assert used <= found.packed_length == 512
    assert report.padding["packed"] == pytest.approx(1 - report.tokens / (512 * -(-report.tokens // 512)), abs=0.35)


def test_padding_counts_the_positions_of_the_batches(look):
    report = look(PAIRS, "reward", batch_size=4, max_length=64).sources[0].train
    positions = report.counts["kept"] * 2 * 32  # every pair fits the smallest bucket
    assert report.longest <= 32
    assert report.padding["batches"] == pytest.approx(1 - report.tokens / positions)


def test_duplicates_are_found_within_training_and_against_evaluation(look, tmp_path):
    twice = [*PAIRS[:20], PAIRS[3], PAIRS[3] | {"chosen": "maybe"}]
    held_out = tmp_path / "other.jsonl"
    # The same prompt, once as text and once as a message.
    rows = [PAIRS[5], {"prompt": [{"role": "user", "content": "question 6"}], "chosen": "x", "rejected": "y"}]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in [*rows, PAIRS[30]]))
    found = look(twice, "reward", eval_data_path=str(held_out))
    equal = found.duplicates["equal_rows"]
    assert equal.rows == 1 and equal.sources == {"rows": 1}
    assert [place.split("/")[-1] for place in equal.examples[0]] == ["rows.jsonl line 4", "rows.jsonl line 21"]
    assert found.duplicates["equal_prompts"].rows == 2
    assert found.duplicates["shared_prompts"].rows == 2
    assert "the first: other.jsonl line 1 repeats rows.jsonl line 6" in printed(found)


def test_shares_of_a_mixture_are_its_weights(tmp_path):
    mix = tmp_path / "mix.yaml"
    for name, rows in (("a", PAIRS), ("b", CHAT)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mix.write_text(
        f"- {{path: {tmp_path}/a.jsonl, weight: 3}}\n- {{path: {tmp_path}/b.jsonl, weight: 1}}\n"
        f"- {{path: {tmp_path}/c.jsonl, weight: 1, steps: [ppo]}}\n"
    )
    config = DataConfig.create(data_mixture=str(mix), data_cache_dir=str(tmp_path / "cache"), packing=False)
    found = inspect_data(config, chat_tokenizer("chatml"), "sft", show=0, batch_size=8)
    a, b, c = found.sources
    assert (a.train.mixture.rows, b.train.mixture.rows) == (0.75, 0.25)
    assert a.train.mixture.passes == pytest.approx(0.75 * (38 + 28) / 38, rel=0.03)
    assert "<td>75.0 %</td>" in page_of(found)
    assert c.train is None and "not used by sft: the mixture gives it to ppo" in printed(found)


def test_a_source_without_a_usable_row_is_listed_with_the_reason(tmp_path, look):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": " ", "chosen": "a", "rejected": "b"}) + "\n")
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    config = DataConfig.create(
        data_path=(str(tmp_path / "bad.jsonl"), str(tmp_path / "good.jsonl")),
        eval_data_path=str(tmp_path / "held_out.jsonl"),
        data_cache_dir=str(tmp_path / "cache"),
    )
    (tmp_path / "held_out.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    found = inspect_data(config, chat_tokenizer("chatml"), "dpo", show=1, batch_size=8)
    bad, good, held_out = found.sources
    assert bad.train.counts["kept"] == 0 and bad.train.reasons[0].rows == 1
    assert good.train.counts["kept"] == 40
    assert held_out.train is None and held_out.evaluation.counts["kept"] == 1
    assert "bad train, skipped: 'prompt' is empty: 1 (bad.jsonl line 1)" in printed(found)


def test_the_page_holds_the_rows_and_escapes_their_markup(look):
    rows = [row | {"chosen": f"{MARKUP} {i}"} for i, row in enumerate(PAIRS)]
    page = page_of(look(rows, "dpo", show=2))
    assert html.escape(MARKUP) in page.replace("&#39;", "&#x27;")
    assert "<script" not in page
    assert "<mark>" in page and '<mark class="special">&lt;|im_end|&gt;</mark>' in page
    assert "<svg" in page and "http" not in page.replace("http-equiv", "")
    assert "rows.jsonl line" in page


def test_the_terminal_shows_markup_as_it_is(look):
    rows = [row | {"chosen": f"{MARKUP} \x1b[31mred {i}"} for i, row in enumerate(PAIRS)]
    stream = io.StringIO()
    text = printed(look(rows, show=1), stream)
    assert MARKUP in re.sub(r"\s*\n\s*", " ", text)
    assert "\x1b" not in text


def test_colour_marks_the_tokens_on_a_terminal_and_brackets_without(look, monkeypatch):
    found = look(CHAT, show=1)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = printed(found, Terminal())
    assert "\x1b[32mIt is.\x1b[0m" in coloured and "⟦" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = printed(found, Terminal())
    assert "⟦It is.<|im_end|>⟧" in re.sub(r"\x1b\[[\d;]*m", "", plain)
    assert "\x1b[32m" not in plain


def test_brackets_are_ascii_where_the_stream_is(look):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    view_only = look(CHAT, show=1)
    print_inspection(view_only, stream)
    stream.seek(0)
    assert "[[It is.<|im_end|>]]" in stream.read()


def test_json_holds_what_the_command_returns(tmp_path, tokenizer, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in CHAT))
    words = ["data", "--data_path", str(rows), "--tokenizer_name_or_path", tokenizer]
    words += ["--data_cache_dir", str(tmp_path / "cache"), "--show", "1"]
    assert cli.main([*words, "--json", "-"]) == 0
    printed_json = json.loads(capsys.readouterr().out)
    page, file = tmp_path / "page.html", tmp_path / "out.json"
    assert cli.main([*words, "--json", str(file), "--html", str(page)]) == 0
    assert json.loads(file.read_text()) == printed_json
    assert "Is " in page.read_text() and "Rows as the model sees them" in capsys.readouterr().out
    source = printed_json["sources"][0]
    assert source["format"] == "messages"
    passage = source["train"]["rows"][0]["passages"][-1]
    assert len(passage["ids"]) == len(passage["mask"])


def test_ppo_shows_prompts_alone(look):
    found = look(PAIRS, "ppo", show=1)
    report = found.sources[0].train
    assert [passage.name for passage in report.rows[0].passages] == ["prompt"]
    assert report.trained_tokens == 0 and set(report.padding) == {"batches", "sorted"}
    assert "ppo trains on its own responses" in printed(found)


def test_histogram_bars_scale_to_the_highest():
    assert histogram([24, 12, 1, 0], " ▁▂▃▄▅▆▇█") == ["██", "██▄▄", "████▁▁"]


@pytest.mark.parametrize("step", ["sft", "dpo", "ppo"])
def test_a_stream_shows_its_first_rows_as_the_whole_data_shows_them(look, tmp_path, step):
    limit = {"max_train_samples": 20} if step == "dpo" else {}
    found = look(PAIRS, step, streaming=True, **limit)
    whole = look(PAIRS[:20] if limit else PAIRS, step)
    assert found.first == (20 if limit else 1000)
    assert found.sources[0].train == whole.sources[0].train
    assert found.duplicates == whole.duplicates
    stream = io.StringIO()
    print_inspection(found, stream)
    assert f"the first {found.first:,} rows of each" in stream.getvalue()


def test_a_model_brings_its_tokenizer_and_end_ids(tmp_path, tokenizer, capsys):
    model = tiny_model(LLAMA | {"vocab_size": 600, "eos_token_id": 7})
    save_pretrained(model, tmp_path / "model", tokenizer=read_tokenizer(tokenizer))
    rows = write_lines(tmp_path / "rows.jsonl", [{"prompt": f"q{i}", "completion": "a"} for i in range(9)])
    settings = {"data_path": rows, "data_cache_dir": str(tmp_path / "cache"), "show": 1}
    found = [
        show_data(DataViewConfig.create(**settings, **{name: str(tmp_path / "model")})).as_dict()
        for name in ("model_name_or_path", "tokenizer_name_or_path")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"data_path": "demo"}, "model_name_or_path: no model or tokenizer"),
        ({"data_path": "nowhere.jsonl", "tokenizer_name_or_path": "demo"}, "nowhere.jsonl"),
    ],
)
def test_bad_settings_are_named(settings, named, tmp_path):
    config = DataViewConfig.create(data_cache_dir=str(tmp_path / "cache"), **settings)
    with pytest.raises(InputError, match=named):
        show_data(config)


@pytest.mark.parametrize(("option", "path"), [("html", "/"), ("json", "/dev/null/x/y.json")])
def test_a_file_that_cannot_be_written_is_refused_before_the_data_is_read(option, path, capsys):
    assert (
        cli.main(["data", "--data_path", "nowhere.jsonl", "--tokenizer_name_or_path", "demo", f"--{option}", path]) == 2
    )
    assert f"error: {option}: {path} " in capsys.readouterr().err
