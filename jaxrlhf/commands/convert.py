"""Conversion between Hugging Face folders and checkpoints, with a check that nothing was lost."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config import PathName, Settings, alias
from jaxrlhf.config.remote import is_url
from jaxrlhf.config.secrets import redacted
from jaxrlhf.data import Tokenizer, read_tokenizer
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    Decoder,
    LoRAConfig,
    Model,
    config_from_dict,
    for_transformers,
    join,
    load_adapter,
    load_pretrained,
    merged,
    param_shapes,
    param_shardings,
    save_pretrained,
    split_trainable,
    stored_head,
)
from jaxrlhf.models.hf.checkpoint_files import find_model_folder
from jaxrlhf.runs.checkpoints import latest_checkpoint, read_metadata, restore_checkpoint
from jaxrlhf.runs.mirror import copied_to, fetch_checkpoint
from jaxrlhf.runs.saving import save_checkpoint
from jaxrlhf.trainers.lora import describe_model
from jaxrlhf.trainers.settings import DTYPES, MeshConfig
from jaxrlhf.trainers.tokenizers import TokenizerConfig, with_model_ends, with_special_tokens


@dataclass(frozen=True)
class ConvertConfig(Settings):
    """Conversion of a model."""

    HIDDEN = frozenset({"mesh_data", "mesh_expert", "mesh_context", "mesh_tensor", "dtype"})

    input: PathName[str]
    """Hugging Face folder (or hub name), run folder, or checkpoint-N folder."""
    output: PathName[str]
    """Folder to write: a Hugging Face folder, or one that gets checkpoint-0."""
    source: Annotated[Literal["hf", "orbax"], alias("from")] = "hf"
    """Format of the input."""
    target: Annotated[Literal["hf", "orbax"], alias("to")] = "orbax"
    """Format of the output."""
    head: Literal["auto", "lm", "scalar"] = "auto"
    """Head of a Hugging Face input."""
    adapter: PathName[str] = ""
    """PEFT LoRA folder to merge into a Hugging Face input."""
    params: str = ""
    """Parameters to take from a checkpoint, such as actor_params or ema_params; default: the first."""
    save_dtype: Annotated[Literal["float32", "bfloat16", "float16"], alias("dtype")] = "float32"
    """Precision of the written weights."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    mesh: MeshConfig = MeshConfig()
    verify: bool = False
    """Read the output back and compare every parameter."""

    def check(self) -> None:
        if self.source == "hf" and self.params:
            raise InputError(
                f"params={self.params!r} is for checkpoints (--from orbax); a Hugging Face folder has one model"
            )
        if self.source == "orbax" and (self.adapter or self.head != "auto"):
            name = "adapter" if self.adapter else "head"
            raise InputError(f"{name} is for Hugging Face folders; a checkpoint knows its own (merged on the way out)")
        if os.path.realpath(self.input) == os.path.realpath(self.output):
            raise InputError(f"output {self.output} is the input; name another folder")


def _read_hf(config: ConvertConfig, mesh: Mesh) -> Model:
    head = config.head
    if head == "auto":
        head = stored_head(config.input)
    model = load_pretrained(
        config.input,
        head=head,
        mesh=mesh,
        dtype=jnp.float32,
        param_dtype=DTYPES[config.save_dtype],
        new_head=False,
        progress=True,
    )
    return merged(load_adapter(model, config.adapter)) if config.adapter else model


def read_checkpoint_model(path: str | Path, params: str, mesh: Mesh) -> Model:
    """Reads one model out of a checkpoint, adapters merged.

    Args:
        path: a checkpoint-N folder, or a run folder (its newest checkpoint).
        params: place of the parameters in the state; "" means the first.
        mesh: where the parameters go.

    Raises:
        InputError: when there is no such checkpoint or model, or it does not fit.
    """
    folder = _checkpoint_folder(path)
    exports = read_metadata(folder).get("exports") or {}
    if not exports:
        raise InputError(f"{folder} does not say which models it holds; it was not written by jaxrlhf's trainers")
    name = params or next(iter(exports))
    if name not in exports:
        raise InputError(f"{folder} holds no parameters {name!r}; it has {', '.join(exports)}")
    info = exports[name]
    config = config_from_dict(info["config"], f"{folder}/metadata.json")
    config = config.replace(generation_config=info.get("generation_config", ""), **info.get("score", {}))
    lora = info.get("lora")
    lora = LoRAConfig(**lora | {k: tuple(v) for k, v in lora.items() if isinstance(v, list)}) if lora else None
    module = Decoder(config, head=info["head"], lora=lora)
    stored = jnp.dtype(info.get("dtype", "float32"))
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, stored, sharding=s),
        param_shapes(module),
        param_shardings(module, mesh),
    )
    if "frozen" in info:  # an average of adapters: the base lies with the model that was trained
        own, _ = restore_checkpoint(folder, split_trainable(like, module)[0], subtree=name)
        trained, _ = restore_checkpoint(folder, like, subtree=info["frozen"])
        restored = join(own, split_trainable(trained, module)[1])
    else:
        restored, _ = restore_checkpoint(folder, like, subtree=name)
    return merged(Model(module=module, params=restored, config=config))


def _checkpoint_folder(path: str | Path) -> Path:
    if is_url(path):
        return fetch_checkpoint(str(path))
    path = Path(path)
    folder = path if path.name.startswith("checkpoint-") else latest_checkpoint(path)
    if folder is None:
        raise InputError(f"{path} holds no checkpoint-N folder")
    return folder


def _load_tokenizer(config: ConvertConfig) -> Tokenizer | None:
    """The tokenizer for a Hugging Face output; None when it is neither named nor beside the input."""
    source = config.tokenizer.tokenizer_name_or_path
    if source is None:
        path = find_model_folder(config.input) if config.source == "hf" else Path(config.input)
        found = [f for f in (path, path.parent) if (f / "tokenizer_config.json").is_file()]
        source = str(found[0]) if found else None
    return None if source is None else read_tokenizer(source)


def _with_end_ids(model: Model, tokenizer: Tokenizer | None, ids: tuple[int | str, ...]) -> Model:
    if tokenizer is None:
        raise InputError("eos_token_ids: the input has no tokenizer; name one with tokenizer_name_or_path")
    return with_special_tokens(model, with_model_ends(tokenizer, None, ids))


def convert(config: ConvertConfig) -> None:
    """Converts, and with `verify` compares the output with the input."""
    if is_url(config.output):
        with copied_to(config.output) as folder:
            convert(replace(config, output=str(folder)))
        print(f"{folder} → {redacted(config.output)}")
        return
    mesh, dtype = config.mesh.make_mesh(), DTYPES[config.save_dtype]
    model = (
        _read_hf(config, mesh) if config.source == "hf" else read_checkpoint_model(config.input, config.params, mesh)
    )
    head, tokenizer = model.module.head, _load_tokenizer(config)
    if config.tokenizer.eos_token_ids:
        model = _with_end_ids(model, tokenizer, config.tokenizer.eos_token_ids)
    if config.target == "hf":
        model, tokenizer = for_transformers(model, tokenizer)
        save_pretrained(model, config.output, tokenizer, dtype=dtype)
    else:
        stored = jax.tree.map(lambda x: x.astype(dtype), model.params)
        info = describe_model(model, dtype=config.save_dtype)
        save_checkpoint(config.output, 0, {"params": stored}, {"identity": {}, "exports": {"params": info}})
    print(f"{config.input} → {config.output} ({config.target}, {config.save_dtype}, {head} head)")
    if config.verify:
        verify(model, config, mesh)


def verify(model: Model, config: ConvertConfig, mesh: Mesh) -> None:
    """Reads the output back. Raises InputError with the parameters that differ from the input, rounded to the dtype."""
    dtype = DTYPES[config.save_dtype]
    if config.target == "hf":
        options: dict[str, Any] = {"mesh": mesh, "param_dtype": dtype, "new_head": False}
        back = load_pretrained(config.output, head=model.module.head, **options)
    else:
        back = read_checkpoint_model(Path(config.output) / "checkpoint-0", "params", mesh)
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
