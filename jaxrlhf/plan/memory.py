"""Bytes per device of the programs of a training step, by item: three of PPO, fewer of supervised trainers.

Arguments are counted from the abstract trees and their shardings, exactly. Temporaries are counted from the real
programs where that is possible: the working copies (plan/copies.py) and the cache have the shapes that the engine gives
them, and activations are those of the model (plan/activations.py).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax

from jaxrlhf.plan.activations import (
    DROPPING,
    Pass,
    attends_in_blocks,
    largest,
    mlp_width,
    pass_scratch,
    residual_bytes,
    score_bytes,
    scratch_of,
)
from jaxrlhf.plan.copies import (
    cast_bytes,
    fresh_gradient_bytes,
    generation_view_bytes,
    gradient_bytes,
    half_way_bytes,
    layout_copy_bytes,
    merged_adapter_bytes,
    working_copy_bytes,
)
from jaxrlhf.plan.programs import experience, labelled_batch, prompt_batch, rollout, teacher_logprobs, train_batch
from jaxrlhf.plan.roofline import cached_vector_bytes, itemsize
from jaxrlhf.plan.system import System, tree_bytes
from jaxrlhf.sharding import GENERATE_RULES, named_sharding
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


def cache_bytes(system: System, platform: str = "") -> int:
    """Bytes of the key/value cache of all layers, prompt and response; a TPU pads head_dim to its lanes."""
    module = system.modules["actor"]
    c = module.config
    shape = (system.generate_rows, c.num_kv_heads, system.length)
    sharding = named_sharding(("batch", "kv_heads", None), shape, system.generate_mesh, GENERATE_RULES)
    vectors = 2 * c.num_layers * math.prod(sharding.shard_shape(shape))
    return vectors * cached_vector_bytes(module, 128 if platform == "tpu" else 1)


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
    over = Pass(
        rows,
        system.length,
        headed=None if system.supervised else system.headed,
        tensor=system.tensor,
        expert=system.expert,
    )
    kept = []
    for name in trained:
        module = system.modules[name]
        drops = system.trainer in DROPPING and has_dropout(module)
        own = dataclasses.replace(over, drops=drops, blocks=attends_in_blocks(system, name))
        kept.append(residual_bytes(module, own) // system.context)
    loops = config.run.gradient_accumulation_steps > 1
    backward = {
        "gradient layout copies": layout_copy_bytes(system) if factors.layout_copies and not loops else 0,
        "working copies": max(working_copy_bytes(system, name, system.trees[name], True) for name in trained),
        # Both forward passes come before the backward passes, unless these run in a loop that recomputes.
        "activations": sum(kept) if config.run.remat == "none" else max(kept),
        **largest(*(pass_scratch(system, name, rows, True, platform) for name in trained)),
    }
    brought = {
        f"{name} on the device": _brought(system.trees[name], platform) for name in names if name in system.on_host
    }
    # Moments that come one after the other come when the backward pass has given its room back.
    phase = backward | brought if factors.brings_all else largest(backward, brought)
    gradients = {"gradients": sum(fresh_gradient_bytes(system, name) for name in trained)}
    if loops:
        gradients["gradients"] += sum(gradient_bytes(system, name) for name in trained)
    return _program(system, platform, ProgramMemory("train", arguments, gradients | phase, 0, {}))


def score_memory(system: System, platform: str) -> ProgramMemory:
    """Memory of `score_rollout`: the models' forward passes, one after the other; of labelled rows the frozen one's."""
    if system.supervised:
        return _reference_memory(system, platform)
    rows = system.config.score_rows
    arguments = _on_device(system, platform, system.scoring) | {
        "batch": tree_bytes(rollout(system, system.rows), platform)
    }
    phases = []
    for name in system.scoring:
        module, tree = system.modules[name], system.trees.get(name)
        scratch = pass_scratch(system, name, rows, False, platform)
        if tree is not None:
            casts = cast_bytes(tree, module) if system.gathers(name) and scratch_of(platform).hoisted_casts else 0
            scratch["working copies"] = working_copy_bytes(system, name, tree) or casts
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
    return _program(system, platform, ProgramMemory("score", arguments, largest(*phases), outputs, {}, shared))


def _reference_memory(system: System, platform: str) -> ProgramMemory:
    """Memory of `reference_logprobs`. With adapters it reads the frozen base of the model that is trained."""
    module, params, batch = system.modules["reference"], system.read_params("reference"), labelled_batch(system)
    scratch = pass_scratch(system, "reference", _micro_rows(system), False, platform)
    casts = cast_bytes(params, module) if system.gathers("reference") and scratch_of(platform).hoisted_casts else 0
    scratch["working copies"] = working_copy_bytes(system, "reference", params) or casts
    held = "reference" if "reference" in system.trees else "actor"
    arguments = _on_device(system, platform, (held,)) | {"batch": tree_bytes(batch, platform)}
    unread = tree_bytes(system.trees[held], platform) - tree_bytes(params, platform)  # the adapters
    outputs = 8 * system.rows // system.batch_devices
    if system.trainer == "distill":
        outputs = tree_bytes(teacher_logprobs(system), platform)
    return _program(system, platform, ProgramMemory("score", arguments, scratch, outputs, {}, -unread))


def generate_memory(system: System, platform: str) -> ProgramMemory:
    """Memory of `generate`: at the reshard, during the prefill, or at the end of decoding, whichever needs most."""
    run, system = system, system.sampled_by(system.sampler)
    module = system.modules["actor"]
    c, tensor, size = module.config, system.generate_tensor, itemsize(module)
    rows = max(1, system.generate_rows * tensor // system.generate_mesh.size)
    prompt = system.config.data.max_prompt_seq_len
    tokens = rows * prompt
    activations = (
        tokens * c.hidden_size * (4 + 3 * size) + tokens * mlp_width(module, system.expert) // tensor * 2 * size
    )
    if not attends_in_blocks(system, "actor", "prefill_attention"):
        activations += int(score_bytes(module, rows, prompt, prompt, tensor) * (1 + size / 4))
    prompt_cache = cache_bytes(system) * prompt // system.length
    # Query, key and value of a prompt are one array, which stays until the cache is filled.
    queries = 0 if platform == "tpu" else prompt_cache * c.num_heads // (2 * c.num_kv_heads)
    prefill = {"KV cache": prompt_cache, "queries": queries, "prefill activations": activations}
    logits = 4 * rows * c.padded_vocab_size // tensor
    blocks = attends_in_blocks(system, "actor", "decode_attention")
    attend = 0 if blocks else 2 * score_bytes(module, rows, 1, system.length, tensor)
    decode = {"KV cache": cache_bytes(system, platform), "logits": 2 * logits + attend}
    if platform == "tpu":  # the prompt's keys and values are laid out anew for decoding
        decode["KV cache of the prompt"] = prompt_cache
    reshard = {"merged adapters": merged_adapter_bytes(system), "weights on the move": half_way_bytes(system)}
    view = {"generation weights": generation_view_bytes(system, platform)}
    arguments = _on_device(run, platform, (run.sampler,)) | {"batch": tree_bytes(prompt_batch(system), platform)}
    outputs = tree_bytes(rollout(system, system.generate_rows), platform)
    temporaries = view | largest(reshard, prefill, decode)
    return _program(run, platform, ProgramMemory("generate", arguments, temporaries, outputs, {}))


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
