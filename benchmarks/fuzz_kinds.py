"""Every kind of file that a command reads: a good one of each, the command line that reads it, and its damages."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_attacks import ADAPTERS, BOMBS, CONFIGS, INDEXES, PICKLES, SAVED, SPLITS, TEMPLATES, TOKENIZERS, YAMLS, Attack
from fuzz_damage import UNDAMAGED, Damage, byte_damages, json_damages, place_damages, text_damage, value_damages

LLAMA = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA |= {"num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
TEACHER = {"kd_temperature": 1.0, "teacher_top_k": 2}
ROW = {"prompt": "one two", "response": "three four", "chosen": "yes yes", "rejected": "no no"}
CSV = "prompt,response,chosen,rejected\n" + "".join(f"one {i},two,three,four\n" for i in range(8))

Command = list[str] | Callable[[], object]
Words = Callable[[Path, Path], Command]
"""(folder with the inputs, folder for outputs) → a command line, or a call of the library."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        file: the file in the folder of inputs.
        words: the command that reads it.
        content: "json", "text" or "bytes": which damages apply.
        attacks: contents made by hand.
        lenient: content without a structure is accepted: any text is text, and a last line that is cut off is left out.
        names: words that name the input in a message as well as the file's name does.
    """

    file: str
    words: Words
    content: str = "bytes"
    attacks: tuple[Attack, ...] = ()
    names: tuple[str, ...] = ()
    lenient: bool = False

    def damages(self, inputs: Path, rng: random.Random, values: int) -> Iterator[Damage]:
        """All ways to damage the file; `values`: how many single values of a JSON file are replaced."""
        yield Damage(UNDAMAGED, lambda path: None)
        yield from (damage._replace(harmless=damage.harmless or self.lenient) for damage in byte_damages(rng))
        yield from place_damages()
        if self.content == "json":
            yield from json_damages()
            yield from value_damages(json.loads((inputs / self.file).read_text(encoding="utf-8")), rng, values)
        for name, content, harmless in self.attacks:
            if callable(content):
                yield Damage(name, content, harmless)
            else:
                yield text_damage(name, content, harmless)


def convert(model: Path, outputs: Path, *more: str) -> list[str]:
    return ["convert", "--input", str(model), "--output", str(outputs / "model"), "--to", "hf", *more]


def model(inputs: Path, outputs: Path) -> Command:
    return convert(inputs, outputs)


def sharded(inputs: Path, outputs: Path) -> Command:
    return convert(inputs / "sharded", outputs)


def old_model(inputs: Path, outputs: Path) -> Command:
    return convert(inputs / "bin", outputs)


def adapter(inputs: Path, outputs: Path) -> Command:
    return convert(inputs, outputs, "--adapter", str(inputs / "adapter"))


def gguf(inputs: Path, outputs: Path) -> Command:
    return convert(inputs / "model.gguf", outputs)


def checkpoint(inputs: Path, outputs: Path) -> Command:
    return convert(inputs / "run", outputs, "--from", "orbax")


def rendered(inputs: Path, outputs: Path) -> Command:
    document = str(outputs / "cache" / "page.md")
    return ["bench", "--render", "--results", str(inputs / "results"), "--document", document]


def data(*words: str, tokenizer: str = "") -> Words:
    """A `jaxrlhf data` command; `{}` in a word is the folder of the inputs."""

    def command(inputs: Path, outputs: Path) -> Command:
        filled = [word.replace("{}", str(inputs)) for word in words]
        if "--data_path" not in words and "--data_mixture" not in words and "--config" not in words:
            filled += ["--data_path", str(inputs / "rows.jsonl")]
        folder = str(inputs / tokenizer) if tokenizer else "demo"
        options = ["--max_length", "64", "--max_prompt_seq_len", "32", "--data_cache_dir", str(outputs / "cache")]
        return ["data", *filled, "--tokenizer_name_or_path", folder, *options]

    return command


def streamed(inputs: Path, outputs: Path) -> Command:
    """Reads the first batch of a stream."""

    def read() -> None:
        from jaxrlhf.data import DataConfig, load_data, load_tokenizer

        paths = {"data_path": (str(inputs / "rows.jsonl"),), "eval_data_path": (str(inputs / "rows.json"),)}
        options = {"max_length": 64, "max_prompt_seq_len": 32, "data_cache_dir": str(outputs / "cache")}
        config = DataConfig.create(streaming=True, **paths, **options)
        rows, _ = load_data(config, load_tokenizer("demo"), "sft")
        rows.batch(rows.indices(0, 2))

    return read


def pretraining(inputs: Path, outputs: Path) -> Command:
    """Reads text for the pretraining loss."""

    def read() -> None:
        from jaxrlhf.data import load_text, load_tokenizer

        options: dict[str, Any] = {"field": "text", "block": 8, "held_out": 0.1, "cache": outputs / "cache"}
        load_text([str(inputs / "rows.txt")], load_tokenizer("demo"), **options)

    return read


def cached_text(inputs: Path, outputs: Path) -> Command:
    """Reads the tokens of such text from the cache."""

    def read() -> None:
        from jaxrlhf.data import load_text, load_tokenizer

        cache = outputs / "cache"
        options: dict[str, Any] = {"field": "text", "block": 8, "held_out": 0.1, "cache": cache}
        load_text([str(inputs / "text.txt")], load_tokenizer("demo"), **options)
        next(cache.glob("text/*/")).joinpath("tokens.npy").unlink()
        next(cache.glob("text/*/")).joinpath("tokens.npy").symlink_to(inputs / "tokens.npy")
        load_text([str(inputs / "text.txt")], load_tokenizer("demo"), **options)

    return read


def baseline(inputs: Path, outputs: Path) -> Command:
    """Reads the scores before training of a resumed run."""

    def read() -> None:
        from jaxrlhf.commands.data import DataViewConfig
        from jaxrlhf.rl.run import Baseline
        from jaxrlhf.runs import Run

        with Run(inputs / "records", DataViewConfig(), resume=True, quiet=True) as run:
            Baseline(run, "p").read()

    return read


def resumed(inputs: Path, outputs: Path) -> Command:
    """Goes on with the records of a run, and writes its report."""

    def read() -> None:
        from jaxrlhf.commands.data import DataViewConfig
        from jaxrlhf.runs import Run
        from jaxrlhf.runs.trackers import TrackingConfig

        options: dict[str, Any] = {
            "resume": True,
            "quiet": True,
            "tracking": TrackingConfig(report_to=("tensorboard",)),
        }
        with Run(inputs / "records", DataViewConfig(), **options) as run:
            run.rewind(1)
            run.log(2, {"loss": 1.0})

    return read


def teacher(inputs: Path, outputs: Path) -> Command:
    """Opens the folder of `teacher_log_probs`."""

    def read() -> None:
        from jaxrlhf.trainers.teachers import read_teacher

        read_teacher(inputs / "teacher", TEACHER, 3)

    return read


def rows(file: str, *more: str) -> Words:
    return data("--data_path", f"{{}}/{file}", *more)


KINDS: dict[str, Kind] = {
    "config.json": Kind("config.json", model, "json", CONFIGS),
    "generation_config.json": Kind("generation_config.json", model, "json"),
    "model.safetensors": Kind("model.safetensors", model),
    "weight index": Kind("sharded/model.safetensors.index.json", sharded, "json", INDEXES),
    "pytorch_model.bin": Kind("bin/pytorch_model.bin", old_model, attacks=PICKLES),
    "tokenizer.json": Kind("tokenizer.json", data(tokenizer="."), "json"),
    "tokenizer_config.json": Kind("tokenizer_config.json", data(tokenizer="."), "json", TOKENIZERS),
    "special_tokens_map.json": Kind("special_tokens_map.json", data(tokenizer="."), "json"),
    "added_tokens.json": Kind("added_tokens.json", data(tokenizer="."), "json"),
    "chat template of a tokenizer": Kind(
        "chat_template.jinja", data(tokenizer="."), "text", TEMPLATES, ("chat template",)
    ),
    "file of chat_template": Kind(
        "own.jinja", data("--chat_template", "{}/own.jinja"), "text", TEMPLATES, ("chat template",)
    ),
    "adapter_config.json": Kind("adapter/adapter_config.json", adapter, "json", ADAPTERS),
    "adapter_model.safetensors": Kind("adapter/adapter_model.safetensors", adapter),
    "GGUF": Kind("model.gguf", gguf),
    "rows.jsonl": Kind("rows.jsonl", rows("rows.jsonl")),
    "rows.json": Kind("rows.json", rows("rows.json"), "json"),
    "rows.csv": Kind("rows.csv", rows("rows.csv")),
    "rows.parquet": Kind("rows.parquet", rows("rows.parquet")),
    "rows.arrow": Kind("rows.arrow", rows("rows.arrow")),
    "rows.txt (ptx)": Kind("rows.txt", pretraining, lenient=True),
    "cached tokens (ptx)": Kind("tokens.npy", cached_text),
    "rows.jsonl.gz": Kind("rows.jsonl.gz", rows("rows.jsonl.gz"), attacks=(BOMBS[".gz"],)),
    "rows.jsonl.zst": Kind("rows.jsonl.zst", rows("rows.jsonl.zst"), attacks=(BOMBS[".zst"],)),
    "rows.jsonl, streamed": Kind("rows.jsonl", streamed),
    "save_to_disk dict": Kind("saved/dataset_dict.json", rows("saved"), "json", SPLITS),
    "save_to_disk state": Kind("saved/train/state.json", rows("saved"), "json", SAVED),
    "save_to_disk info": Kind("saved/train/dataset_info.json", rows("saved"), "json"),
    "save_to_disk rows": Kind("saved/train/data-00000-of-00001.arrow", rows("saved")),
    "YAML of config": Kind("config.yaml", data("--config", "{}/config.yaml"), "text", YAMLS, ("data_path",)),
    "YAML of data_mixture": Kind(
        "mixture.yaml", data("--data_mixture", "{}/mixture.yaml"), "text", YAMLS, ("data_path",)
    ),
    "YAML of dataset_registry": Kind(
        "registry.yaml", data("--dataset_registry", "{}/registry.yaml"), "text", YAMLS, ("data_path",)
    ),
    "checkpoint index": Kind("run/checkpoint-0/index.json", checkpoint, "json"),
    "checkpoint metadata": Kind("run/checkpoint-0/metadata.json", checkpoint, "json"),
    "metrics.jsonl": Kind("records/metrics.jsonl", resumed, lenient=True),
    "samples.jsonl": Kind("records/samples.jsonl", resumed, lenient=True),
    "scores before training": Kind("records/eval_baseline.json", baseline, "json"),
    "summary.json": Kind("records/summary.json", resumed, "json"),
    "trackers.json": Kind("records/trackers.json", resumed, "json"),
    "record of teacher_log_probs": Kind("teacher/about.json", teacher, "json", names=("teacher_log_probs",)),
    "ids of teacher_log_probs": Kind("teacher/ids.npy", teacher),
    "logps of teacher_log_probs": Kind("teacher/logps.npy", teacher),
    "results of bench": Kind("results/r.json", rendered, "json"),
}


def make_inputs(folder: Path) -> None:
    """Writes a good file of every kind."""
    folder.mkdir(parents=True)
    _make_models(folder)
    _make_rows(folder)
    _make_teacher(folder / "teacher")
    for name, text in {
        "own.jinja": TEMPLATE,
        "config.yaml": f"step: sft\nshow: 1\ndata_path:\n  - {folder}/rows.jsonl\n",
        "mixture.yaml": f"sources:\n  - path: {folder}/rows.jsonl\n    weight: 1.5\n    steps: [sft]\n",
        "registry.yaml": f"- name: mine\n  path: {folder}/rows.jsonl\n",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "records").mkdir()
    for name, text in {
        "config.yaml": "step: sft\n",
        "metrics.jsonl": '{"step": 1, "time": 1.5, "loss": 2.0}\n{"step": 2, "time": 2.5, "loss": null}\n',
        "samples.jsonl": '{"step": 1, "title": "a", "columns": ["prompt", "score"], "rows": [["x", 1.0]]}\n',
        "summary.json": '{"trainer": "sft", "steps": 2}\n',
        "eval_baseline.json": '{"prompts": "p", "scores": {"0": 1.0, "1": -0.5}}\n',
        "trackers.json": '{"tensorboard": {"url": "x"}}\n',
    }.items():
        (folder / "records" / name).write_text(text, encoding="utf-8")
    (folder / "results").mkdir()
    shutil.copy(Path(__file__).parent / "results" / "kernels_cpu.json", folder / "results" / "r.json")


def _make_models(folder: Path) -> None:
    import torch
    from safetensors.numpy import load_file, save_file

    from jaxrlhf.cli import main
    from jaxrlhf.data.demo import train_tokenizer
    from jaxrlhf.models import model_from_overrides, save_pretrained

    made, tokenizer = model_from_overrides("llama", LLAMA), train_tokenizer(["one two three four"], vocab_size=300)
    tokenizer.chat_template = TEMPLATE
    save_pretrained(made, folder, tokenizer)
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "<eos>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<more>": len(tokenizer)}))
    save_pretrained(made, folder / "sharded", max_shard_bytes=20_000)
    save_pretrained(made, folder / "bin")
    weights = load_file(folder / "bin" / "model.safetensors")
    (folder / "bin" / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(x) for name, x in weights.items()}, folder / "bin" / "pytorch_model.bin")
    (folder / "adapter").mkdir()
    stem = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {stem.format(i, part): shape for i in range(2) for part, shape in (("A", (4, 16)), ("B", (16, 4)))}
    save_file(
        {name: weights["lm_head.weight"][: s[0]].repeat(1, 1)[:, : s[1]].copy() for name, s in shapes.items()},
        folder / "adapter" / "adapter_model.safetensors",
    )
    options = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj"]}
    options |= {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "modules_to_save": None, "bias": "none"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(options))
    _make_gguf(folder / "model.gguf", weights)
    words = ["convert", "--input", str(folder / "bin"), "--output", str(folder / "run"), "--to", "orbax"]
    assert main(words) == 0


def _make_teacher(folder: Path) -> None:
    import numpy as np

    from jaxrlhf.trainers.teachers import KINDS as ARRAYS
    from jaxrlhf.trainers.teachers import seal

    folder.mkdir()
    for name, kind in ARRAYS.items():
        np.save(folder / f"{name}.npy", np.arange(6).reshape(3, 2).astype(kind))
    seal(folder, TEACHER)


def _make_gguf(path: Path, weights: dict[str, Any]) -> None:
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LLAMA["num_hidden_layers"])
    writer.add_context_length(LLAMA["max_position_embeddings"])
    writer.add_embedding_length(LLAMA["hidden_size"])
    writer.add_feed_forward_length(LLAMA["intermediate_size"])
    writer.add_head_count(LLAMA["num_attention_heads"])
    writer.add_head_count_kv(LLAMA["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    table = get_tensor_name_map(MODEL_ARCH.LLAMA, LLAMA["num_hidden_layers"])
    for name, x in weights.items():
        own = table.get_name(name, try_suffixes=(".weight",))
        assert own is not None
        writer.add_tensor(own, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _make_rows(folder: Path) -> None:
    import datasets
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    import zstandard

    found = [ROW | {"prompt": f"one two {i}"} for i in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in found)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.json").write_text(json.dumps(found))
    (folder / "rows.csv").write_text(CSV)
    (folder / "rows.txt").write_text(lines)
    (folder / "text.txt").write_text(lines)
    np.save(folder / "tokens.npy", np.arange(100, dtype=np.int32))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "rows.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    table = pyarrow.Table.from_pylist(found)
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    with pyarrow.ipc.new_stream(str(folder / "rows.arrow"), table.schema) as stream:
        stream.write_table(table)
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(found)}).save_to_disk(str(folder / "saved"))
