"""Writes tiny exports of every family, with our logits beside them, for `read_exports.py` in older environments.

python tests/compat/write_exports.py FOLDER
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

from jaxrlhf.data.demo import train_tokenizer
from jaxrlhf.errors import InputError
from jaxrlhf.models import KNOWN, Decoder, Model, config_from_dict, config_to_dict, save_pretrained

TESTS = Path(__file__).parents[1]
TEXTS = ["Hello , world . It 's fine !", "  two spaces\n\nnew 123456 naïve 漢字", "<x1>a<x2> b<eos>"]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
REWARD = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "bloom", "gpt_neox", "gptj", "gpt_neo")
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 16}
# Changes to a case's config: the base frequency, the share of rotated features, and every scaling.
ROPE: dict[str, tuple[str, dict]] = {
    "gpt_neox-base": ("gpt_neox", {"rotary_emb_base": 300, "rotary_pct": 0.75}),
    "gpt_neox-all-features": ("gpt_neox", {"rotary_pct": 1.0}),
    "gpt_neox-linear": ("gpt_neox", {"rotary_emb_base": 300, "rope_scaling": {"type": "linear", "factor": 3}}),
    "gpt_neox-dynamic": (
        "gpt_neox",
        {"rotary_pct": 0.5, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    ),
}
for _family in ("llama", "mistral", "qwen2", "qwen3"):
    _base = {"rope_theta": 300.0}
    _own = {"use_sliding_window": False, "sliding_window": None}
    ROPE |= {
        f"{_family}-base": (_family, _base | _own),
        f"{_family}-linear": (_family, _base | _own | {"rope_scaling": {"type": "linear", "factor": 3}}),
        f"{_family}-dynamic": (
            _family,
            _base | _own | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
        ),
        f"{_family}-llama3": (_family, _base | _own | {"rope_scaling": _LLAMA3}),
        f"{_family}-yarn": (
            _family,
            _base
            | _own
            | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
        ),
    }


def load_matrix():
    """The module with the tiny models of the test suite."""
    spec = importlib.util.spec_from_file_location("matrix", TESTS / "models" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_options(model: Model, options: dict) -> Model:
    """The same parameters under other options, which must not change their shapes."""
    config = config_from_dict({"model_type": model.config.family} | options)
    return Model(module=Decoder(config, head=model.module.head), params=model.params, config=config)


def write(folder: Path, model: Model, tokenizer) -> None:
    """An export with the ids, one row without padding and one padded on the right, and our outputs."""
    save_pretrained(model, folder, tokenizer)
    ids = np.random.default_rng(7).integers(4, model.config.vocab_size, (1, 11))
    mask = np.ones_like(ids)
    outputs = model.module.apply({"params": model.params}, ids, mask)
    if model.module.head == "scalar":
        outputs = outputs[:, -1:]
    np.savez(folder / "expected.npz", ids=ids, outputs=np.asarray(outputs, np.float32))


def configs() -> dict[str, tuple[dict, dict]]:
    """Published configs, and those of known shapes, each with our export of it."""
    published = json.loads((TESTS / "models" / "fixtures" / "published_configs.json").read_text())
    published |= {name: {"model_type": known.model_type, **known.options} for name, known in KNOWN.items()}
    pairs = {}
    for name, values in published.items():
        try:
            config = config_from_dict(values, name)
        except InputError as error:
            print(f"{name} is refused: {error}")
            continue
        pairs[name] = (values, config_to_dict(config, dtype="float32"))
    return pairs


def main(folder: Path) -> None:
    matrix = load_matrix()
    tokenizer = train_tokenizer([*TEXTS, "the quick brown fox " * 20], vocab_size=300)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<x1>", "<x2>"]})
    tokenizer.chat_template = TEMPLATE
    for case in matrix.CASES:
        write(folder / case, matrix.tiny_model(case), tokenizer)
    for case in REWARD:
        write(folder / f"{case}-reward", matrix.tiny_model(case, head="scalar"), tokenizer)
    for name, (case, changes) in ROPE.items():
        options = {
            key: value for key, value in matrix.CASES[case][1].items() if key not in ("rotary_pct", "layer_types")
        }
        write(folder / name, with_options(matrix.tiny_model(case), options | changes), tokenizer)
    (folder / "configs.json").write_text(json.dumps(configs()))
    ids = tokenizer(TEXTS)["input_ids"]
    facts = {"texts": TEXTS, "ids": ids, "decoded": [tokenizer.decode(row) for row in ids], "messages": MESSAGES}
    facts |= {"chat": tokenizer.apply_chat_template(MESSAGES, tokenize=False), "size": len(tokenizer)}
    facts |= {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    facts["special"] = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    (folder / "tokenizer.expected.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
