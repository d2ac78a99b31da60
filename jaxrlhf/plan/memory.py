"""Bytes per device of the three programs of a PPO iteration, by item.

What a program is given is counted from the abstract trees and their shardings, exactly. What it makes on the way is
counted from the real programs too, where that can be: what a backward pass keeps is the set of residuals that
`jax.vjp` of the model names, the cache and the working copies have the shapes that the engine gives them. Only the
compiler's own scratch is a formula; its factors were fitted to compilers' reports (benchmarks/plan_grid.py).
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxrlhf.kernels import KV_CACHE_DTYPES, gathered_blocks, logprob_blocks
from jaxrlhf.models import (
    Decoder,
    cast_matrices,
    join,
    logical_axes,
    param_shapes,
    param_shardings,
    split_trainable,
    trained_head,
)
from jaxrlhf.plan.programs import (
    PROGRAMS,
    System,
    array_bytes,
    experience,
    local_shape,
    prompt_batch,
    rollout,
    tree_bytes,
)
from jaxrlhf.rl import actor_logprobs, critic_values
from jaxrlhf.sharding import GENERATE_RULES, REPLICATED_RULES, named_sharding, tree_shardings

PyTree = Any


@dataclass(frozen=True)
class ProgramMemory:
    """Bytes on one device while a program runs; items are disjoint and add up."""

    program: str
    arguments: dict[str, int]
    """What the program reads, on the device."""
    temporaries: dict[str, int]
    """What it makes on the way and gives back."""
    outputs: int
    """New arrays that it returns; what replaces a donated argument is not one."""
    resident: dict[str, int]
    """What lies on the device meanwhile, unread."""
    shared: int = 0
    """Of the arguments, what the program is handed twice; the device holds it once, the compiler counts it twice."""

    @property
    def program_bytes(self) -> int:
        return sum(self.arguments.values()) + sum(self.temporaries.values()) + self.outputs

    @property
    def compiler_bytes(self) -> int:
        """What the compiler reports: arguments + temporaries + outputs − aliased."""
        return self.program_bytes + self.shared

    @property
    def bytes_per_device(self) -> int:
        return self.program_bytes + sum(self.resident.values())


def local_module(module: Decoder, tensor: int) -> Decoder:
    """The model as one of `tensor` devices computes it: its share of heads and MLP."""
    c = module.config
    heads = c.num_heads // tensor
    shares = {"num_heads": heads, "num_kv_heads": math.gcd(heads, max(1, c.num_kv_heads // tensor))}
    return module.clone(config=c.replace(intermediate_size=c.intermediate_size // tensor, **shares))


@lru_cache(maxsize=256)
def _residuals(module: Decoder, rows: int, length: int, longest: int) -> int:
    """Bytes that a training pass keeps for its backward pass, parameters and casts of them left out.

    Masks that are computed twice are kept once, as compilers do. What "auto" means on the planner's own device is not
    what it means on the planned one: that is taken to be plain XLA.
    """
    if module.attention_implementation == "auto":
        module = module.clone(attention_implementation="xla")
    params = param_shapes(module)
    trainable, frozen = split_trainable(params, module)
    frozen = jax.eval_shape(lambda tree: cast_matrices(tree, module.dtype), frozen)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((rows, length), bool)

    def kept(trainable: PyTree, frozen: PyTree, tokens: jax.Array, mask: jax.Array) -> Any:
        def forward(trainable: PyTree) -> PyTree:
            params = join(trainable, frozen)
            if module.head == "scalar":
                return critic_values(module, params, tokens, mask)
            return actor_logprobs(module, params, tokens, mask, 1.0, mask, longest)[0]

        return jax.vjp(forward, trainable)[1]

    parameter_shapes = {x.shape for x in jax.tree.leaves(params)} | {x.shape[1:] for x in jax.tree.leaves(params)}
    counts = Counter((x.shape, x.dtype) for x in jax.tree.leaves(jax.eval_shape(kept, trainable, frozen, tokens, mask)))
    return sum(
        math.prod(shape) * dtype.itemsize * (1 if dtype == jnp.bool_ else count)
        for (shape, dtype), count in counts.items()
        if shape not in parameter_shapes
    )


def residual_bytes(module: Decoder, rows: int, length: int, longest: int, tensor: int) -> int:
    """Bytes kept for the backward pass on a device with `rows` rows, one of `tensor` that share heads and MLP."""
    return _residuals(local_module(module, tensor), rows, length, longest)


def score_bytes(module: Decoder, rows: int, queries: int, keys: int, tensor: int) -> int:
    """Bytes of one float32 array of attention scores `[B, H, T, S]` on a device: plain XLA attention holds several."""
    return 4 * rows * (module.config.num_heads // tensor) * queries * keys


def layer_weights(module: Decoder, tensor: int) -> int:
    """Bytes of one layer's weights in the compute dtype, gathered over fsdp."""
    leaves = flatten_dict(param_shapes(module.clone(lora=None))["layers"])
    size = sum(math.prod(x.shape[1:]) for x in leaves.values() if len(x.shape) > 2)
    return size * jnp.dtype(module.dtype).itemsize // tensor


def generation_view_bytes(system: System, platform: str = "") -> int:
    """Bytes of the weights as decoding reads them: cast, one array per layer, split for tensor parallelism."""
    module = system.modules["actor"].clone(lora=None)
    axes, shapes = (flatten_dict(f(module)) for f in (logical_axes, param_shapes))
    itemsize = jnp.dtype(module.dtype).itemsize
    total = 0
    for path, x in shapes.items():
        stacked = int(path[0] == "layers")
        shape = x.shape[stacked:]
        sharding = named_sharding(axes[path][stacked:], shape, system.generate_mesh, GENERATE_RULES)
        size = array_bytes(sharding.shard_shape(shape), itemsize if len(shape) > 1 else x.dtype.itemsize, platform)
        total += size * (x.shape[0] if stacked else 1)
    return total


def _half_way_bytes(system: System) -> int:
    """Bytes of the weights that flip in two moves (`jaxrlhf.sharding.flip`): cast, and half-way to generation.

    These are the kernels that storage splits along another dimension than generation does.
    """
    module = system.modules["actor"].clone(lora=None)
    axes, shapes = (flatten_dict(f(module)) for f in (logical_axes, param_shapes))
    stored = flatten_dict(param_shardings(module, system.mesh))
    itemsize = jnp.dtype(module.dtype).itemsize
    total = 0
    for path, x in shapes.items():
        share = stored[path].shard_shape(x.shape)
        rules = named_sharding(axes[path], x.shape, system.generate_mesh, GENERATE_RULES)
        read = rules.shard_shape(x.shape)
        nested = all(mine <= part for whole, part, mine in zip(x.shape, read, share, strict=True) if part < whole)
        total += 0 if nested or share == x.shape else 2 * math.prod(share) * itemsize
    return total


def _merged_adapters(system: System) -> int:
    """The float32 kernel that the merge of adapters holds at the flip: the largest one of a layer."""
    module = system.modules["actor"]
    shapes = flatten_dict(param_shapes(module), sep="/")
    kernels = [shapes[path.replace("lora_a", "kernel")].shape for path in shapes if path.endswith("/lora_a")]
    return max((4 * math.prod(shape[1:]) for shape in kernels), default=0) // system.generate_tensor


def cache_bytes(system: System, platform: str = "") -> int:
    """Bytes of the key/value cache of all layers, prompt and answer; on a TPU head_dim is padded to its lanes.

    Quantised caches (`kv_cache_dtype`) have a float32 scale per head and token.
    """
    module = system.modules["actor"]
    c, dtype = module.config, KV_CACHE_DTYPES[module.kv_cache_dtype]
    shape = (system.generate_rows, c.num_kv_heads, system.length, c.head_dim)
    sharding = named_sharding(("batch", "kv_heads", None, None), shape, system.generate_mesh, GENERATE_RULES)
    *rows, width = sharding.shard_shape(shape)
    lanes = -(-width // 128) * 128 if platform == "tpu" else width
    scales = 0 if dtype is None else 4
    return 2 * c.num_layers * math.prod(rows) * (lanes * jnp.dtype(dtype or module.dtype).itemsize + scales)


def _working_copy(system: System, name: str, params: PyTree, trained: bool = False) -> int:
    """Of `jaxrlhf.models.working_copy`: the parameters gathered over fsdp, at ZeRO stages 1 and 2."""
    module = system.modules[name]
    if module.zero_stage in (0, 3) or system.mesh.shape["fsdp"] == 1:
        return 0
    head = trained_head(module) if trained and module.lora is None else None
    shapes = jax.eval_shape(lambda tree: cast_matrices(tree, module.dtype, head), params)
    shardings = tree_shardings(logical_axes(module), shapes, system.mesh, REPLICATED_RULES)
    sizes = jax.tree.map(lambda x, s: array_bytes(s.shard_shape(x.shape), x.dtype.itemsize, ""), shapes, shardings)
    return sum(jax.tree.leaves(sizes))


def _gradients(system: System, name: str) -> int:
    """Float32 gradients of the trained leaves; whole on every device below ZeRO stage 2."""
    module = system.modules[name]
    axes = split_trainable(logical_axes(module), module)[0]
    trainable = system.trainable(name)
    rules = REPLICATED_RULES if module.zero_stage < 2 else None
    shardings = (
        jax.tree.map(lambda x: x.sharding, trainable)
        if rules is None
        else tree_shardings(axes, trainable, system.mesh, rules)
    )
    return sum(jax.tree.leaves(jax.tree.map(lambda x, s: 4 * math.prod(s.shard_shape(x.shape)), trainable, shardings)))


def _layout_copies(system: System) -> int:
    """Gradients of the actor's stacked kernels that the compiler holds in a second layout before the update.

    Those whose split dimension is not the last one: query, key and value, and the MLP's down projection.
    """
    module = system.modules["actor"]
    if module.lora is not None or module.zero_stage != 3 or system.mesh.shape["fsdp"] == 1:
        return 0
    layers = flatten_dict(system.trainable("actor")["layers"])
    turned = [x for path, x in layers.items() if path[-1] == "kernel" and path[-2] in ("query", "key", "value", "down")]
    return sum(4 * math.prod(local_shape(x)) for x in turned)


def _head_scratch(system: System, name: str, rows: int, backward: bool) -> dict[str, int]:
    """Of token log-probs: a block of logits and what is made of it, and that of the head where it comes over fsdp."""
    module = system.modules[name]
    c, tokens = module.config, rows * min(system.length, system.config.sampling.max_new_tokens)
    vocab = c.padded_vocab_size // system.tensor
    gathered = module.zero_stage == 3 and system.mesh.shape["fsdp"] > 1
    blocks = (gathered_blocks if gathered else logprob_blocks)(tokens, vocab)
    held = jnp.dtype(module.dtype).itemsize + (4 if backward else 0)
    return {
        "logits": 3 * 4 * blocks.tokens * blocks.vocab,
        "gathered block of the head": held * blocks.vocab * c.embedding_size if gathered else 0,
    }


@dataclass(frozen=True)
class Scratch:
    """A compiler's factors, fitted to what it reports."""

    forward_layers: int
    """Layers whose gathered weights are on the device at once, in a forward pass alone."""
    backward_layers: int
    """The same in training."""
    layout_copies: bool
    """Whether gradients of some stacked kernels are held in a second layout."""
    brings_all: bool
    """Whether an update brings all moments from the host at once, instead of one array after the other."""
    hoisted_casts: bool
    """Whether a forward pass alone casts all layers' weights, where it gathers them, before the first one."""


SCRATCH = {"tpu": Scratch(2, 5, False, True, False)}
GPU_SCRATCH = Scratch(1, 1, True, False, True)


def scratch_of(platform: str) -> Scratch:
    return SCRATCH.get(platform, GPU_SCRATCH)


def _pass_scratch(system: System, name: str, rows: int, backward: bool, platform: str) -> dict[str, int]:
    """What one layer's arithmetic needs besides what is kept, or the head's where that is more."""
    module = system.modules[name]
    scores = score_bytes(module, rows, system.length, system.length, system.tensor)
    itemsize = jnp.dtype(module.dtype).itemsize
    held = (3 if backward else 1) + itemsize / 8
    gathered = module.zero_stage == 3 and system.mesh.shape["fsdp"] > 1
    factors = scratch_of(platform)
    layers = factors.backward_layers if backward else factors.forward_layers
    layer = {
        "attention scores": int(held * scores),
        "gathered layer weights": layers * layer_weights(module, system.tensor) if gathered else 0,
    }
    head = _head_scratch(system, name, rows, backward) if module.head == "lm" else {}
    return _largest(layer, head)


def _micro_rows(system: System) -> int:
    parts = system.config.algorithm.num_mini_batches * system.config.run.gradient_accumulation_steps
    return max(1, system.rows // parts // system.batch_devices)


def _on_device(system: System, platform: str, names: tuple[str, ...]) -> dict[str, int]:
    return {
        name: tree_bytes(system.trees[name], platform)
        for name in names
        if name in system.trees and name not in system.on_host
    }


def _largest(*phases: dict[str, int]) -> dict[str, int]:
    return max(phases, key=lambda items: sum(items.values()))


def _brought(tree: PyTree, platform: str) -> int:
    """Bytes of a tree from host memory that are on the device at once."""
    if scratch_of(platform).brings_all:
        return tree_bytes(tree, platform)
    return 2 * max(tree_bytes(x, platform) for x in jax.tree.leaves(tree))


def train_memory(system: System, platform: str) -> ProgramMemory:
    """Of `ppo_step`, while the actor's or the critic's backward pass runs, whichever needs more."""
    rows, config = _micro_rows(system), system.config
    names = ("actor", "actor_optimizer", "critic", "critic_optimizer", "ema")
    arguments = _on_device(system, platform, names) | {"batch": tree_bytes(experience(system), platform)}
    names_trained = ("actor", "critic")
    shape = rows, system.length, config.sampling.max_new_tokens
    kept = [residual_bytes(system.modules[name], *shape, system.tensor) for name in names_trained]
    # Both forward passes come before the backward passes, unless these run in a loop that recomputes.
    both = config.run.remat == "none"
    passes = [_pass_scratch(system, name, rows, True, platform) for name in names_trained]
    loops = config.run.gradient_accumulation_steps > 1
    gradients = sum(_gradients(system, name) for name in names_trained)
    backward = {
        "gradient layout copies": 0 if loops or not scratch_of(platform).layout_copies else _layout_copies(system),
        "working copies": max(_working_copy(system, name, system.trees[name], True) for name in names_trained),
        "activations": sum(kept) if both else max(kept),
        **_largest(*passes),
    }
    brought = {
        f"{name} on the device": _brought(system.trees[name], platform) for name in names if name in system.on_host
    }
    # Moments that come one after the other come when the backward pass has given its room back.
    phase = backward | brought if scratch_of(platform).brings_all else _largest(backward, brought)
    gradients = {"gradients": gradients * (2 if loops else 1)}
    return _program(system, platform, "train", arguments, gradients | phase, 0)


def score_memory(system: System, platform: str) -> ProgramMemory:
    """Of `score_rollout`: four models' forward passes, one after the other."""
    rows = _micro_rows(system)
    names = ("actor", "critic", "reference", "reward")
    arguments = _on_device(system, platform, names) | {"batch": tree_bytes(rollout(system, system.rows), platform)}
    phases = []
    for name in names:
        module = system.modules[name]
        tree = system.trees.get(name)
        scratch = _pass_scratch(system, name, rows, False, platform)
        if tree is not None:
            gathered = module.zero_stage == 3 and system.mesh.shape["fsdp"] > 1
            casts = _cast(tree, module) if gathered and scratch_of(platform).hoisted_casts else 0
            scratch["working copies"] = _working_copy(system, name, tree) or casts
        if name in system.on_host:
            scratch[f"{name} on the device"] = tree_bytes(tree, platform)
        phases.append(scratch)
    read = sum(tree_bytes(system.read_params(name), platform) for name in ("reference", "reward"))
    own = sum(tree_bytes(system.trees.get(name, {}), platform) for name in ("reference", "reward"))
    outputs = tree_bytes(experience(system), platform)
    return _program(system, platform, "score", arguments, _largest(*phases), outputs, read - own)


def _cast(tree: PyTree, module: Decoder) -> int:
    """Bytes of a tree's matrices in the compute dtype, where they are held in another."""
    cast = jax.eval_shape(lambda t: cast_matrices(t, module.dtype), tree)
    changed = jax.tree.map(
        lambda old, new: math.prod(local_shape(old)) * new.dtype.itemsize if old.dtype != new.dtype else 0, tree, cast
    )
    return sum(jax.tree.leaves(changed))


def generate_memory(system: System, platform: str) -> ProgramMemory:
    """Of `generate`: at the flip, during the prefill, or at the end of decoding, whichever needs most."""
    module, config = system.modules["actor"], system.config
    c, tensor = module.config, system.generate_tensor
    itemsize = jnp.dtype(module.dtype).itemsize
    rows = max(1, system.generate_rows * tensor // system.generate_mesh.size)
    prompt = config.data.max_prompt_seq_len
    tokens = rows * prompt
    hidden = tokens * c.hidden_size * (4 + 3 * itemsize)
    mlp = tokens * c.intermediate_size // tensor * 2 * itemsize
    scores = int(score_bytes(module, rows, prompt, prompt, tensor) * (1 + itemsize / 4))
    prompt_cache = cache_bytes(system) * prompt // system.length
    # Query, key and value of a prompt are one array, which stays until the cache is filled.
    queries = 0 if platform == "tpu" else prompt_cache * c.num_heads // (2 * c.num_kv_heads)
    prefill = {"KV cache": prompt_cache, "queries": queries, "prefill activations": hidden + mlp + scores}
    logits = 4 * rows * c.padded_vocab_size // tensor
    attend = 2 * score_bytes(module, rows, 1, system.length, tensor)
    decode = {"KV cache": cache_bytes(system, platform), "logits": 2 * logits + attend}
    if platform == "tpu":  # the prompt's keys and values are laid out anew for decoding
        decode["KV cache of the prompt"] = prompt_cache
    flip = {"merged adapters": _merged_adapters(system), "weights on the move": _half_way_bytes(system)}
    view = {"generation weights": generation_view_bytes(system, platform)}
    arguments = _on_device(system, platform, ("actor",)) | {"batch": tree_bytes(prompt_batch(system), platform)}
    outputs = tree_bytes(rollout(system, system.generate_rows), platform)
    return _program(system, platform, "generate", arguments, view | _largest(flip, prefill, decode), outputs)


def _program(
    system: System,
    platform: str,
    program: str,
    arguments: dict[str, int],
    temporaries: dict[str, int],
    outputs: int,
    shared: int = 0,
) -> ProgramMemory:
    waiting = tuple(name for name in system.trees if name not in arguments)
    kept = {name: size for name, size in temporaries.items() if size}
    return ProgramMemory(program, arguments, kept, outputs, _on_device(system, platform, waiting), shared)


def estimate(system: System, platform: str) -> dict[str, ProgramMemory]:
    """Memory of each of PROGRAMS on one device; `platform` pads arrays as its compiler does."""
    parts = (generate_memory, score_memory, train_memory)
    return {name: part(system, platform) for name, part in zip(PROGRAMS, parts, strict=True)}


def host_bytes(system: System) -> int:
    """Bytes of host memory that one device's offloaded arrays take."""
    return sum(tree_bytes(system.trees[name]) for name in system.on_host)
