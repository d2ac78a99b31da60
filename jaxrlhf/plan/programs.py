"""The planned run without an array: modules, meshes and abstract trees as RLHFEngine makes them, and its programs.

Trees hold `jax.ShapeDtypeStruct` with shardings, so per-device sizes are exact, and the jitted programs can be lowered
for devices that are not there.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.engine import Rollout, SamplingConfig, generate
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    Decoder,
    DecoderConfig,
    LoRAConfig,
    base_leaves,
    cast_matrices,
    join,
    known_config,
    param_shapes,
    param_shardings,
    read_config,
    split_trainable,
)
from jaxrlhf.models.lora import resolve_targets
from jaxrlhf.plan.devices import Device
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.rl import Experience, PPOState, ppo_step, score_rollout
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.sharding import (
    GENERATE_RULES,
    TRAIN_RULES,
    Rules,
    batch_sharding,
    check_tensor_parallel,
    default_tensor_parallel,
    generate_mesh,
    make_mesh,
    optimizer_shardings,
    replicated,
)
from jaxrlhf.trainers.optimizer import make_optimizer
from jaxrlhf.trainers.settings import batch_devices, check_context

PyTree = Any
PROGRAMS = ("generate", "score", "train")


class AbsentDevice:
    """Stands in a mesh for a device that is not there; meshes are arranged by these names."""

    platform = "absent"
    device_kind = "absent"

    def __init__(self, number: int, per_host: int) -> None:
        self.id, self.process_index = number, number // per_host


def absent_devices(device: Device, count: int) -> list[AbsentDevice]:
    """`count` devices in hosts of `device.devices_per_host`; InputError when they do not fill the hosts."""
    if count % device.devices_per_host:
        raise InputError(
            f"devices={count} do not fill hosts of {device.devices_per_host}; give a multiple, or --devices_per_host"
        )
    return [AbsentDevice(i, device.devices_per_host) for i in range(count)]


def model_config(name: str) -> DecoderConfig:
    """Of a known model or a local folder: nothing is fetched. InputError names what there is."""
    if Path(name).is_dir():
        return read_config(name)
    try:
        return known_config(name)
    except InputError as error:
        raise InputError(f"{name!r} is no folder, and {error}") from error


@dataclass(frozen=True, eq=False)
class System:
    """What RLHFEngine holds, abstractly: the tree of each resident item, on one mesh."""

    config: PPOConfig
    mesh: Mesh
    generate_mesh: Mesh
    modules: dict[str, Decoder]
    """Of `actor`, `critic`, `reference` and `reward`."""
    trees: dict[str, PyTree]
    """`actor`, `critic`, `actor_optimizer`, `critic_optimizer`, and what of `reference`, `reward`, `ema` has arrays."""
    optimizers: dict[str, Any]
    on_host: frozenset[str]
    """The trees that lie in host memory between uses."""

    @property
    def batch_devices(self) -> int:
        return batch_devices(self.mesh)

    @property
    def rows(self) -> int:
        """Of a rollout batch, on all devices."""
        return self.config.rollout_rows(self.batch_devices)

    @property
    def generate_rows(self) -> int:
        """Of one call of the generate program, on all devices."""
        return self.rows // self.config.generation_batches

    @property
    def length(self) -> int:
        return self.config.max_prompt_seq_len + self.config.max_answer_seq_len

    @property
    def tensor(self) -> int:
        return self.mesh.shape["tensor"]

    @property
    def generate_tensor(self) -> int:
        return self.generate_mesh.shape["tensor"] * self.generate_mesh.shape["fsdp"]

    def trainable(self, name: str) -> PyTree:
        """The part of the actor's or critic's tree that is trained."""
        return split_trainable(self.trees[name], self.modules[name])[0]

    def read_params(self, name: str) -> PyTree:
        """The parameters of the reference or reward model, with the base it shares with the model that is trained."""
        trained = {"reference": "actor", "reward": "critic"}[name]
        own = self.trees.get(name, {})
        module = self.modules[trained]
        return own if module.lora is None else join(own, split_trainable(self.trees[trained], module)[1])


def _adapted(module: Decoder, rank: int, targets: tuple[str, ...], alpha: float) -> Decoder:
    if not rank:
        return module
    paths = tuple(f"^{path}$" for path in resolve_targets(module, targets))
    return module.clone(lora=LoRAConfig(rank, alpha, 0.0, paths))


def _placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def build_system(config: PlanConfig, devices: list | None = None) -> System:
    """The abstract run; `devices` are those of a compiler's topology, by default absent ones.

    Raises InputError for everything that RLHFEngine would refuse about models and mesh.
    """
    ppo = config.ppo
    mesh = make_mesh(
        ppo.mesh_data,
        ppo.mesh_fsdp,
        ppo.mesh_tensor,
        devices=absent_devices(config.accelerator, config.devices) if devices is None else devices,
    )
    shapes = {"actor": model_config(config.actor), "reward": model_config(config.reward)}
    longest = ppo.max_prompt_seq_len + ppo.max_answer_seq_len
    for name, shape in shapes.items():
        check_context(shape, longest, f"max_prompt_seq_len + max_answer_seq_len for {name}={getattr(config, name)}")
    if shapes["actor"].vocab_size != shapes["reward"].vocab_size:
        raise InputError(
            f"actor={config.actor} has a vocabulary of {shapes['actor'].vocab_size} tokens and reward={config.reward} "
            f"one of {shapes['reward'].vocab_size}; both must read the same tokens: choose models of one tokenizer"
        )
    dtype, stage = ppo.compute_dtype, ppo.zero_stage
    critic_stage = stage if ppo.critic_zero_stage is None else ppo.critic_zero_stage
    bodies = {
        "actor": Decoder(
            shapes["actor"],
            head="lm",
            dtype=dtype,
            remat=ppo.remat,
            zero_stage=stage,
            kv_cache_dtype=ppo.kv_cache_dtype,
        ),
        "critic": Decoder(shapes["reward"], head="scalar", dtype=dtype, remat=ppo.remat, zero_stage=critic_stage),
    }
    modules = {
        "actor": _adapted(bodies["actor"], ppo.lora_r, ppo.lora_target_modules, ppo.lora_alpha),
        "critic": _adapted(bodies["critic"], ppo.critic_lora_r, ppo.critic_lora_target_modules, ppo.lora_alpha),
    }
    trees: dict[str, PyTree] = {}
    optimizers = {}
    for name in ("actor", "critic"):
        module = modules[name]
        trainable, frozen = split_trainable(param_shapes(module), module)
        held = join(trainable, jax.eval_shape(lambda tree: cast_matrices(tree, dtype), frozen))
        trees[name] = _placed(held, param_shardings(module, mesh))
        trainable, _ = split_trainable(trees[name], module)
        optimizer = optimizers[name] = make_optimizer(ppo, 1, trainable)
        lies = jax.tree.map(lambda x: x.sharding, trainable)
        state = jax.eval_shape(optimizer.init, trainable)
        trees[f"{name}_optimizer"] = _placed(state, optimizer_shardings(optimizer, trainable, lies, mesh))
    on_host = {"actor_optimizer", "critic_optimizer"} if ppo.offload_optimizer else set()
    for name, trained, own_stage, offload in (
        ("reference", "actor", ppo.reference_zero_stage, ppo.offload_reference_model),
        ("reward", "critic", ppo.reward_zero_stage, ppo.offload_reward_model),
    ):
        module, base = modules[trained], bodies[trained]
        if module.lora is None:
            stage = base.zero_stage if own_stage is None else own_stage
            base = base.clone(zero_stage=3 if stage == 3 else 0)
            copied = trees[trained]
            lies = param_shardings(base, mesh)
        else:
            copied = base_leaves(split_trainable(trees[trained], module)[0])
            lies = jax.tree.map(lambda x: x.sharding, copied)
        modules[name] = base
        if jax.tree.leaves(copied):
            trees[name] = _placed(jax.eval_shape(lambda tree: cast_matrices(tree, dtype), copied), lies)
            on_host |= {name} if offload else set()
    if ppo.enable_ema:
        trees["ema"] = split_trainable(trees["actor"], modules["actor"])[0]
    heads = shapes["actor"].num_heads
    group = ppo.generate_tensor_parallel or default_tensor_parallel(mesh, heads)
    check_tensor_parallel(group, heads)
    ppo.check_pieces(ppo.rollout_rows(batch_devices(mesh)))
    return System(ppo, mesh, generate_mesh(mesh, group), modules, trees, optimizers, frozenset(on_host))


def local_shape(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return tuple(x.sharding.shard_shape(x.shape))


def array_bytes(shape: tuple[int, ...], itemsize: int, platform: str) -> int:
    """Device bytes of an array: its elements, on a TPU padded to tiles of 8 × 128 in the best of its layouts."""
    if platform != "tpu":
        return math.prod(shape) * itemsize
    if len(shape) < 2:
        return -(-math.prod(shape) * itemsize // 512) * 512
    rows_most = 8 * max(1, 4 // itemsize) if itemsize == 1 else 8
    best = None
    for i, rows in enumerate(shape):
        tile = min(rows_most, 1 << max(rows - 1, 0).bit_length())
        for j, lanes in enumerate(shape):
            if i != j:
                others = math.prod(n for k, n in enumerate(shape) if k not in (i, j))
                size = others * -(-rows // tile) * tile * -(-lanes // 128) * 128
                best = size if best is None else min(best, size)
    return best * itemsize


def tree_bytes(tree: PyTree, platform: str = "") -> int:
    """Bytes on one device of a tree of placed abstract arrays."""
    return sum(array_bytes(local_shape(x), x.dtype.itemsize, platform) for x in jax.tree.leaves(tree))


def _batch(system: System, shape: tuple[int, ...], dtype: Any, rules: Rules = TRAIN_RULES) -> jax.ShapeDtypeStruct:
    mesh = system.generate_mesh if rules is GENERATE_RULES else system.mesh
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, shape, rules))


def prompt_batch(system: System) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What the generate program reads beside the parameters: prompts, their mask, sample numbers."""
    shape = (system.generate_rows, system.config.max_prompt_seq_len)
    kinds = ((shape, jnp.int32), (shape, bool), (shape[:1], jnp.int32))
    return tuple(_batch(system, *kind, GENERATE_RULES) for kind in kinds)


def rollout(system: System, rows: int) -> Rollout:
    kinds = {"tokens": jnp.int32, "mask": bool, "response_mask": bool, "logprobs": jnp.float32}
    arrays = {name: _batch(system, (rows, system.length), kind, GENERATE_RULES) for name, kind in kinds.items()}
    return Rollout(**arrays, prompt_length=system.config.max_prompt_seq_len)


def experience(system: System) -> Experience:
    kinds = {"tokens": jnp.int32, "mask": bool, "response_mask": bool, "ended": bool}
    shapes = {"scores": (system.rows,), "ended": (system.rows,)}
    return Experience(
        **{
            f.name: _batch(
                system, shapes.get(f.name, (system.rows, system.length)), kinds.get(f.name, jnp.float32), TRAIN_RULES
            )
            for f in dataclasses.fields(Experience)
            if f.metadata.get("pytree_node", True)
        },
        longest=system.config.max_answer_seq_len,
    )


def _scalar(system: System, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype, sharding=replicated(system.mesh))


def ppo_state(system: System) -> PPOState:
    trees = {name: _where_it_waits(system, name) for name in system.trees}
    return PPOState(
        step=_scalar(system, jnp.int32),
        actor_params=trees["actor"],
        critic_params=trees["critic"],
        actor_opt_state=trees["actor_optimizer"],
        critic_opt_state=trees["critic_optimizer"],
        ema_params=trees.get("ema"),
        kl_coef=_scalar(system, jnp.float32),
        actor=system.modules["actor"],
        critic=system.modules["critic"],
        actor_optimizer=system.optimizers["actor"],
        critic_optimizer=system.optimizers["critic"],
        hyperparameters=system.config.hyperparameters(system.config.seed),
        mesh=system.mesh,
    )


def _where_it_waits(system: System, name: str) -> PyTree:
    tree = system.trees.get(name, {})
    if name not in system.on_host:
        return tree

    def move(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # counters stay on the device, as in `optimizer_shardings`
        kept = x.ndim == 0
        return (
            x if kept else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind("pinned_host"))
        )

    return jax.tree.map(move, tree)


READ_FROM_HOST = {"generate": (), "score": ("reference", "reward"), "train": ("actor_optimizer", "critic_optimizer")}


def offloaded_arguments(system: System, program: str) -> int:
    """Bytes per device that a program reads from host memory."""
    trees = (_where_it_waits(system, name) for name in READ_FROM_HOST[program] if name in system.on_host)
    return sum(tree_bytes([x for x in jax.tree.leaves(tree) if x.ndim]) for tree in trees)


def lower(system: System, program: str) -> Any:
    """One of PROGRAMS lowered on abstract arguments, as `jax.stages.Lowered`; the mesh must be of a topology."""
    steps: dict[str, Callable[[], Any]] = {"generate": _generate, "score": _score, "train": _train}
    return steps[program](system)


def _generate(system: System) -> Any:
    key = jax.eval_shape(jax.random.key, 0)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(system.generate_mesh))
    static = {"module": system.modules["actor"], "sampling": sampling(system), "mesh": system.generate_mesh}
    return generate.lower(system.trees["actor"], *prompt_batch(system), key, **static)


def sampling(system: System) -> SamplingConfig:
    eos = system.modules["actor"].config.eos_token_id
    return system.config.sampling(0 if eos is None else eos, 0)


def _score(system: System) -> Any:
    frozen = (_read_where_it_waits(system, name) for name in ("reference", "reward"))
    params = (system.trees["actor"], system.trees["critic"], *frozen)
    hyperparameters = system.config.hyperparameters(system.config.seed)
    static = {"hyperparameters": hyperparameters, "mesh": system.mesh, "sampling": sampling(system)}
    return score_rollout.lower(rollout(system, system.rows), *params, **system.modules, **static)


def _read_where_it_waits(system: System, name: str) -> PyTree:
    return _where_it_waits(system, name) if name in system.on_host else system.read_params(name)


def _train(system: System) -> Any:
    return ppo_step.lower(ppo_state(system), experience(system))


def topology_devices(device: Device, shape: str, count: int) -> list:
    """Devices of the compiler's own topology; RuntimeError of JAX when its package is missing."""
    from jax.experimental import topologies

    from jaxrlhf.plan.devices import target_config

    if device.platform == "tpu":
        options = {}
        if count < device.devices_per_host or count == 1:
            options["chips_per_host_bounds"] = [int(n) for n in f"{shape}x1".split("x")[:3]]
        return topologies.get_topology_desc(f"{device.name}:{shape}", "tpu", **options).devices
    hosts = -(-count // device.devices_per_host)
    return topologies.get_topology_desc(
        "", "cuda", topology=f"1x{hosts}x{device.devices_per_host}", target_config=target_config(device)
    ).devices
