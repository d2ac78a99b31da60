"""`jaxrlhf bench` at toy size: every section and figure, the peer that computes the same, and what is refused."""

import importlib.util
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrlhf.bench import command, ours, record, settings
from jaxrlhf.bench.command import sweep
from jaxrlhf.bench.iteration import Peers, judged, rates
from jaxrlhf.bench.render import BEGIN, END, render
from jaxrlhf.bench.settings import KERNEL_SECTIONS, PHASES, SECTIONS, BenchConfig
from jaxrlhf.cli import main
from jaxrlhf.errors import InputError
from jaxrlhf.plan import roofline

pytestmark = pytest.mark.long

HAS_TORCH = importlib.util.find_spec("torch") is not None
SHAPE = {"model_type": "opt", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return str(folder)


@pytest.fixture(scope="module")
def flags(model):
    shape = ["--actor", model, "--critic", model, "--batch", "16", "--micro_batch", "8", "--prompt", "5"]
    return ["bench", *shape, "--answer", "4", "--repeats", "2"]


@pytest.fixture(scope="module")
def result_file(flags, tmp_path_factory):
    """Of all sections, with the peer where torch is installed."""
    path = tmp_path_factory.mktemp("results") / "toy.json"
    assert main([*flags, "--json", str(path), *(["--peers", "hf"] if HAS_TORCH else [])]) == 0
    return path


@pytest.fixture(scope="module")
def result(result_file):
    return json.loads(result_file.read_text())


def test_the_result_says_where_and_with_what_it_was_measured(result):
    assert {"device", "versions", "command", "commit", "settings", "peaks", "time", "xla_flags"} <= set(result)
    assert result["settings"]["batch"] == [16] and result["versions"]["jax"] == jax.__version__
    assert result["peaks"]["tflops"] > 0 and result["peaks"]["gb_per_second"] > 0


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_has_every_figure(result, name):
    record = result[name]
    assert record["batch"] == 16 and record["stopped"] is None and len(record["sweep"]) == 1
    seconds = record["seconds"]
    assert len(seconds["runs"]) == 2 and seconds["min"] == min(seconds["runs"]) <= seconds["median"]
    tokens = {"generate": 4, "decode": 1}.get(name, 9)
    assert record["tokens_per_second"] == pytest.approx(16 * tokens / seconds["median"])
    answers = 4 if name == "decode" else 1
    assert record["sequences_per_second"] == pytest.approx(16 / answers / seconds["median"])
    assert record["roofline_fraction"] == pytest.approx(record["roofline_seconds"] / seconds["median"])
    assert min(record["tflops"], record["gb_per_second"], record["roofline_fraction"]) > 0
    assert record["peak_memory"]["bytes"] > 0 and record["compile_seconds"] >= 0
    assert record.get("decode_attention") == ("xla" if name in ("decode", "generate") else None)
    if name in ("attention", "logprobs"):
        assert set(record["parts"]) == {"forward", "train"}


def test_an_iteration_is_the_sum_of_its_phases(result):
    phases = result["ppo"]["phases"]
    assert tuple(phases) == PHASES
    runs = np.sum([phases[name]["seconds"]["runs"] for name in PHASES], axis=0)
    np.testing.assert_allclose(result["ppo"]["seconds"]["runs"], runs, rtol=1e-12)
    assert phases["score"]["seconds"] == result["score"]["seconds"]


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_the_peer_computes_the_same_and_its_ratios_stand_in_the_result(result):
    peer = result["ppo"]["peers"]["hf"]
    assert peer["ratio"] == pytest.approx(peer["seconds"]["min"] / result["ppo"]["seconds"]["min"])
    assert set(peer["phases"]) == set(PHASES)
    for name in PHASES:
        assert peer["phases"][name]["ratio"] == result[name]["peers"]["hf"]["ratio"] > 0
    first, after = peer["check"]["first"], peer["check"]["after_a_step"]
    for name in ("logprobs", "ref_logprobs", "values", "scores"):
        assert first[name] < 5e-6 and after[name] < 5e-5, name
    for name in ("loss/policy_avg", "loss/value_avg", "policy/grad_norm", "val/grad_norm"):
        assert first[name] < 2e-5, name
    assert peer["check"]["wrong"] == []


@pytest.fixture
def compiling_torch():
    torch = pytest.importorskip("torch")
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    except RuntimeError as error:
        pytest.skip(f"torch.compile does not work here: {error}")
    torch._dynamo.utils.counters.clear()
    yield torch
    torch.compiler.reset()


def test_the_compiled_peer_runs_in_turns_with_the_plain_one_in_the_phases_alone(compiling_torch, flags, tmp_path):
    path = tmp_path / "phases.json"
    argv = [*flags, "--sections", "generate,score,train", "--peers", "hf", "hf-compile", "--json", str(path)]
    assert main(argv) == 0
    assert compiling_torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    found = json.loads(path.read_text())
    assert "ppo" not in found
    for name in PHASES:
        plain, compiled = (found[name]["peers"][peer] for peer in ("hf", "hf-compile"))
        assert len(compiled["seconds"]["runs"]) == 2 and min(compiled["seconds"]["runs"]) > 0
        assert compiled["ratio"] == pytest.approx(compiled["seconds"]["min"] / found[name]["seconds"]["min"])
        assert (plain["seconds"] == compiled["seconds"]) == (name != "generate")
        assert plain["check"] == compiled["check"] and plain["check"]["wrong"] == []


def test_trl_runs_whole_iterations_in_turns_with_ours(flags, tmp_path, monkeypatch):
    """Each has the rows and tokens of ours, in two micro-batches, and moves both models."""
    pytest.importorskip("trl")
    import trl.experimental.ppo.ppo_trainer as theirs

    from jaxrlhf.bench import trl_peer

    generated, moved = [], []

    def generate(*given, **options):
        result = theirs_generate(*given, **options)
        generated.append((tuple(result[0].shape), given[2]))
        return result

    def iteration(peer):
        before = [p.detach().clone() for p in peer.trainer.model.parameters()]
        seconds = run(peer)
        moved.append([bool((a != b).any()) for a, b in zip(before, peer.trainer.model.parameters(), strict=True)])
        return seconds

    theirs_generate, run = theirs.batch_generation, trl_peer.TrlPeer.iteration
    monkeypatch.setattr(theirs, "batch_generation", generate)
    monkeypatch.setattr(trl_peer.TrlPeer, "iteration", iteration)
    path = tmp_path / "trl.json"
    assert main([*flags, "--sections", "ppo", "--peers", "trl", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["ppo"]
    peer = found["peers"]["trl"]
    assert len(peer["seconds"]["runs"]) == 2 and min(peer["seconds"]["runs"]) > 0
    assert peer["ratio"] == pytest.approx(peer["seconds"]["min"] / found["seconds"]["min"])
    assert generated == [((16, 9), 8)] * 3 and len(moved) == 3 and all(map(all, moved))


def _peers(check):
    """Of a run whose rounds are over."""
    peers = object.__new__(Peers)
    took = [{"generate": 3.0, "score": 2.0, "train": 4.0}, {"generate": 3.0, "score": 1.0, "train": 4.0}]
    peers.times, peers.skipped, peers.check, peers.names, peers.lost = {"hf": took}, {}, check, ("hf",), {}
    return peers


def test_sections_without_ppo_have_their_ratios_and_the_check_too():
    ours, check = {"generate": [1.0, 1.0], "score": [2.0, 2.0], "train": [1.0, 1.0]}, {"wrong": ["values 0.3"]}
    found = _peers(check).results(ours)["hf"]
    assert {name: peer["ratio"] for name, peer in found.items()} == {"generate": 3.0, "score": 0.5, "train": 4.0}
    assert all(peer["check"] is check for peer in found.values())
    whole = _peers(check).results(ours | {"ppo": [4.0, 4.0]})["hf"]["ppo"]
    assert whole["ratio"] == 2.0 and whole["seconds"]["runs"] == [9.0, 8.0] and set(whole["phases"]) == set(PHASES)
    peers = _peers(check)
    peers.skipped = {"hf": "out of memory"}
    assert peers.results({"score": [1.0]})["hf"] == {"score": {"skipped": "out of memory", "check": check}}


def test_a_peer_that_computes_something_else_fails_the_command_in_every_section(monkeypatch, no_peaks, tmp_path):
    found = _peers({"first": {}, "after_a_step": {}, "wrong": ["values 0.3"]}).results({"score": [1.0] * 2})["hf"]
    record = rates((roofline.Cost(1.0, 1.0),), [1.0, 1.0], 8, 4, roofline.Peaks(1.0, 1.0))
    record |= {"peers": {"hf": found["score"]}}
    monkeypatch.setattr(command, "sections", lambda *_: iter([{"score": record | {"sweep": [record]}}]))
    path = tmp_path / "result.json"
    with pytest.raises(SystemExit, match=r"the peer computes something else: values 0\.3"):
        main(["bench", "--sections", "score", "--json", str(path)])
    assert json.loads(path.read_text())["score"]["peers"]["hf"]["check"]["wrong"] == ["values 0.3"]


def test_what_a_peer_computes_otherwise_is_named():
    same = {"logprobs": 1e-6, "scores": 0.0}
    first = same | {"loss/value_avg": 1e-6}
    assert judged(first, same, "float32")["wrong"] == []
    assert judged(first | {"logprobs": 1e-2}, same, "float32")["wrong"] == ["logprobs 0.01"]
    assert judged(first | {"loss/value_avg": 0.5}, same, "float32")["wrong"] == ["loss/value_avg 0.5"]
    assert judged(first, {"scores": float("nan")}, "float32")["wrong"] == ["scores nan after a step"]
    assert judged(first | {"logprobs": 1e-2}, same, "bfloat16")["wrong"] == []


def test_results_are_rendered_between_the_markers(result_file, tmp_path, capsys):
    document = tmp_path / "bench.md"
    document.write_text("# Title\n\nBefore.\n\n" + _markers() + "\n\nAfter.\n")
    argv = ["bench", "--render", "--results", str(result_file.parent), "--document", str(document)]
    assert main(argv) == 0
    text = document.read_text()
    assert text.startswith("# Title\n\nBefore.") and text.endswith("After.\n")
    for name in ("attention train", "decode", "ppo", "- generate"):
        assert f"| {name} | 16 |" in text
    assert ("| ppo | 16 | hf |" in text) == HAS_TORCH
    plot = tmp_path / "bench" / "toy.svg"
    assert f"![]({plot.relative_to(tmp_path)})" in text and "<svg" in plot.read_text()
    assert main(argv) == 0
    assert document.read_text() == text
    document.write_text("no markers")
    assert main(argv) == 2
    assert "lacks the lines" in capsys.readouterr().err
    assert main([*argv[:3], str(tmp_path), *argv[4:]]) == 2
    assert "holds no result" in capsys.readouterr().err


def test_registers_and_spills_of_kernels_are_a_table(result_file, tmp_path):
    rows = [
        {"device": "a100-80g", "kernel": "k", "shape": "head size 64", "registers": 150, "spilled": 0},
        {"device": "v5e", "kernel": "k", "shape": "head size 64", "registers": None, "spilled": None},
        {"device": "a100-80g", "kernel": "k", "shape": "head size 80", "registers": 255, "spilled": 12},
    ]
    made = {"commit": "0123456789ab", "time": "2026-01-02T", "command": "python x.py", "versions": {"jax": "0.10.2"}}
    folder, document = tmp_path / "results", tmp_path / "bench.md"
    folder.mkdir()
    (folder / "toy.json").write_text(result_file.read_text())
    (folder / "kernels_aot.json").write_text(json.dumps(made | {"kernels": rows}))
    assert main(["bench", "--render", "--results", str(folder), "--document", str(document)]) == 0
    text = document.read_text()
    assert "| kernel | shape | a100-80g | v5e |" in text and "jax 0.10.2; commit `0123456789`, 2026-01-02" in text
    assert "| `k` | head size 64 | 150 / 0 | compiles |\n| `k` | head size 80 | 255 / 12 |  |" in text


def test_uncommitted_changes_load_and_an_early_end_are_rendered(result_file, tmp_path):
    run = json.loads(result_file.read_text()) | {"commit": f"{'0123456789' * 4} with changes", "ended_by": "OSError x"}
    run["load_average"] = {"before": 0.42, "after": 4.1}
    single = {"commit": "f" * 40, "load_average": 9.87, "ratio": 1.5, "device": "d", "command": "c"}
    folder, document = tmp_path / "results", tmp_path / "bench.md"
    folder.mkdir()
    (folder / "toy.json").write_text(json.dumps(run))
    (folder / "decode.json").write_text(json.dumps(single))
    assert main(["bench", "--render", "--results", str(folder), "--document", str(document)]) == 0
    text = document.read_text()
    day = run["time"][:10]
    assert f"; commit `0123456789` with changes, {day}, load average 0.4 before, 4.1 after.\n" in text
    assert "The run ended early: OSError x." in text
    assert "| 1.50 | d | commit `ffffffffff`, load average 9.9 at the end | `c` |" in text


def test_the_document_shows_the_committed_results(tmp_path):
    document = tmp_path / "benchmarks.md"
    shown = (RESULTS.parents[1] / "docs" / "benchmarks.md").read_text()
    document.write_text(shown)
    render(RESULTS, document)
    assert document.read_text() == shown, "run `jaxrlhf bench --render`"


def test_figures_of_attention_in_the_documents_stand_in_the_result_that_they_name():
    text = (RESULTS.parents[1] / "docs" / "generation.md").read_text()
    claim = re.search(r"took (\d+) ms for (\d+) rows of (\d+) tokens, by \[a result\]\(\.\./(\S+)\) of\s`(.*?)`", text)
    milliseconds, rows, tokens, path, command_line = claim.groups()
    found = json.loads((RESULTS.parents[1] / path).read_text())
    assert found["command"].startswith(command_line)
    (record,) = (r for r in found["attention"]["sweep"] if r["batch"] == int(rows))
    assert round(1e3 * record["parts"]["train"]["seconds"]["median"]) == int(milliseconds)
    assert found["settings"]["prompt"] + found["settings"]["answer"] == int(tokens)


def _markers():
    return f"{BEGIN}\n{END}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sections", "atention"], "sections='atention' must be one of attention, decode"),
        (["--peers", "vllm"], "peers='vllm' must be one of hf, hf-compile, trl"),
        (["--batch", "8", "4"], "batch=8,4 must be positive and ascending"),
        (["--batch", "24", "--micro_batch", "16"], "micro_batch=16 must divide batch=24"),
        (["--mesh_data", "1", "--mesh_fsdp", "1", "--mesh_tensor", "8", "--micro_batch", "3"], "must divide batch=8"),
        (["--batch", "12"], "batch=12 must be a multiple of the 8 devices of mesh_data × mesh_fsdp"),
        (["--micro_batch", "4"], "micro_batch=4 must be a multiple of the 8 devices of mesh_data × mesh_fsdp"),
        (["--prompt", "0"], "prompt=0 must be at least 1"),
        (["--sections", "attention", "--logprob_implementation", "pallas"], "logprob_implementation=pallas changes"),
        (["--sections", "attention", "--kv_cache_dtype", "int8"], "changes nothing in attention; leave it out, or add"),
        (["--sections", "decode", "--micro_batch", "8"], "micro_batch=8 changes nothing in decode"),
        (["--sections", "score", "--remat_policy", "full"], "add one of train, ppo to the sections"),
        (["--sections", "decode", "--answer", "1"], "answer=1: decode measures"),
        (
            ["--sections", "decode,generate", "--attention_implementation", "cudnn"],
            "attention_implementation=cudnn serves training and scoring alone, which decode, generate does not run",
        ),
        (
            ["--sections", "logprobs", "--attention_implementation", "tokamax"],
            "attention_implementation=tokamax serves",
        ),
        (["--actor", "no-such-model"], "actor: 'no-such-model' is no folder, and unknown model"),
        (["--critic", "gpt2"], "a vocabulary of 50272 tokens and critic=gpt2 one of 50257"),
        (["--prompt", "2000"], "exceeds the model's context of 2048"),
    ],
)
def test_bad_settings_are_refused_by_name(flags, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ours, "measure_peaks", lambda _: pytest.fail("measured"))
    assert main(["bench", *flags, "--results", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_peers_need_their_packages_and_a_section_to_run(monkeypatch):
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None if name == "trl" else object())
    with pytest.raises(InputError, match="trl needs the package trl, which is not installed"):
        BenchConfig.create(peers=("trl",))
    with pytest.raises(InputError, match="add one to the sections"):
        BenchConfig.create(peers=("hf",), sections=KERNEL_SECTIONS)
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match="trl only runs whole iterations"):
        BenchConfig.create(peers=("trl",), sections=("train",))


def test_a_sweep_ends_where_memory_does_and_reports_the_best():
    def measure(rows):
        if rows > 16:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")
        return {"ppo": {"batch": rows, "sequences_per_second": {4: 1.0, 8: 3.0, 16: 2.0}[rows]}}

    *_, (found,) = (list(records.values()) for records in sweep([4, 8, 16, 32, 64], measure, {}))
    assert found["batch"] == 8 and [record["batch"] for record in found["sweep"]] == [4, 8, 16]
    assert found["stopped"] == {"batch": 32, "reason": "RESOURCE_EXHAUSTED: Out of memory"}
    with pytest.raises(InputError, match="batch=32 does not fit"):
        next(sweep([32], measure, {}))

    def broken(rows):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        next(sweep([4], broken, {}))


def test_a_sweep_goes_on_without_the_phases_that_no_longer_fit(flags, monkeypatch, no_peaks, tmp_path, capsys):
    def limited(phase, most, run):
        def checked(self, *given):
            if self.rows > most:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return run(self, *given)

        monkeypatch.setattr(ours.Iteration, phase, checked)

    limited("train", 8, ours.Iteration.train)
    limited("score", 16, ours.Iteration.score)
    path = tmp_path / "swept.json"
    argv = [*flags, "--batch", "8", "16", "24", "32", "--sections", "generate,score,train,ppo"]
    argv += ["--peers", "hf"] if HAS_TORCH else []
    assert main([*argv, "--repeats", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    swept = {
        name: [record["batch"] for record in found[name]["sweep"]] for name in ("generate", "score", "train", "ppo")
    }
    assert swept == {"generate": [8, 16, 24, 32], "score": [8, 16], "train": [8], "ppo": [8]}
    ended = {name: found[name]["stopped"] and found[name]["stopped"]["batch"] for name in swept}
    assert ended == {"generate": None, "score": 24, "train": 16, "ppo": 16}
    if HAS_TORCH:
        assert all(record["peers"]["hf"]["ratio"] > 0 for name in swept for record in found[name]["sweep"])


def test_models_that_do_not_fit_are_named(flags, monkeypatch, no_peaks, tmp_path, capsys):
    def broken(*given, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(ours, "create_model", broken)
    for section in ("decode", "ppo"):
        assert main([*flags, "--micro_batch", "0", "--sections", section, "--results", str(tmp_path)]) == 2
        assert "do not fit the device's memory; name smaller ones" in capsys.readouterr().err


def test_a_torch_peer_that_does_not_fit_beside_ours_is_left_out(flags, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    from jaxrlhf.bench import peers

    def broken(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(peers.TorchPeer, "train", broken)
    path = tmp_path / "lost.json"
    assert main([*flags, "--sections", "ppo", "--peers", "hf", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["ppo"]["peers"] == {"hf": {"skipped": "out of memory"}}


@pytest.fixture
def no_peaks(monkeypatch):
    """So that a command begins without measuring."""
    peaks = roofline.Peaks(1.0, 1.0), {"tflops": 1.0, "gb_per_second": 1.0}
    monkeypatch.setattr(ours, "measure_peaks", lambda _: peaks)


@pytest.mark.parametrize("error", [RuntimeError("of torch\nmore"), KeyboardInterrupt()])
def test_an_error_loses_none_of_the_batches_before_it(error, monkeypatch, no_peaks, tmp_path, capsys):
    def measure(*given):
        if given[-1] == 24:
            raise error
        return rates((roofline.Cost(1.0, 1.0),), [1.0], given[-1], 1, roofline.Peaks(1.0, 1.0))

    monkeypatch.setattr(command, "kernel_record", measure)
    path = tmp_path / "new" / "result.json"
    argv = ["bench", "--sections", "logprobs", "--batch", "8", "16", "24", "--json", str(path)]
    if isinstance(error, KeyboardInterrupt):
        assert main(argv) == 130
    else:
        with pytest.raises(RuntimeError, match="of torch"):
            main(argv)
    found = json.loads(path.read_text())
    assert [record["batch"] for record in found["logprobs"]["sweep"]] == [8, 16]
    assert found["ended_by"] == {RuntimeError: "RuntimeError of torch"}.get(type(error), "KeyboardInterrupt")
    assert f"result up to here: {path}" in capsys.readouterr().out


def test_a_result_that_cannot_be_written_is_refused_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ours, "measure_peaks", lambda _: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert main(["bench", "--json", str(tmp_path)]) == 2
    assert f"json: {tmp_path} is a folder; name a file in it" in capsys.readouterr().err
    assert main(["bench", "--json", str(tmp_path / "file" / "result.json")]) == 2
    assert f"json: {tmp_path / 'file' / 'result.json'} cannot be written" in capsys.readouterr().err
    assert main(["bench", "--results", str(tmp_path / "file")]) == 2
    assert "results: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_result_is_replaced_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "result.json"
    record.write(path, {"gap": float("nan")})
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("the disk is full"))
    with pytest.raises(pytest.fail.Exception, match="the disk is full"):
        record.write(path, {"gap": 1.0})
    assert path.read_text() == before and "NaN" in before
    assert [found.name for found in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("text", "message"), [('{"format": 1, "dev', "is not valid JSON"), ("[1]", "must hold a JSON object")]
)
def test_a_broken_result_is_named_when_results_are_rendered(text, message, tmp_path, capsys):
    (tmp_path / "cut.json").write_text(text)
    document = tmp_path / "bench.md"
    assert main(["bench", "--render", "--results", str(tmp_path), "--document", str(document)]) == 2
    said = capsys.readouterr().err
    assert f"results: {tmp_path / 'cut.json'}" in said and message in said
    assert not document.exists()


def test_the_committed_cpu_comparison_keeps_its_bound():
    """As measured on the machine that the file names: the bound is a claim about it, not about this one."""
    result = json.loads((RESULTS / "ppo_cpu.json").read_text())
    peer = result["ppo"]["peers"]["hf"]
    assert peer["check"]["wrong"] == [] and peer["ratio"] >= 1.3
    assert result["settings"] | {"batch": [8], "prompt": 128, "answer": 128} == result["settings"]
