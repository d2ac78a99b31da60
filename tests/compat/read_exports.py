"""Reads the exports of `write_exports.py` with the installed transformers, without jaxrlhf, and compares outputs.

    python tests/compat/read_exports.py FOLDER

Prints one line per export and exits with 1 if an export is read as something else, or not at all for a reason that is
not in `LIMITS`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
TOLERANCE = 2e-4
# What a version cannot do with any checkpoint: (exports, first version that can, what happens before it).
LIMITS: list[tuple[str, tuple[int, int], str]] = [
    ("mistral", (4, 48), "windows are one position wider"),
    ("mistral-reward", (4, 48), "windows are one position wider"),
    ("phi3", (4, 48), "windows are one position wider"),
    *(
        (f"{family}-{scaling}", (4, 48), f"{family} has no rope scaling")
        for family in ("mistral", "qwen2")
        for scaling in ("linear", "dynamic", "llama3", "yarn")
    ),
    *((name, (4, 48), "head_dim is hidden_size / num_attention_heads") for name in ("llama-biases", "mixtral-options")),
    ("llama3-rope", (4, 48), "rope_scaling is linear or dynamic"),
    ("llama-llama3", (4, 48), "rope_scaling is linear or dynamic"),
    ("llama-yarn", (4, 48), "rope_scaling is linear or dynamic"),
    ("phi3-options", (4, 52), "phi3 rotates all features of a head"),
    ("gemma-options", (4, 48), "gemma has one activation and no rope scaling"),
    ("olmo2-options", (5, 0), "rope_scaling of olmo2 is linear or dynamic"),
    *((name, (4, 57), "windows are on all layers or on none") for name in ("qwen2", "qwen2-reward", "qwen3-options")),
    *((name, (4, 57), "windows are on every nth layer") for name in ("cohere2-options", "gemma2-options", "gemma3")),
]
# Options of a config that an export writes itself.
OWN = {"transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype", "auto_map", "custom_pipelines"}
OWN |= {"value_head_prefix", "_attn_implementation_autoset"}


def limit(name: str) -> str:
    """The reason why this version cannot read an export; empty if it must."""
    return next((why for case, since, why in LIMITS if case == name and since > VERSION), "")


def difference(folder: Path) -> float:
    """The largest difference between the outputs of transformers and ours. Raises for tensors that do not fit."""
    expected = np.load(folder / "expected.npz")
    reward = "ForSequence" in AutoConfig.from_pretrained(folder).architectures[0]
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    problems = {kind: found for kind, found in info.items() if found}
    if problems:
        raise ValueError(f"tensors do not fit: {problems}")
    with torch.no_grad():
        ids = torch.tensor(expected["ids"])
        theirs = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return float(np.abs(theirs.float().numpy() - expected["outputs"]).max())


def verdict(folder: Path) -> tuple[str, bool]:
    """What this version makes of an export, and whether that is as it should be."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    if model_type not in CONFIG_MAPPING:
        return f"{model_type} came later", True
    why = limit(folder.name)
    try:
        found = difference(folder)
    except Exception as error:  # old versions refuse in many ways, and the table shows each
        return f"refused: {' '.join(str(error).split())[:120]}{f' ({why})' if why else ''}", bool(why)
    equal = found < TOLERANCE
    if equal:
        return f"equal ({found:.0e})", not why
    return f"DIFFERS by {found:.2g}{f' ({why})' if why else ''}", bool(why)


def check_config(name: str, original: dict, exported: dict) -> bool:
    """Whether this version reads a published config and our export of it alike; it prints what differs.

    Options that only the export has are its other spelling of the same.
    """
    if original["model_type"] not in CONFIG_MAPPING:
        return True
    kind = CONFIG_MAPPING[original["model_type"]]
    try:
        theirs = kind.from_dict(json.loads(json.dumps(original))).to_dict()
    except ValueError as error:
        print(f"  {name}: this version refuses the published config as well: {error}")
        return True
    ours = kind.from_dict(json.loads(json.dumps(exported))).to_dict()
    if theirs.get("head_dim", 0) is None:  # an export spells it out
        theirs["head_dim"] = theirs["hidden_size"] // theirs["num_attention_heads"]
    if original["model_type"] == "gemma":  # its `gelu` means the approximation, which some versions do not know
        theirs["hidden_act"] = exported["hidden_act"]
    if original["model_type"] == "olmo3" and "rope_theta" in theirs:  # its default has changed since
        theirs["rope_theta"] = exported["rope_theta"]
    different = {key: (theirs[key], ours.get(key)) for key in theirs.keys() - OWN if theirs[key] != ours.get(key)}
    if different:
        print(f"  {name}: FAILED, published and exported values differ: {different}")
    return not different


def check_tokenizer(folder: Path, facts: dict) -> None:
    """Asserts that the tokenizer encodes, decodes and renders as the one that was saved."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(facts["texts"])
    assert encoded["input_ids"] == facts["ids"]
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert [tokenizer.decode(row) for row in facts["ids"]] == facts["decoded"]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in facts["ids"]] == facts["special"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (
        facts["eos"],
        facts["pad"],
        facts["size"],
    )
    assert tokenizer.apply_chat_template(facts["messages"], tokenize=False) == facts["chat"]


def main(folder: Path) -> int:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    failed = 0
    facts = json.loads((folder / "tokenizer.expected.json").read_text())
    folders = sorted(path.parent for path in folder.glob("*/expected.npz"))
    for path in folders:
        text, good = verdict(path)
        failed += not good
        print(f"transformers {transformers.__version__:8} {path.name:24} {'' if good else 'FAILED '}{text}", flush=True)
    check_tokenizer(folders[0], facts)
    configs = json.loads((folder / "configs.json").read_text())
    same = sum(check_config(name, *pair) for name, pair in configs.items())
    print(
        f"transformers {transformers.__version__}: tokenizer equal; {len(folders) - failed} of {len(folders)} exports "
        f"as expected; {same} of {len(configs)} published configs read alike before and after"
    )
    failed += len(configs) - same
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
