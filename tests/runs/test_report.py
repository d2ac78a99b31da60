"""report.html: complete, well formed, and without a single outside reference."""

import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.runs.metrics import describe
from jaxrlhf.runs.plots import MAX_POINTS, Curve, draw, smooth, thin_out
from jaxrlhf.runs.report import HELD_OUT, group_of, read_curves, write_report

SFT = ["loss", "grad_norm", "learning_rate", "eval/loss", "eval/perplexity", "perf/tokens_per_second"]
REWARD = ["loss", "eval/accuracy", "eval/mean_chosen_score", "eval/mean_rejected_score"]
PPO = [
    "objective/kl",
    "objective/scores",
    "objective/rlhf_reward",
    "policy/clipfrac_avg",
    "policy/approxkl_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/ratio",
    "val/num_eos_tokens",
    "timing/generate",
    "odd_one",
]


def make_run(folder, names, steps=20, samples=()):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("learning_rate: 0.0001\nnote: a < b & c\n")
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            values = {name: math.sin(step + i) for i, name in enumerate(names)}
            file.write(json.dumps({"step": step, "time": 1000.0 + step, **values}) + "\n")
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def sample(step, *rows):
    return {"step": step, "time": 0.0, "title": "Samples", "columns": ["prompt", "score"], "rows": list(rows)}


def parse(path):
    """The page as an XML tree: fails on anything that is not well formed."""
    text = path.read_text(encoding="utf-8").replace("<!DOCTYPE html>\n", "")
    return ElementTree.fromstring(text)


def captions(page):
    return [key.text or key[0].tail for key in page.iter("span") if key.get("class") == "key"]


def test_a_report_shows_every_metric_once_and_is_self_contained(tmp_path):
    path = write_report(make_run(tmp_path / "ppo", PPO))
    page, text = parse(path), path.read_text()
    assert path == tmp_path / "ppo" / "report.html"
    assert sorted(captions(page)) == sorted(PPO)
    table_names = {row[0].text for row in page.iter("tr")}
    assert set(PPO) <= table_names
    assert not re.search(r"https?:|//\w|<script|<link|@import|src=", text)
    assert len(list(page.iter("svg"))) == len(PPO)
    assert "learning_rate: 0.0001" in next(page.iter("pre")).text


def test_a_report_explains_the_metrics_of_its_run_and_no_others(tmp_path):
    page = parse(write_report(make_run(tmp_path / "sft", ["loss", "eval/books/loss", "of_my_own"])))
    (table,) = [t for t in page.iter("table") if "healthy" in [cell.text for cell in t.iter("th")]]
    ((names, meaning, healthy),) = [list(row) for row in table.iter("tr")][1:]
    assert list(names.itertext()) == ["loss", "eval/books/loss"]
    assert [meaning.text, healthy.text] == [text.replace("`", "") for text in describe("loss")[1:]]


def test_ids_are_unique_and_every_reference_has_its_target(tmp_path):
    text = write_report(make_run(tmp_path / "ppo", PPO)).read_text()
    ids = re.findall(r'\bid=["\']([^"\']+)', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)


def test_colours_of_the_drawings_come_from_the_page(tmp_path):
    svg = draw([Curve("loss", range(30), np.sin(range(30)).tolist()), Curve("eval/loss", [5, 9], [1.0, 2.0], True)], 0)
    assert {"var(--first)", "var(--second)", "var(--muted)", "var(--line)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert set(re.findall(r"#[0-9a-fA-F]{6}", svg)) <= {"#ffffff"}  # the invisible background


def test_tick_labels_keep_their_digits():
    labels = re.findall(r">([^<>]*0\.0\d+)</text>", draw([Curve("x", range(8), [0.003 * i for i in range(8)])], 0))
    assert len(labels) > 3 and len(set(labels)) == len(labels)


def test_a_three_step_run_gets_three_sections_in_order_and_its_summary(tmp_path):
    make_run(tmp_path / "demo" / "ppo", PPO)
    make_run(tmp_path / "demo" / "reward", REWARD)
    make_run(tmp_path / "demo" / "sft", SFT)
    (tmp_path / "demo" / "summary.json").write_text(json.dumps({"ppo_kl": 7.25, "seconds": {"sft": 61.5}}))
    page = parse(write_report(tmp_path / "demo"))
    assert [title.text for title in page.iter("h2")] == ["Supervised fine-tuning", "Reward model", "PPO"]
    assert sorted(captions(page)) == sorted(SFT + REWARD + PPO)
    tiles = {tile[0].text: tile[1].text for tile in page.iter("div") if tile.get("class") == "tile"}
    assert tiles == {"ppo_kl": "7.25", "seconds.sft": "61.5"}


def test_evaluation_shares_the_plot_of_its_training_metric(tmp_path):
    page = parse(write_report(make_run(tmp_path / "reward", REWARD)))
    figures = [[key[0].tail for key in figure.iter("span")] for figure in page.iter("figure")]
    assert sorted(figures) == [["eval/accuracy"], ["eval/mean_chosen_score", "eval/mean_rejected_score"], ["loss"]]
    page = parse(write_report(make_run(tmp_path / "sft", SFT)))
    assert ["loss", "eval/loss"] in [[key[0].tail for key in figure.iter("span")] for figure in page.iter("figure")]


def test_samples_are_escaped_and_shown_across_time(tmp_path):
    rows = [sample(step, ["<b>hi</b> & \x00\x1b bye", 0.5], ["é 多", None]) for step in (1, 50)]
    page = parse(write_report(make_run(tmp_path / "ppo", PPO, samples=rows)))
    cells = ["".join(cell.itertext()) for table in page.iter("table") for cell in table.iter("td")]
    assert cells.count("<b>hi</b> & \ufffd\ufffd bye") == 2 and "é 多" in cells and "–" in cells
    titles = [summary.text for summary in page.iter("summary")]
    assert "Samples · step 1" in titles and "Samples · step 50" in titles


def test_a_script_in_a_sample_a_name_or_a_setting_stays_text(tmp_path):
    script = "<script>alert('1')</script>"
    record = {"step": 1, "time": 0.0, "title": script, "columns": ["prompt", script], "rows": [[script, script]]}
    folder = make_run(tmp_path / "ppo", [script, "loss"], samples=[record])
    (folder / "config.yaml").write_text(script)
    (folder / "summary.json").write_text(json.dumps({"title": script, script: 1}))
    path = write_report(folder)
    texts = list(parse(path).itertext())
    assert sum(script in text for text in texts) >= 7 and "<script" not in path.read_text()


@pytest.mark.parametrize(
    ("folder", "summary", "title"),
    [
        ("ppo", {"trainer": "grpo", "title": "Group relative"}, "Group relative"),
        ("mine", {"trainer": "grpo", "title": "Group relative"}, "mine: Group relative"),
        ("mine", {"trainer": "sft"}, "mine: Supervised fine-tuning"),
        ("rloo", {"trainer": "rloo"}, "RLOO"),
        ("reward", {}, "Reward model"),
        ("mine", {}, "mine"),
    ],
)
def test_a_section_is_called_by_the_title_in_the_summary_and_the_folder(tmp_path, folder, summary, title):
    path = make_run(tmp_path / folder, ["loss"])
    (path / "summary.json").write_text(json.dumps(summary))
    assert [heading.text for heading in parse(write_report(path)).iter("h2")] == [title]


def test_many_sample_tables_are_thinned_evenly_and_said_so(tmp_path):
    rows = [sample(step, ["x", 1.0]) for step in range(1, 101)]
    text = write_report(make_run(tmp_path / "ppo", PPO, samples=rows)).read_text()
    assert text.count("Samples · step") == 40 and "40 of 100 tables" in text
    assert "Samples · step 1<" in text and "Samples · step 100<" in text


def test_values_that_are_not_finite_are_counted_on_their_plot(tmp_path):
    folder = make_run(tmp_path / "sft", ["loss"])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "time": 1.0, "loss": null, "all_lost": null}\n')
    assert [math.isnan(value) for value in read_curves(folder / "metrics.jsonl")["loss"].values] == [False] * 20 + [
        True
    ]
    page = parse(write_report(folder))
    notes = [note.text for note in page.iter("p") if note.get("class") == "warning"]
    assert notes == ["1 value not finite", "1 value not finite"]


@pytest.mark.parametrize("content", ["", '{"step": 1, "time": 0.0}\n', '{"step": 1, "time": 0.0, "loss": 1.0}\n'])
def test_a_run_that_has_hardly_begun_still_gets_a_report(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    parse(write_report(tmp_path))


def test_a_folder_without_a_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="holds no run"):
            write_report(folder)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("loss", "Losses"),
        ("eval/loss", "Losses"),
        ("eval/helpful/loss", "Losses"),
        ("loss/value_avg", "Losses"),
        ("objective/scores", "Rewards and scores"),
        ("objective/rlhf_reward", "Rewards and scores"),
        ("eval/accuracy", "Rewards and scores"),
        ("eval/helpful/accuracy", "Rewards and scores"),
        ("eval/helpful/logps/chosen", "KL and policy"),
        ("eval/rewards/margins", "Rewards and scores"),
        ("eval/helpful/rewards/accuracies", "Rewards and scores"),
        ("eval/rlhf-reward-datasets/loss", "Losses"),
        ("eval/data/length/few.jsonl/perplexity", "Losses"),
        ("data/rlhf-reward-datasets/share", "Data sources"),
        ("data/data/length/few.jsonl/share", "Data sources"),
        ("objective/kl", "KL and policy"),
        ("policy/clipfrac_avg", "KL and policy"),
        ("val/ratio", "KL and policy"),
        ("val/num_eos_tokens", "Response length"),
        ("objective/response_length", "Response length"),
        ("perf/sequences_per_second", "Throughput and timing"),
        ("learning_rate", "Learning rate and gradients"),
        ("anything", "Everything else"),
    ],
)
def test_metrics_are_grouped_by_name(name, group):
    assert group_of(name) == group


def test_smoothing_keeps_constants_and_lines_and_passes_over_gaps():
    np.testing.assert_allclose(smooth([3.0] * 9, span=4), [3.0] * 9, rtol=1e-12)
    line = smooth([float(i) for i in range(201)], span=5)
    np.testing.assert_allclose(line[100], 100.0, rtol=1e-9)  # no lag in the middle
    assert smooth([1.0, math.nan, 1.0], span=2) == [1.0, 1.0, 1.0]


def test_thinning_keeps_spikes_and_ends():
    values = [0.0] * 50_000
    values[12_345], values[30_000] = 9.0, -9.0
    steps, kept = thin_out(range(50_000), values)
    assert len(kept) <= MAX_POINTS + 2 and max(kept) == 9.0 and min(kept) == -9.0
    assert steps[0] == 0 and steps[-1] == 49_999 and steps == sorted(steps)


def test_the_duration_leaves_out_a_clock_that_was_set_back_between_two_parts_of_a_run(tmp_path):
    times = (1000.0, 1030.0, 10.0, 40.0)
    lines = [json.dumps({"step": step, "time": at, "loss": 1.0}) for step, at in enumerate(times, start=1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "4 steps, 01:00 from the first record to the last" in write_report(tmp_path).read_text()


def test_answers_to_the_same_prompts_stand_side_by_side_across_time(tmp_path):
    columns = ["prompt", "response", "score", "KL"]

    def evaluation(step, *rows):
        return {"step": step, "time": 0.0, "title": HELD_OUT, "columns": columns, "rows": list(rows)}

    samples = [
        evaluation(step, ["Which <day>?", f"answer {step}", step / 10, 0.0], ["Why?", "because", None, 0.1])
        for step in range(0, 90, 10)
    ]
    samples[4]["rows"].pop()
    page = parse(write_report(make_run(tmp_path / "ppo", PPO, samples=samples)))
    (fold,) = [d for d in page.iter("details") if d.find("summary").text.startswith("responses across time")]
    head = [th.text for th in fold.iter("th")]
    assert head == ["prompt", "step 0", "step 20", "step 30", "step 50", "step 60", "step 80"]
    rows = [["".join(td.itertext()) for td in tr.findall("td")] for tr in fold.find(".//tbody").findall("tr")]
    assert rows[0] == ["Which <day>?"] + [f"answer {s} ({s / 10:g})" for s in (0, 20, 30, 50, 60, 80)]
    assert rows[1] == ["Why?"] + ["because"] * 6
    alone = write_report(make_run(tmp_path / "one", PPO, samples=samples[:1])).read_text()
    assert "responses across time" not in alone
