"""Bytes per device of the programs of a training step, by item: three of PPO, fewer of supervised trainers.

Arguments are counted from the abstract trees and their shardings, exactly. Temporaries are counted from the real
programs where that is possible: a backward pass keeps the residuals that `jax.vjp` of the model names, and the cache
and the working copies have the shapes that the engine gives them. Only the compiler's own scratch is a formula; its
factors were fitted to compilers' reports (benchmarks/plan_grid.py).
"""

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from jaxrlhf.kernels import gathered_blocks, logprob_blocks
from jaxrlhf.models import (
    Decoder,
    cast_matrices,
    join,
    logical_axes,
    param_shapes,
    param_shardings,
    reads_stored,
    split_trainable,
    trained_head,
)
from jaxrlhf.plan.programs import (
    System,
    array_bytes,
    experience,
    labelled_batch,
    local_shape,
    prompt_batch,
    rollout,
    train_batch,
    tree_bytes,
)
from jaxrlhf.plan.roofline import cached_vector_bytes, expert_elements, flat_shapes, itemsize
from jaxrlhf.rl import actor_logprobs, critic_values
from jaxrlhf.sharding import GENERATE_RULES, REPLICATED_RULES, named_sharding, tree_shardings
from jaxrlhf.trainers.supervised import has_dropout

PyTree = Any


@dataclass(frozen=True)
class ProgramMemory:
    """Bytes on one device while a program runs; items are disjoint and add up."""

    program: str
    arguments: dict[str, int]
    """Arrays on the device that the program reads."""
    temporaries: dict[str, int]
    """Arrays that it makes and frees."""
    outputs: int
    """New arrays that it returns; an array in place of a donated argument is not new."""
    resident: dict[str, int]
    """Arrays that lie on the device meanwhile, unread."""
    shared: int = 0
    """Bytes of arguments that the program gets twice, less those of an argument that it does not read. The device holds
    them once, the compiler counts what the program gets."""

    @property
    def program_bytes(self) -> int:
        """Arguments, temporaries and outputs."""
        return sum(self.arguments.values()) + sum(self.temporaries.values()) + self.outputs

    @property
    def compiler_bytes(self) -> int:
        """The compiler's count: arguments + temporaries + outputs − aliased."""
        return self.program_bytes + self.shared

    @property
    def bytes_per_device(self) -> int:
        """Everything on the device while the program runs."""
        return self.program_bytes + sum(self.resident.values())


def local_module(module: Decoder, tensor: int) -> Decoder:
    """The model as one of `tensor` devices computes it: its share of heads and MLP."""
    c = module.config
    heads = c.num_heads // tensor
    shares = {"num_heads": heads, "num_kv_heads": math.gcd(heads, max(1, c.num_kv_heads // tensor))}
    shares |= {name: getattr(c, name) // tensor for name in ("intermediate_size", "expert_intermediate_size")}
    return module.clone(config=c.replace(**shares))


@lru_cache(maxsize=256)
def _residuals(module: Decoder, rows: int, length: int, longest: int | None, drops: bool = False) -> int:
    """Bytes that a training pass keeps for its backward pass, without parameters and casts of them.

    Masks that are computed twice are kept once, as compilers do. `longest`: columns that the head runs on; None: all.
    `drops`: with the masks of dropout.
    """
    params = param_shapes(module)
    trainable, frozen = split_trainable(params, module)
    frozen = jax.eval_shape(lambda tree: cast_matrices(tree, module.dtype), frozen)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((rows, length), bool)

    def kept(trainable: PyTree, frozen: PyTree, tokens: jax.Array, mask: jax.Array) -> PyTree:
        def forward(trainable: PyTree) -> PyTree:
            params = join(trainable, frozen)
            if drops:
                method, rngs = "logprobs" if module.head == "lm" else None, {"dropout": jax.random.key(0)}
                call = {"contiguous": True, "rngs": rngs, "method": method}
                return cast(Any, module.apply({"params": params}, tokens, mask, **call))
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


def residual_bytes(
    module: Decoder,
    rows: int,
    length: int,
    longest: int | None,
    tensor: int,
    expert: int = 1,
    drops: bool = False,
    blocks: bool = False,
) -> int:
    """Bytes kept for the backward pass on a device with `rows` rows, one of `tensor` that share heads and MLP.

    `blocks`: attention keeps its scores on the chip; all kernels of that kind keep the same arrays.

    Of `expert` devices that split the experts, each has room for all choices of all their tokens. (As many experts on
    one device, each with its own tokens, take as much where every expert computes every token.)
    """
    local = local_module(module, tensor).clone(attention_implementation="pallas" if blocks else "xla")
    kept = _residuals(cast(Any, local), rows, length, longest, drops)
    if expert > 1 and local.config.num_experts > 1 and local.expert_implementation == "ragged":
        few, more = (
            _residuals(cast(Any, local.clone(config=local.config.replace(experts_per_token=k))), rows, length, longest)
            for k in (1, 2)
        )
        kept += (expert - 1) * local.config.experts_per_token * (more - few)
    return kept


def score_bytes(module: Decoder, rows: int, queries: int, keys: int, tensor: int) -> int:
    """Bytes of one float32 array of attention scores `[B, H, T, S]` on a device: plain XLA attention holds several."""
    return 4 * rows * (module.config.num_heads // tensor) * queries * keys


def layer_weights(module: Decoder, tensor: int, expert: int = 1) -> int:
    """Bytes of one layer's weights in the compute dtype, gathered over all axes but `tensor`, experts but `expert`."""
    module = module.clone(lora=None)
    shapes = [x.shape[1:] for path, x in flat_shapes(module).items() if path[0] == "layers"]
    experts = expert_elements(module) // module.config.num_layers
    elements = sum(math.prod(shape) for shape in shapes if len(shape) > 1) - experts + experts // expert
    return elements * itemsize(module) // tensor


def mlp_width(module: Decoder, expert: int) -> int:
    """Hidden elements of the MLP per token of a device, before `tensor` splits them."""
    c = module.config
    if not c.num_experts:
        return c.intermediate_size
    if module.expert_implementation == "ragged":
        return expert * c.experts_per_token * (c.expert_size + c.hidden_size)
    return c.num_experts * c.expert_size


def _flat_axes(module: Decoder) -> dict[tuple[str, ...], tuple[str | None, ...]]:
    """Logical axes of the parameters by path."""
    return cast(Any, flatten_dict(logical_axes(module)))


def generation_view_bytes(system: System, platform: str = "", experts: float = 1.0) -> int:
    """Bytes of the weights as decoding reads them: cast, one array per layer, split for tensor parallelism.

    `experts`: the share of the experts that is counted.
    """
    module = system.modules["actor"].clone(lora=None)
    axes, total = _flat_axes(module), 0
    for path, x in flat_shapes(module).items():
        stacked = int(path[0] == "layers")
        shape = x.shape[stacked:]
        sharding = named_sharding(axes[path][stacked:], shape, system.generate_mesh, GENERATE_RULES)
        size = itemsize(module) if len(shape) > 1 else x.dtype.itemsize
        share = experts if "expert" in axes[path] else 1.0
        total += int(share * array_bytes(sharding.shard_shape(shape), size, platform)) * (x.shape[0] if stacked else 1)
    return total


def _half_way_bytes(system: System) -> int:
    """Bytes of the weights that move to generation in two steps: cast, and half-way there.

    These are the kernels that storage splits along another dimension than generation does.
    """
    module = system.modules["actor"].clone(lora=None)
    axes, total = _flat_axes(module), 0
    stored: dict[tuple[str, ...], NamedSharding] = cast(Any, flatten_dict(param_shardings(module, system.mesh)))
    for path, x in flat_shapes(module).items():
        share = stored[path].shard_shape(x.shape)
        read = named_sharding(axes[path], x.shape, system.generate_mesh, GENERATE_RULES).shard_shape(x.shape)
        nested = all(mine <= part for whole, part, mine in zip(x.shape, read, share, strict=True) if part < whole)
        total += 0 if nested or share == x.shape else 2 * math.prod(share) * itemsize(module)
    return total


def _merged_adapters(system: System) -> int:
    """Bytes of the float32 kernel that the merge of adapters holds before generation: the largest one of a layer."""
    shapes = flat_shapes(system.modules["actor"])
    kernels = [shapes[(*path[:-1], "kernel")].shape for path in shapes if path[-1] == "lora_a"]
    return max((4 * math.prod(shape[1:]) for shape in kernels), default=0) // system.generate_tensor


def cache_bytes(system: System, platform: str = "") -> int:
    """Bytes of the key/value cache of all layers, prompt and response; a TPU pads head_dim to its lanes."""
    module = system.modules["actor"]
    c = module.config
    shape = (system.generate_rows, c.num_kv_heads, system.length)
    sharding = named_sharding(("batch", "kv_heads", None), shape, system.generate_mesh, GENERATE_RULES)
    vectors = 2 * c.num_layers * math.prod(sharding.shard_shape(shape))
    return vectors * cached_vector_bytes(module, 128 if platform == "tpu" else 1)


def _gathers(system: System, name: str) -> bool:
    """True for a model whose layers are gathered over fsdp, expert and context one by one."""
    return system.modules[name].zero_stage == 3 and _stored_parts(system) > 1


def _stored_parts(system: System) -> int:
    """Devices that split the storage of parameters outside the experts, besides `tensor`."""
    return system.mesh.shape["fsdp"] * system.expert * system.context


def _sharded_bytes(shapes: PyTree, shardings: PyTree) -> int:
    """Bytes on one device of arrays of these shapes in these places."""
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))


def _working_copy(system: System, name: str, params: PyTree, trained: bool = False) -> int:
    """Bytes of `jaxrlhf.models.working_copy`: all parameters where stages 1 and 2 gather them, else what is cast."""
    module = system.modules[name]
    if reads_stored(module, system.mesh):
        return 0
    head = trained_head(module) if trained and module.lora is None else None
    if _casts_in_place(system, module):
        return _cast(params, module, head)
    shapes = jax.eval_shape(lambda tree: cast_matrices(tree, module.dtype, head), params)
    return _sharded_bytes(shapes, tree_shardings(logical_axes(module), shapes, system.mesh, REPLICATED_RULES))


def _casts_in_place(system: System, module: Decoder) -> bool:
    """True where the working copy lies as the parameters do."""
    return not reads_stored(module, system.mesh) and (module.zero_stage in (0, 3) or _stored_parts(system) == 1)


def _fresh_gradients(system: System, name: str) -> int:
    """Bytes of the gradients of one micro-batch: in the dtypes of a working copy that lies as the parameters do."""
    module = system.modules[name]
    if not _casts_in_place(system, module):
        return _gradients(system, name)
    trainable = system.trainable(name)
    head = trained_head(module) if module.lora is None else None
    cast = jax.eval_shape(lambda tree: cast_matrices(tree, module.dtype, head), trainable)
    return _sharded_bytes(cast, jax.tree.map(lambda x: x.sharding, trainable))


def _gradients(system: System, name: str) -> int:
    """Bytes of the trained leaves' float32 gradients; whole on every device below ZeRO stage 2."""
    module, trainable = system.modules[name], system.trainable(name)
    shardings = jax.tree.map(lambda x: x.sharding, trainable)
    if module.zero_stage < 2:
        axes, _ = split_trainable(logical_axes(module), module)
        shardings = tree_shardings(axes, trainable, system.mesh, REPLICATED_RULES)
    return _sharded_bytes(trainable, shardings)


def _layout_copies(system: System) -> int:
    """Bytes of the actor's gradients that the compiler holds in a second layout before the update.

    Those are stacked kernels whose split dimension is not the last one: query, key and value, and the MLP's down
    projection.
    """
    module = system.modules["actor"]
    if module.lora is not None or not _gathers(system, "actor"):
        return 0
    stacked: dict[tuple[str, ...], jax.ShapeDtypeStruct] = cast(Any, flatten_dict(system.trees["actor"]["layers"]))
    turned = [
        x for path, x in stacked.items() if path[-1] == "kernel" and path[-2] in ("query", "key", "value", "down")
    ]
    return sum(4 * math.prod(local_shape(x)) for x in turned)


def _head_scratch(system: System, name: str, rows: int, backward: bool, platform: str) -> dict[str, int]:
    """Blocks of token log-probs: of the logits and what is made of them, and of the head where it is gathered."""
    module = system.modules[name]
    c, tokens = module.config, rows * min(system.length, system.headed) // system.context
    vocab, gathered = c.padded_vocab_size // system.tensor, _gathers(system, name)
    blocks = gathered_blocks(tokens, vocab) if gathered else logprob_blocks(tokens, vocab, platform)
    held = itemsize(module) + (4 if backward else 0)
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
    """Gradients of some stacked kernels are held in a second layout."""
    brings_all: bool
    """An update brings all moments from the host at once, instead of one array after the other."""
    hoisted_casts: bool
    """A forward pass alone casts all layers' weights before the first layer, where it gathers them."""


TPU_SCRATCH = Scratch(2, 5, False, True, False)
GPU_SCRATCH = Scratch(1, 1, True, False, True)


def scratch_of(platform: str) -> Scratch:
    """The factors of a platform's compiler."""
    return TPU_SCRATCH if platform == "tpu" else GPU_SCRATCH


def _pass_scratch(system: System, name: str, rows: int, backward: bool, platform: str) -> dict[str, int]:
    """Scratch of one layer's arithmetic besides the residuals, or of the head where that is more."""
    module = system.modules[name]
    scores = score_bytes(module, rows, system.length, system.length, system.tensor) // system.context
    scores = 0 if system.attends_in_blocks(name) else scores
    factors = scratch_of(platform)
    layers = factors.backward_layers if backward else factors.forward_layers
    layer = {
        "attention scores": int(((3 if backward else 1) + itemsize(module) / 8) * scores),
        "gathered layer weights": layers * layer_weights(module, system.tensor, system.expert)
        if _gathers(system, name)
        else 0,
    }
    head = _head_scratch(system, name, rows, backward, platform) if module.head == "lm" else {}
    return _largest(layer, head)


def _micro_rows(system: System) -> int:
    """Sequences of a micro-batch on one device."""
    parts = system.config.algorithm.num_mini_batches * system.config.run.gradient_accumulation_steps
    return max(1, system.rows // parts // system.batch_devices) * system.sequences


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
    """Memory of the update, while the actor's or the critic's backward pass runs, whichever needs more."""
    trained = system.trained
    rows, config, factors = _micro_rows(system), system.config, scratch_of(platform)
    names = ("actor", "actor_optimizer", "critic", "critic_optimizer", "ema")
    arguments = _on_device(system, platform, names) | {"batch": tree_bytes(train_batch(system), platform)}
    shape = rows, system.length, None if system.supervised else system.headed
    kept = []
    for name in trained:
        module = system.modules[name]
        drops = system.trainer in ("sft", "reward") and has_dropout(module)
        blocks = system.attends_in_blocks(name)
        kept.append(residual_bytes(module, *shape, system.tensor, system.expert, drops, blocks) // system.context)
    loops = config.run.gradient_accumulation_steps > 1
    backward = {
        "gradient layout copies": _layout_copies(system) if factors.layout_copies and not loops else 0,
        "working copies": max(_working_copy(system, name, system.trees[name], True) for name in trained),
        # Both forward passes come before the backward passes, unless these run in a loop that recomputes.
        "activations": sum(kept) if config.run.remat == "none" else max(kept),
        **_largest(*(_pass_scratch(system, name, rows, True, platform) for name in trained)),
    }
    brought = {
        f"{name} on the device": _brought(system.trees[name], platform) for name in names if name in system.on_host
    }
    # Moments that come one after the other come when the backward pass has given its room back.
    phase = backward | brought if factors.brings_all else _largest(backward, brought)
    gradients = {"gradients": sum(_fresh_gradients(system, name) for name in trained)}
    if loops:
        gradients["gradients"] += sum(_gradients(system, name) for name in trained)
    return _program(system, platform, ProgramMemory("train", arguments, gradients | phase, 0, {}))


def score_memory(system: System, platform: str) -> ProgramMemory:
    """Memory of `score_rollout`: the models' forward passes, one after the other; of DPO the reference's."""
    if system.supervised:
        return _reference_memory(system, platform)
    rows = system.config.score_rows
    arguments = _on_device(system, platform, system.scoring) | {
        "batch": tree_bytes(rollout(system, system.rows), platform)
    }
    phases = []
    for name in system.scoring:
        module, tree = system.modules[name], system.trees.get(name)
        scratch = _pass_scratch(system, name, rows, False, platform)
        if tree is not None:
            casts = _cast(tree, module) if _gathers(system, name) and scratch_of(platform).hoisted_casts else 0
            scratch["working copies"] = _working_copy(system, name, tree) or casts
        if name in system.on_host:
            scratch[f"{name} on the device"] = tree_bytes(tree, platform)
        phases.append(scratch)
    # Parameters that the reference and the reward model share with the trained models.
    shared = sum(
        tree_bytes(system.read_params(name), platform) - tree_bytes(system.trees.get(name, {}), platform)
        for name in ("reference", "reward")
        if name in system.modules
    )
    outputs = tree_bytes(experience(system), platform)
    return _program(system, platform, ProgramMemory("score", arguments, _largest(*phases), outputs, {}, shared))


def _reference_memory(system: System, platform: str) -> ProgramMemory:
    """Memory of `reference_logprobs`. With adapters it reads the frozen base of the model that is trained."""
    module, params, batch = system.modules["reference"], system.read_params("reference"), labelled_batch(system)
    scratch = _pass_scratch(system, "reference", _micro_rows(system), False, platform)
    casts = _cast(params, module) if _gathers(system, "reference") and scratch_of(platform).hoisted_casts else 0
    scratch["working copies"] = _working_copy(system, "reference", params) or casts
    held = "reference" if "reference" in system.trees else "actor"
    arguments = _on_device(system, platform, (held,)) | {"batch": tree_bytes(batch, platform)}
    unread = tree_bytes(system.trees[held], platform) - tree_bytes(params, platform)  # the adapters
    outputs = 8 * system.rows // system.batch_devices
    return _program(system, platform, ProgramMemory("score", arguments, scratch, outputs, {}, -unread))


def _cast(tree: PyTree, module: Decoder, but: str | None = None) -> int:
    """Bytes of a tree's matrices in the compute dtype, where they are held in another, except the leaf named `but`."""
    new = jax.eval_shape(lambda t: cast_matrices(t, module.dtype, but), tree)
    changed = jax.tree.map(
        lambda x, y: math.prod(local_shape(x)) * y.dtype.itemsize if x.dtype != y.dtype else 0, tree, new
    )
    return sum(jax.tree.leaves(changed))


def generate_memory(system: System, platform: str) -> ProgramMemory:
    """Memory of `generate`: at the reshard, during the prefill, or at the end of decoding, whichever needs most."""
    module = system.modules["actor"]
    c, tensor, size = module.config, system.generate_tensor, itemsize(module)
    rows = max(1, system.generate_rows * tensor // system.generate_mesh.size)
    prompt = system.config.data.max_prompt_seq_len
    tokens = rows * prompt
    activations = (
        tokens * c.hidden_size * (4 + 3 * size) + tokens * mlp_width(module, system.expert) // tensor * 2 * size
    )
    if not system.attends_in_blocks("actor", "prefill_attention"):
        activations += int(score_bytes(module, rows, prompt, prompt, tensor) * (1 + size / 4))
    prompt_cache = cache_bytes(system) * prompt // system.length
    # Query, key and value of a prompt are one array, which stays until the cache is filled.
    queries = 0 if platform == "tpu" else prompt_cache * c.num_heads // (2 * c.num_kv_heads)
    prefill = {"KV cache": prompt_cache, "queries": queries, "prefill activations": activations}
    logits = 4 * rows * c.padded_vocab_size // tensor
    blocks = system.attends_in_blocks("actor", "decode_attention")
    attend = 0 if blocks else 2 * score_bytes(module, rows, 1, system.length, tensor)
    decode = {"KV cache": cache_bytes(system, platform), "logits": 2 * logits + attend}
    if platform == "tpu":  # the prompt's keys and values are laid out anew for decoding
        decode["KV cache of the prompt"] = prompt_cache
    reshard = {"merged adapters": _merged_adapters(system), "weights on the move": _half_way_bytes(system)}
    view = {"generation weights": generation_view_bytes(system, platform)}
    arguments = _on_device(system, platform, ("actor",)) | {"batch": tree_bytes(prompt_batch(system), platform)}
    outputs = tree_bytes(rollout(system, system.generate_rows), platform)
    temporaries = view | _largest(reshard, prefill, decode)
    return _program(system, platform, ProgramMemory("generate", arguments, temporaries, outputs, {}))


def _program(system: System, platform: str, program: ProgramMemory) -> ProgramMemory:
    """The program without empty items, and with everything else that lies on the device."""
    unread = tuple(name for name in system.trees if name not in program.arguments)
    made = {name: size for name, size in program.temporaries.items() if size}
    return dataclasses.replace(program, temporaries=made, resident=_on_device(system, platform, unread))


PROGRAM_MEMORY = {"generate": generate_memory, "score": score_memory, "train": train_memory}


def estimate(system: System, platform: str) -> dict[str, ProgramMemory]:
    """Memory of each program of the run on one device; `platform` pads arrays as its compiler does."""
    return {name: PROGRAM_MEMORY[name](system, platform) for name in system.programs}


def host_bytes(system: System) -> int:
    """Bytes of host memory that one device's offloaded arrays take."""
    return sum(tree_bytes(system.trees[name]) for name in system.on_host)
