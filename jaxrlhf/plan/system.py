"""The planned run without an array: the models and state that `jaxrlhf.rl.build` makes abstractly.

SFT, reward models, DPO and KTO are built as a run with an actor alone, or with an actor and a reference: the parts are
the same (`init_state`, `frozen_copy`). The teacher of distillation is a reference of another shape. Trees
hold `jax.ShapeDtypeStruct`s with shardings, so sizes per device are exact.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrlhf.data.settings import packs
from jaxrlhf.data.tokenized import SEQUENCES
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    Decoder,
    DecoderConfig,
    Model,
    check_same_rows,
    frozen_stage,
    known_config,
    param_shapes,
    param_shardings,
    read_config,
    split_trainable,
)
from jaxrlhf.plan.devices import Device
from jaxrlhf.plan.settings import SUPERVISED, PlanConfig
from jaxrlhf.rl import PPOState
from jaxrlhf.rl.build import ABSTRACT, FrozenModel, FrozenModels, build_models
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.sharding import generate_mesh
from jaxrlhf.sharding.placement import HOST
from jaxrlhf.trainers.distill import TeachingOptions
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
    """The abstract counterpart of RLHFEngine, or of the state of a supervised trainer, on a mesh."""

    trainer: str
    programs: tuple[str, ...]
    config: PPOConfig
    mesh: Mesh
    generate_mesh: Mesh
    state: PPOState
    frozen: FrozenModels
    device: Device
    """The planned one."""
    teaching: TeachingOptions = TeachingOptions()

    @cached_property
    def modules(self) -> dict[str, Decoder]:
        """Modules of those of `actor`, `critic`, `reference` and `reward` that there are."""
        reference, reward = self.frozen.reference, self.frozen.reward
        return {
            "actor": self.state.actor,
            **({"critic": self.state.critic} if self.state.critic else {}),
            **({"reference": reference.module} if reference and "score" in self.programs else {}),
            **({"reward": reward.module} if reward else {}),
        }

    @property
    def supervised(self) -> bool:
        """True for trainers of labelled rows."""
        return self.trainer in SUPERVISED

    @property
    def samplers(self) -> dict[str, float]:
        """Models that sample responses, each with its share of the iterations."""
        own = self.teaching.lmbda if self.supervised else 1.0
        shares = {"actor": own, "reference": 1 - own if self.teaching.seq_kd else 0.0}
        return {name: share for name, share in shares.items() if share}

    @property
    def sampler(self) -> str:
        """The larger one of `samplers`, whose generate program needs the most memory."""
        return max(self.samplers, key=lambda name: tree_bytes(self.trees[name]))

    def sampled_by(self, name: str) -> "System":
        """The run as the generate program of a model sees it: a teacher stands in the place of the trained model."""
        if name == "actor":
            return self
        state = self.state.replace(actor=self.modules[name], actor_params=self.trees[name])
        together = self.config.rollout.generate_tensor_parallel
        generating = generate_mesh(self.mesh, self.modules[name].config.num_heads, together)
        return dataclasses.replace(self, state=state, generate_mesh=generating)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the models that are trained."""
        return tuple(name for name in ("actor", "critic") if name in self.modules)

    @property
    def scoring(self) -> tuple[str, ...]:
        """Names of the models that the score program reads."""
        if self.supervised:
            return ("reference",)
        return tuple(name for name in self.modules if name != "actor" or self.config.scores_policy)

    @property
    def score_passes(self) -> dict[str, int]:
        """Forward passes of a batch before it is trained on, by model. KTO has one of mismatched rows by each model."""
        if self.trainer == "kto":
            return {"reference": 2, "actor": 1}
        return dict.fromkeys((name for name in self.scoring if name in self.modules), 1)

    @cached_property
    def trees(self) -> dict[str, PyTree]:
        """Trees that lie on the devices, or wait in host memory (`on_host`); those without arrays are left out."""
        state, frozen = self.state, self.frozen
        trees = {
            "actor": state.actor_params,
            "actor_optimizer": state.actor_opt_state,
            "critic": state.critic_params,
            "critic_optimizer": state.critic_opt_state,
            "reference": self._of_reference() if "reference" in self.modules else None,
            "reward": frozen.reward and frozen.reward.own,
            "ema": state.ema_params,
            "waiting rollouts": state.pending,
            "replayed rollouts": state.replay,
        }
        return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}

    def _of_reference(self) -> PyTree:
        """Parameters of the reference that no other model shares; those in the state if it moves."""
        reference, moving = self.frozen.reference, self.state.reference_params
        return reference and reference.own if moving is None else moving

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
    def packed(self) -> bool:
        """True for rows of several sequences."""
        return self.supervised and "generate" not in self.programs and packs(self.config.data, self.row_kind)

    @property
    def row_kind(self) -> str:
        """The step that has rows of the same kind."""
        return "sft" if self.trainer == "distill" else self.trainer

    @property
    def length(self) -> int:
        """Columns of a row: a prompt and its response, a sequence, or what is packed into a row."""
        if self.supervised and "generate" not in self.programs:
            return self.config.data.max_length * (SEQUENCES[self.row_kind] if self.packed else 1)
        return self.config.data.max_prompt_seq_len + self.config.sampling.max_new_tokens

    @property
    def sequences(self) -> int:
        """Sequences that a row has side by side: those of a pair that is not packed."""
        return SEQUENCES[self.row_kind] if self.supervised and not self.packed else 1

    @property
    def headed(self) -> int:
        """Columns that the output head runs on."""
        return self.length if self.supervised or self.context > 1 else self.config.sampling.max_new_tokens

    @property
    def context(self) -> int:
        """Devices that split the columns of sequences in training and scoring, and parameters."""
        return self.mesh.shape["context"]

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

    @property
    def stored_parts(self) -> int:
        """Devices that split the storage of parameters outside the experts, besides `tensor`."""
        return self.mesh.shape["fsdp"] * self.expert * self.context

    def gathers(self, name: str) -> bool:
        """True for a model whose layers are gathered over fsdp, expert and context one by one."""
        return self.modules[name].zero_stage == 3 and self.stored_parts > 1

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
    ppo, supervised = config.planned, config.trainer in SUPERVISED
    devices = absent_devices(config.accelerator, config.devices) if devices is None else devices
    mesh = ppo.mesh.make_mesh(devices)
    if "generate" not in config.programs:
        lengths = ppo.data.max_length, "max_length"
    elif supervised:
        lengths = ppo.data.max_length + ppo.sampling.max_new_tokens, "max_length + max_new_tokens"
    else:
        lengths = ppo.data.max_prompt_seq_len + ppo.sampling.max_new_tokens, "max_prompt_seq_len + max_new_tokens"
    shapes = model_configs(config, *lengths)

    # As `auto` chooses on the planned devices; the planner's own say nothing about them.
    experts = "ragged" if config.accelerator.platform == "tpu" else "dense"

    def model(shape: DecoderConfig, head: str, stage: int, kv_cache_dtype: str = "auto") -> Model:
        dtype, remat = ppo.mesh.compute_dtype, ppo.run.remat
        module = Decoder(
            shape,
            head,
            dtype,
            remat,
            zero_stage=stage,
            attention_implementation=ppo.compute.attention_implementation,
            logprob_implementation=ppo.compute.logprob_implementation,
            expert_implementation=experts,
            kv_cache_dtype=kv_cache_dtype,
        )
        return Model(module, param_shapes(module), shape)

    stage = ppo.compute.zero_stage
    head = "scalar" if config.trainer == "reward" else "lm"
    policy = model(shapes["actor"], head, stage, ppo.generation.kv_cache_dtype)
    critic = score = None
    if not supervised:
        own = ppo.critic.critic_zero_stage
        value = model(shapes.get("reward", shapes["actor"]), "scalar", stage if own is None else own)
        critic = value if ppo.algorithm.algorithm.needs_critic else None
        score = value if "reward" in shapes else None
    state, frozen = build_models(ppo, mesh, policy, critic, score, 1, ABSTRACT)
    if "teacher" in shapes:
        frozen = dataclasses.replace(frozen, reference=_teacher(model(shapes["teacher"], "lm", stage), mesh))
    generating = mesh
    if ppo.rollout.generation_devices:
        raise InputError(
            f"generation_devices={ppo.rollout.generation_devices}: the planner knows runs whose devices all train and "
            "generate; leave it out, and plan for the devices that train"
        )
    if "generate" in config.programs:
        generating = generate_mesh(mesh, shapes["actor"].num_heads, ppo.rollout.generate_tensor_parallel)
        ppo.rollout_rows(batch_devices(mesh))  # refuses groups and pieces that do not divide the rows
    run = config.trainer, config.programs, ppo, mesh, generating, state, frozen, config.accelerator
    return System(*run, config.teaching)


def _teacher(model: Model, mesh: Mesh) -> FrozenModel:
    """The teacher as a run keeps it, in the compute dtype."""
    module = model.module.clone(zero_stage=frozen_stage(model.module))
    own = ABSTRACT.frozen_copy(model.params, param_shardings(module, mesh), module.dtype, offload=False)
    return FrozenModel(module, own, module)


def model_configs(config: PlanConfig, longest: int, lengths: str) -> dict[str, DecoderConfig]:
    """Configurations of `actor` and, where there is one, `reward` or `teacher`; arguments are as in `model_config`."""
    reads_teacher = config.trainer == "distill" and "score" in config.programs
    named = {"actor": config.actor} | ({"teacher": str(config.teacher)} if reads_teacher else {})
    if config.trainer not in SUPERVISED and config.reward is not None:
        named["reward"] = config.reward
    known = config.shapes or {}
    shapes = {name: known.get(name) or model_config(name, value, longest, lengths) for name, value in named.items()}
    if "reward" in shapes:
        names = f"actor={config.actor}", f"reward={config.reward}"
        check_same_rows(shapes["actor"], shapes["reward"], names)
    return shapes


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
