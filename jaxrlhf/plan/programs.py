"""The planned run without an array: the models and state that `jaxrlhf.rl.build` makes abstractly, and its programs.

SFT, reward models and DPO are built as a run with an actor alone, or with an actor and a reference: the parts are the
same (`init_state`, `frozen_copy`).

Trees hold `jax.ShapeDtypeStruct`s with shardings. So sizes per device are exact, and the jitted programs can be lowered
for devices that are not present.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.data.loading import packs
from jaxrlhf.data.tokenized import SEQUENCES
from jaxrlhf.engine import Requests, Rollout, SamplingConfig, generate
from jaxrlhf.errors import InputError
from jaxrlhf.kernels.choice import LIBRARIES, decide
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
from jaxrlhf.plan.settings import PROGRAMS, SUPERVISED, PlanConfig
from jaxrlhf.rl import Experience, PPOState, ppo_step, score_rollout
from jaxrlhf.rl.build import ABSTRACT, FrozenModels, build_models
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.sharding import (
    GENERATE_RULES,
    TRAIN_RULES,
    Rules,
    batch_sharding,
    generate_mesh,
    replicated,
)
from jaxrlhf.sharding.placement import HOST
from jaxrlhf.trainers import dpo, reward, sft
from jaxrlhf.trainers.references import score_batch
from jaxrlhf.trainers.settings import batch_devices, check_context
from jaxrlhf.trainers.supervised import Objective, TrainState, train_step

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

    def attends_in_blocks(self, name: str, kernel: str = "flash_attention") -> bool:
        """True for a model whose attention keeps scores on the chip, as all kernels but XLA's do."""
        module = self.modules[name]
        c, asked = module.config, module.attention_implementation
        if self.trainer in ("sft", "reward") and c.attention_dropout:
            return False
        if asked != "auto":
            return asked != "xla" and (asked not in LIBRARIES or kernel == "flash_attention")
        facts = {"dtype": module.dtype, "head_dim": c.head_dim, "alibi": c.position == "alibi"}
        facts |= {"softcap": c.attention_softcap is not None, "device": self.device}
        return decide(kernel, "auto", **facts).implementation != "xla"

    @cached_property
    def modules(self) -> dict[str, Decoder]:
        """Modules of those of `actor`, `critic`, `reference` and `reward` that there are."""
        reward = self.frozen.reward
        return {
            "actor": self.state.actor,
            **({"critic": self.state.critic} if self.state.critic else {}),
            **({"reference": self.frozen.reference.module} if "score" in self.programs else {}),
            **({"reward": reward.module} if reward else {}),
        }

    @property
    def supervised(self) -> bool:
        """True for SFT, reward models and DPO."""
        return self.trainer in SUPERVISED

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the models that are trained."""
        return tuple(name for name in ("actor", "critic") if name in self.modules)

    @property
    def scoring(self) -> tuple[str, ...]:
        """Names of the models that the score program reads."""
        return ("reference",) if self.supervised else tuple(self.modules)

    @cached_property
    def trees(self) -> dict[str, PyTree]:
        """Trees that lie on the devices, or wait in host memory (`on_host`); those without arrays are left out."""
        state, frozen = self.state, self.frozen
        trees = {
            "actor": state.actor_params,
            "actor_optimizer": state.actor_opt_state,
            "critic": state.critic_params,
            "critic_optimizer": state.critic_opt_state,
            "reference": frozen.reference.own if "reference" in self.modules else None,
            "reward": frozen.reward and frozen.reward.own,
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
    def packed(self) -> bool:
        """True for rows of several sequences."""
        return self.supervised and packs(self.config.data, self.trainer)

    @property
    def length(self) -> int:
        """Columns of a row: a prompt and its response, a sequence, or what is packed into a row."""
        if self.supervised:
            return self.config.data.max_length * (SEQUENCES[self.trainer] if self.packed else 1)
        return self.config.data.max_prompt_seq_len + self.config.sampling.max_new_tokens

    @property
    def sequences(self) -> int:
        """Sequences that a row has side by side: those of a pair that is not packed."""
        return SEQUENCES[self.trainer] if self.supervised and not self.packed else 1

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
    if supervised:
        lengths = ppo.data.max_length, "max_length"
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
    generating = mesh
    if not supervised:
        generating = generate_mesh(mesh, shapes["actor"].num_heads, ppo.rollout.generate_tensor_parallel)
        ppo.rollout_rows(batch_devices(mesh))  # refuses groups and pieces that do not divide the rows
    return System(config.trainer, config.programs, ppo, mesh, generating, state, frozen, config.accelerator)


def model_configs(config: PlanConfig, longest: int, lengths: str) -> dict[str, DecoderConfig]:
    """Configurations of `actor` and, where one scores, `reward`; the arguments are those of `model_config`."""
    named = {"actor": config.actor}
    if config.trainer not in SUPERVISED and config.reward is not None:
        named["reward"] = config.reward
    known = config.shapes or {}
    shapes = {name: known.get(name) or model_config(name, value, longest, lengths) for name, value in named.items()}
    if len(shapes) == 2:
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


def _batch(system: System, columns: int, kinds: dict[str, Any], rules: Rules, rows: int) -> dict[str, Any]:
    """Abstract arrays of a batch: `[rows, columns]` of each dtype in `kinds`, or `[rows]` for a dtype in a tuple."""
    mesh = system.generate_mesh if rules is GENERATE_RULES else system.mesh

    def array(kind: Any) -> jax.ShapeDtypeStruct:
        shape, dtype = ((rows,), kind[0]) if isinstance(kind, tuple) else ((rows, columns), kind)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, shape, rules))

    return {name: array(kind) for name, kind in kinds.items()}


def prompt_batch(system: System) -> Requests:
    """Prompts of one call of the generate program."""
    columns, rows = system.config.data.max_prompt_seq_len, system.generate_rows
    prompts = rows // system.config.sampling.samples_per_prompt
    arrays = _batch(system, columns, {"ids": jnp.int32, "mask": bool}, GENERATE_RULES, prompts)
    return Requests(**arrays, **_batch(system, columns, {"number": (jnp.int32,)}, GENERATE_RULES, rows))


def rollout(system: System, rows: int) -> Rollout:
    """Result of the generate program for `rows` rows."""
    kinds = {"tokens": jnp.int32, "mask": bool, "response_mask": bool, "logprobs": jnp.float32}
    arrays = _batch(system, system.length, kinds, GENERATE_RULES, rows)
    return Rollout(**arrays, prompt_length=system.config.data.max_prompt_seq_len)


def experience(system: System) -> Experience:
    """Result of the score program."""
    kinds = {"tokens": jnp.int32, "mask": bool, "response_mask": bool, "scores": (jnp.float32,), "ended": (bool,)}
    kinds |= dict.fromkeys(("logprobs", "ref_logprobs", "values", "sampler_logprobs", "entropy"), jnp.float32)
    if "critic" not in system.modules:
        del kinds["values"]
    arrays: dict[str, Any] = {"values": None} | _batch(system, system.length, kinds, TRAIN_RULES, system.rows)
    return Experience(**arrays, longest=system.config.sampling.max_new_tokens)


def labelled_batch(system: System) -> dict[str, Any]:
    """Rows of SFT, or pairs, as the step before the reference gets them."""
    kinds: dict[str, Any] = {"row_mask": (jnp.int32,)}
    if system.sequences == 2:
        names = [f"{side}_{kind}" for side in ("chosen", "rejected") for kind in ("ids", "mask", "loss_mask")]
    else:
        names = ["input_ids", "attention_mask", "loss_mask", *(["segment_ids"] if system.packed else [])]
    kinds |= dict.fromkeys(names, jnp.int32)
    pairs = _batch(system, 1, {"pair_mask": jnp.int32}, TRAIN_RULES, system.rows)
    paired = system.packed and SEQUENCES[system.trainer] == 2
    return _batch(system, system.length, kinds, TRAIN_RULES, system.rows) | (pairs if paired else {})


def train_batch(system: System) -> Any:
    """The batch of the train program."""
    if not system.supervised:
        return experience(system)
    batch = labelled_batch(system)
    if system.trainer == "dpo":
        like = batch["pair_mask" if system.packed else "row_mask"]
        shape = jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=like.sharding)
        batch |= {"ref_chosen_logps": shape, "ref_rejected_logps": shape}
    return batch


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


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(jax.random.key, 0)
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))


def _lower_generate(system: System) -> jax.stages.Lowered:
    key = _key(system.generate_mesh)
    static = {"module": system.modules["actor"], "sampling": sampling(system), "mesh": system.generate_mesh}
    return cast(Any, generate).lower(system.trees["actor"], prompt_batch(system), key, **static)


def _lower_reference(system: System) -> jax.stages.Lowered:
    steps = system.config.run.gradient_accumulation_steps
    static = {"module": system.modules["reference"], "mesh": system.mesh, "micro_batches": steps}
    static["logprobs"] = dpo.response_logprobs
    return cast(Any, score_batch).lower(system.read_params("reference"), labelled_batch(system), **static)


def _lower_score(system: System) -> jax.stages.Lowered:
    if system.supervised:
        return _lower_reference(system)
    models = system.frozen.with_trained(system.state)
    frozen = {name: getattr(models, name) for name in ("reference", "reward") if name in system.on_host}
    waiting = {name: replace(model, params=system.waiting(name)) for name, model in frozen.items()}
    models = replace(models, **waiting)
    static = {"hyperparameters": system.state.hyperparameters, "mesh": system.mesh, "sampling": sampling(system)}
    return cast(Any, score_rollout).lower(rollout(system, system.rows), models, **static)


def _objective(trainer: str) -> Objective:
    """A supervised trainer's default loss."""
    if trainer == "dpo":
        return dpo.objective(dpo.Losses())[0]
    return sft.OBJECTIVE if trainer == "sft" else reward.OBJECTIVES["pairwise"]


def _lower_supervised(system: System) -> jax.stages.Lowered:
    state, run = system.state, system.config.run
    train_state = TrainState(
        step=state.step,
        params=state.actor_params,
        opt_state=system.waiting("actor_optimizer"),
        module=state.actor,
        optimizer=state.actor_optimizer,
        mesh=system.mesh,
    )
    static = {"objective": _objective(system.trainer), "micro_batches": run.gradient_accumulation_steps}
    static |= {"routers": system.config.routers}
    return cast(Any, train_step).lower(train_state, train_batch(system), _key(system.mesh), **static)


def _lower_train(system: System) -> jax.stages.Lowered:
    if system.supervised:
        return _lower_supervised(system)
    return cast(Any, ppo_step).lower(ppo_state(system), experience(system))


_LOWER: dict[str, Callable[[System], jax.stages.Lowered]] = dict(
    zip(PROGRAMS, (_lower_generate, _lower_score, _lower_train), strict=True)
)


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
