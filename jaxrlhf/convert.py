"""Conversion between Hugging Face folders and checkpoints, with a check that nothing was lost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.checkpoints import latest_checkpoint, read_metadata, restore_checkpoint, save_checkpoint
from jaxrlhf.config import REQUIRED, field
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    Decoder,
    Model,
    config_from_dict,
    config_to_dict,
    load_pretrained,
    param_shapes,
    param_shardings,
    save_pretrained,
)
from jaxrlhf.sharding import make_mesh

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
FORMATS = ("hf", "orbax")


@dataclass(frozen=True)
class ConvertConfig:
    """Conversion of a model."""

    input: str = field(REQUIRED, "Hugging Face folder (or hub name), run folder, or checkpoint-N folder")
    output: str = field(REQUIRED, "folder to write: a Hugging Face folder, or one that gets checkpoint-0")
    source: str = field("hf", "format of the input", choices=FORMATS, aliases=("from",))
    target: str = field("orbax", "format of the output", choices=FORMATS, aliases=("to",))
    head: str = field("auto", "head of a Hugging Face input", choices=("auto", "lm", "scalar"))
    params: str = field("", "with a checkpoint as input: which parameters, such as actor_params or ema_params")
    dtype: str = field("float32", "precision of the written weights", choices=tuple(DTYPES))
    tokenizer_name_or_path: str | None = field(None, "tokenizer to copy into a Hugging Face output")
    mesh_fsdp: int = field(-1, "devices to spread the parameters over while converting; -1: all")
    verify: bool = field(False, "read the output back and compare every parameter")


def _read_hf(config: ConvertConfig, mesh: Any) -> Model:
    head = config.head
    if head == "auto":
        from jaxrlhf.models.checkpoint_files import find_model_folder, read_json

        names = read_json(find_model_folder(config.input) / "config.json").get("architectures") or [""]
        head = "scalar" if names[0].endswith("ForSequenceClassification") else "lm"
    return load_pretrained(
        config.input,
        head=head,
        mesh=mesh,
        dtype=jnp.float32,
        param_dtype=DTYPES[config.dtype],
        new_head=False,
        progress=True,
    )


def read_checkpoint_model(path: str | Path, params: str, mesh: Any) -> Model:
    """One model out of a checkpoint: `params` names its place in the state, "" means the only or the first one."""
    path = Path(path)
    folder = path if path.name.startswith("checkpoint-") else latest_checkpoint(path)
    if folder is None:
        raise InputError(f"{path} holds no checkpoint-N folder")
    exports = read_metadata(folder).get("exports") or {}
    name = params or next(iter(exports), "")
    if name not in exports:
        raise InputError(f"{folder} holds no parameters {name!r}; it has {sorted(exports)}")
    info = exports[name]
    config = config_from_dict(info["config"], f"{folder}/metadata.json")
    module = Decoder(config, head=info["head"])
    stored = jnp.dtype(info.get("dtype", "float32"))
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, stored, sharding=s),
        param_shapes(module),
        param_shardings(module, mesh),
    )
    restored, _ = restore_checkpoint(folder, like, subtree=name)
    return Model(module=module, params=restored, config=config)


def convert(config: ConvertConfig) -> None:
    """Convert, and with `verify` compare the output with what was read."""
    mesh = make_mesh(1, config.mesh_fsdp, 1)
    dtype = DTYPES[config.dtype]
    model = (
        _read_hf(config, mesh) if config.source == "hf" else read_checkpoint_model(config.input, config.params, mesh)
    )
    tokenizer = None
    if config.tokenizer_name_or_path:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)
    head = model.module.head
    if config.target == "hf":
        save_pretrained(model, config.output, tokenizer, dtype=dtype)
    else:
        stored = jax.tree.map(lambda x: x.astype(dtype), model.params)
        info = {"head": head, "config": config_to_dict(model.config, head), "dtype": config.dtype}
        save_checkpoint(config.output, 0, {"params": stored}, {"identity": {}, "exports": {"params": info}})
    print(f"{config.input} → {config.output} ({config.target}, {config.dtype}, {head} head)")
    if config.verify:
        verify(model, config, mesh)


def verify(model: Model, config: ConvertConfig, mesh: Any) -> None:
    """Read the output back; InputError lists the parameters that differ from the input rounded to the dtype."""
    dtype = DTYPES[config.dtype]
    if config.target == "hf":
        options = {"mesh": mesh, "param_dtype": dtype, "new_head": False}
        back = load_pretrained(config.output, head=model.module.head, **options)
    else:
        back = read_checkpoint_model(config.output, "params", mesh)
    differing = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(model.params), jax.tree.leaves(back.params), strict=True
        )
        if not np.array_equal(np.asarray(a.astype(dtype)), np.asarray(b))
    ]
    if differing:
        raise InputError(f"{config.output} differs from {config.input} in {', '.join(differing)}")
    print(f"verified: {len(jax.tree.leaves(back.params))} parameter arrays are equal")
