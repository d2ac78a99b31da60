"""The planned run without an array: the models and state that `jaxrlhf.rl.build` makes abstractly, and its programs.

Trees hold `jax.ShapeDtypeStruct`s with shardings. So sizes per device are exact, and the jitted programs can be lowered
for devices that are not present.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.engine import Requests, Rollout, SamplingConfig, generate
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    Decoder,
    DecoderConfig,
    Model,
    check_same_rows,
    known_config,
    param_shapes,
    read_config,
    split_trainable,
)
from jaxrlhf.plan.devices import Device
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.rl import Experience, PPOState, ppo_step, score_rollout
from jaxrlhf.rl.build import ABSTRACT, FrozenModels, build_models
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.sharding import (
    GENERATE_RULES,
    TRAIN_RULES,
    Rules,
    batch_sharding,
    generate_mesh,
    make_mesh,
    replicated,
)
from jaxrlhf.sharding.placement import HOST
from jaxrlhf.trainers.settings import batch_devices, check_context

PyTree = Any


class AbsentDevice:
    """Stands in a mesh for a device that is not present; meshes are arranged by these names."""

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


def model_config(option: str, name: str, longest: int, lengths: str) -> DecoderConfig:
    """Configuration of a known model or a local folder; nothing is downloaded.

    Args:
        option: The flag that names the model.
        name: Name or folder.
        longest: Tokens of the longest sequence.
        lengths: The flags that this length comes from.

    Raises:
        InputError: There is no such model, or its context is shorter.
    """
    try:
        config = read_config(name) if Path(name).is_dir() else known_config(name)
    except InputError as error:
        if Path(name).is_dir():
            raise
        raise InputError(f"{option}: {name!r} is no folder, and {error}") from error
    check_context(config, longest, f"{lengths} for {option}={name}")
    return config


@dataclass(frozen=True, eq=False)
class System:
    """The abstract counterpart of RLHFEngine on a mesh."""

    config: PPOConfig
    mesh: Mesh
    generate_mesh: Mesh
    state: PPOState
    frozen: FrozenModels

    @cached_property
    def modules(self) -> dict[str, Decoder]:
        """Modules of `actor`, `critic`, `reference` and `reward`."""
        reward = self.frozen.reward
        return {
            "actor": self.state.actor,
            "critic": cast(Decoder, self.state.critic),
            "reference": self.frozen.reference.module,
            **({"reward": reward.module} if reward else {}),
        }

    @cached_property
    def trees(self) -> dict[str, PyTree]:
        """Trees that lie on the devices, or wait in host memory (`on_host`); those without arrays are left out."""
        state, reward = self.state, self.frozen.reward
        trees = {
            "actor": state.actor_params,
            "actor_optimizer": state.actor_opt_state,
            "critic": state.critic_params,
            "critic_optimizer": state.critic_opt_state,
            "reference": self.frozen.reference.own,
            "reward": reward and reward.own,
            "ema": state.ema_params,
        }
        return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}

    @cached_property
    def on_host(self) -> frozenset[str]:
        """Names of the trees that lie in host memory between uses."""
        c = self.config
        names = {"actor_optimizer", "critic_optimizer"} if c.run.offload_optimizer else set()
        names |= {"reference"} if c.frozen.offload_reference_model else set()
        names |= {"reward"} if c.frozen.offload_reward_model else set()
        return frozenset(names & self.trees.keys())

    @property
    def batch_devices(self) -> int:
        """Devices that the rows of a batch are split over."""
        return batch_devices(self.mesh)

    @property
    def rows(self) -> int:
        """Rows of a rollout batch, on all devices."""
        return self.config.rollout_rows(self.batch_devices)

    @property
    def generate_rows(self) -> int:
        """Rows of one call of the generate program, on all devices."""
        return self.rows // self.config.rollout.generation_batches

    @property
    def length(self) -> int:
        """Tokens of a prompt and its response."""
        return self.config.data.max_prompt_seq_len + self.config.sampling.max_new_tokens

    @property
    def expert(self) -> int:
        """Devices that split the experts, if there are any, and otherwise parameters."""
        return self.mesh.shape["expert"]

    @property
    def tensor(self) -> int:
        """Devices that split heads and MLP in training."""
        return self.mesh.shape["tensor"]

    @property
    def generate_tensor(self) -> int:
        """Devices that split heads and MLP in generation."""
        return self.generate_mesh.shape["tensor"] * self.generate_mesh.shape["fsdp"]

    def trainable(self, name: str) -> PyTree:
        """The part of the actor's or critic's tree that is trained."""
        return split_trainable(self.trees[name], self.modules[name])[0]

    def read_params(self, name: str) -> PyTree:
        """All parameters of the reference or reward model, with the base that it shares."""
        return getattr(self.frozen.with_trained(self.state), name).params

    def waiting(self, name: str) -> PyTree:
        """A tree where it waits between uses; counters stay on the device, as in `optimizer_shardings`."""
        tree = self.trees.get(name, {})
        if name not in self.on_host:
            return tree

        def move(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return x.update(sharding=x.sharding.with_memory_kind(HOST)) if x.ndim else x

        return jax.tree.map(move, tree)


def build_system(config: PlanConfig, devices: Sequence[object] | None = None) -> System:
    """Build the run abstractly.

    Args:
        config: Settings of the plan.
        devices: Devices of a compiler's topology; by default devices that are not present.

    Raises:
        InputError: RLHFEngine would refuse the models or the mesh.
    """
    ppo = config.planned
    devices = absent_devices(config.accelerator, config.devices) if devices is None else devices
    sizes = ppo.mesh.mesh_data, ppo.mesh.mesh_fsdp, ppo.mesh.mesh_tensor, ppo.mesh.mesh_expert
    mesh = make_mesh(*sizes, devices=devices)
    lengths = ppo.data.max_prompt_seq_len + ppo.sampling.max_new_tokens, "max_prompt_seq_len + max_new_tokens"
    actor, reward = model_config("actor", config.actor, *lengths), model_config("reward", config.reward, *lengths)
    check_same_rows(actor, reward, (f"actor={config.actor}", f"reward={config.reward}"))

    # As `auto` chooses on the planned devices; the planner's own say nothing about them.
    experts = "ragged" if config.accelerator.platform == "tpu" else "dense"

    def model(shape: DecoderConfig, head: str, stage: int, kv_cache_dtype: str = "auto") -> Model:
        dtype, remat = ppo.mesh.compute_dtype, ppo.run.remat
        module = Decoder(
            shape, head, dtype, remat, zero_stage=stage, kv_cache_dtype=kv_cache_dtype, expert_implementation=experts
        )
        return Model(module, param_shapes(module), shape)

    stage = ppo.compute.zero_stage
    value = model(reward, "scalar", stage if ppo.critic.critic_zero_stage is None else ppo.critic.critic_zero_stage)
    policy = model(actor, "lm", stage, ppo.generation.kv_cache_dtype)
    state, frozen = build_models(ppo, mesh, policy, value, value, 1, ABSTRACT)
    generating = generate_mesh(mesh, actor.num_heads, ppo.rollout.generate_tensor_parallel)
    ppo.check_pieces(ppo.rollout_rows(batch_devices(mesh)))
    return System(ppo, mesh, generating, state, frozen)


def local_shape(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Shape of an array's share on one device."""
    return tuple(x.sharding.shard_shape(x.shape))


def array_bytes(shape: tuple[int, ...], itemsize: int, platform: str) -> int:
    """Device bytes of an array: its elements, on a TPU padded to tiles of 8 × 128 in the best of its layouts."""
    if platform != "tpu":
        return math.prod(shape) * itemsize
    if len(shape) < 2:
        return -(-math.prod(shape) * itemsize // 512) * 512
    rows_most = 8 * max(1, 4 // itemsize) if itemsize == 1 else 8
    sizes = []
    for i, rows in enumerate(shape):
        tile = min(rows_most, 1 << max(rows - 1, 0).bit_length())
        for j, lanes in enumerate(shape):
            if i != j:
                others = math.prod(n for k, n in enumerate(shape) if k not in (i, j))
                sizes.append(others * -(-rows // tile) * tile * -(-lanes // 128) * 128)
    return min(sizes) * itemsize


def tree_bytes(tree: PyTree, platform: str = "") -> int:
    """Bytes on one device of a tree of placed abstract arrays."""
    return sum(array_bytes(local_shape(x), x.dtype.itemsize, platform) for x in jax.tree.leaves(tree))


def _batch(system: System, columns: int, kinds: dict[str, Any], rules: Rules, rows: int) -> dict[str, Any]:
    """Abstract arrays of a batch: `[rows, columns]` of each dtype in `kinds`, or `[rows]` for a dtype in a tuple."""
    mesh = system.generate_mesh if rules is GENERATE_RULES else system.mesh

    def array(kind: Any) -> jax.ShapeDtypeStruct:
        shape, dtype = ((rows,), kind[0]) if isinstance(kind, tuple) else ((rows, columns), kind)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, shape, rules))

    return {name: array(kind) for name, kind in kinds.items()}


def prompt_batch(system: System) -> Requests:
    """Prompts of one call of the generate program."""
    kinds = {"ids": jnp.int32, "mask": bool, "number": (jnp.int32,)}
    columns = system.config.data.max_prompt_seq_len
    return Requests(**_batch(system, columns, kinds, GENERATE_RULES, system.generate_rows))


def rollout(system: System, rows: int) -> Rollout:
    """Result of the generate program for `rows` rows."""
    kinds = {"tokens": jnp.int32, "mask": bool, "response_mask": bool, "logprobs": jnp.float32}
    arrays = _batch(system, system.length, kinds, GENERATE_RULES, rows)
    return Rollout(**arrays, prompt_length=system.config.data.max_prompt_seq_len)


def experience(system: System) -> Experience:
    """Result of the score program."""
    kinds = {"tokens": jnp.int32, "mask": bool, "response_mask": bool, "scores": (jnp.float32,), "ended": (bool,)}
    kinds |= dict.fromkeys(("logprobs", "ref_logprobs", "values", "sampler_logprobs", "entropy"), jnp.float32)
    arrays = _batch(system, system.length, kinds, TRAIN_RULES, system.rows)
    return Experience(**arrays, longest=system.config.sampling.max_new_tokens)


def ppo_state(system: System) -> PPOState:
    """The state, its optimizer moments where they wait."""
    moments = {f"{name}_opt_state": system.waiting(f"{name}_optimizer") for name in ("actor", "critic")}
    return system.state.replace(**moments)


READ_FROM_HOST = {"generate": (), "score": ("reference", "reward"), "train": ("actor_optimizer", "critic_optimizer")}


def offloaded_arguments(system: System, program: str) -> int:
    """Bytes per device that a program reads from host memory."""
    trees = (system.waiting(name) for name in READ_FROM_HOST[program] if name in system.on_host)
    return sum(tree_bytes([x for x in jax.tree.leaves(tree) if x.ndim]) for tree in trees)


def sampling(system: System) -> SamplingConfig:
    """Sampling with the actor's EOS."""
    eos = system.modules["actor"].config.eos_token_id
    return system.config.sampling.replace(eos_token_id=0 if eos is None else eos)


def _lower_generate(system: System) -> jax.stages.Lowered:
    key = jax.eval_shape(jax.random.key, 0)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(system.generate_mesh))
    static = {"module": system.modules["actor"], "sampling": sampling(system), "mesh": system.generate_mesh}
    return cast(Any, generate).lower(system.trees["actor"], prompt_batch(system), key, **static)


def _lower_score(system: System) -> jax.stages.Lowered:
    models = system.frozen.with_trained(system.state)
    frozen = {name: getattr(models, name) for name in ("reference", "reward") if name in system.on_host}
    waiting = {name: replace(model, params=system.waiting(name)) for name, model in frozen.items()}
    models = replace(models, **waiting)
    static = {"hyperparameters": system.state.hyperparameters, "mesh": system.mesh, "sampling": sampling(system)}
    return cast(Any, score_rollout).lower(rollout(system, system.rows), models, **static)


def _lower_train(system: System) -> jax.stages.Lowered:
    return cast(Any, ppo_step).lower(ppo_state(system), experience(system))


_LOWER = {"generate": _lower_generate, "score": _lower_score, "train": _lower_train}
PROGRAMS = tuple(_LOWER)


def lower(system: System, program: str) -> jax.stages.Lowered:
    """Lower one of PROGRAMS on abstract arguments; the mesh must be of a topology."""
    return _LOWER[program](system)


def topology_devices(device: Device, shape: str, count: int) -> Sequence[Any]:
    """Devices of the compiler's own topology; JAX raises a RuntimeError when its package is missing."""
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
