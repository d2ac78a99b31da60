"""The programs of a planned run on abstract arguments: their batches, and their lowering for absent devices."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxrlhf.data.tokenized import SEQUENCES
from jaxrlhf.engine import Requests, Rollout, SamplingConfig, generate
from jaxrlhf.plan.devices import Device
from jaxrlhf.plan.settings import PROGRAMS
from jaxrlhf.plan.system import System, tree_bytes
from jaxrlhf.rl import Experience, PPOState, ppo_step, score_rollout
from jaxrlhf.sharding import GENERATE_RULES, TRAIN_RULES, Rules, batch_sharding, replicated
from jaxrlhf.trainers import distill, dpo, kto, reward, sft
from jaxrlhf.trainers.references import score_batch
from jaxrlhf.trainers.supervised import Objective, TrainState, train_step

Batch = dict[str, jax.ShapeDtypeStruct]
"""Abstract arrays by name."""
Kind = DTypeLike | tuple[DTypeLike]
"""The dtype of an array `[rows, columns]`, or in a tuple that of an array `[rows]`."""


def _batch(system: System, columns: int, kinds: Mapping[str, Kind], rules: Rules, rows: int) -> Batch:
    """Abstract arrays of a batch: `[rows, columns]` of each dtype in `kinds`, or `[rows]` for a dtype in a tuple."""
    mesh = system.generate_mesh if rules is GENERATE_RULES else system.mesh

    def array(kind: Kind) -> jax.ShapeDtypeStruct:
        shape, dtype = ((rows,), kind[0]) if isinstance(kind, tuple) else ((rows, columns), kind)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, shape, rules))

    return {name: array(kind) for name, kind in kinds.items()}


def prompt_batch(system: System) -> Requests:
    """Prompts of one call of the generate program."""
    columns, rows = system.config.data.max_prompt_seq_len, system.generate_rows
    prompts = rows // system.config.sampling.samples_per_prompt
    arrays: dict[str, Any] = _batch(system, columns, {"ids": jnp.int32, "mask": bool}, GENERATE_RULES, prompts)
    arrays |= _batch(system, columns, {"number": (jnp.int32,)}, GENERATE_RULES, rows)
    return Requests(**arrays)


def rollout(system: System, rows: int) -> Rollout:
    """Result of the generate program for `rows` rows."""
    kinds = {"tokens": jnp.int32, "mask": bool, "response_mask": bool, "logprobs": jnp.float32}
    arrays: dict[str, Any] = _batch(system, system.length, kinds, GENERATE_RULES, rows)
    return Rollout(**arrays, prompt_length=system.config.data.max_prompt_seq_len)


def experience(system: System) -> Experience:
    """Result of the score program."""
    kinds = {"tokens": jnp.int32, "mask": bool, "response_mask": bool, "scores": (jnp.float32,), "ended": (bool,)}
    kinds |= dict.fromkeys(("logprobs", "ref_logprobs", "values", "sampler_logprobs", "entropy"), jnp.float32)
    absent = ["values"] if "critic" not in system.modules else []
    absent += ["logprobs", "entropy"] if not system.config.scores_policy else []
    for name in absent:
        del kinds[name]
    arrays: dict[str, Any] = dict.fromkeys(absent) | _batch(system, system.length, kinds, TRAIN_RULES, system.rows)
    return Experience(**arrays, longest=system.config.sampling.max_new_tokens)


def labelled_batch(system: System) -> Batch:
    """Rows of SFT or KTO, or pairs, as the step before the reference gets them."""
    kinds: dict[str, Any] = {"row_mask": (jnp.int32,)}
    if system.trainer == "kto":
        kinds |= {"label": (jnp.int32,)} | dict.fromkeys(kto.COLUMNS["kl"], jnp.int32)
    if system.sequences == 2:
        names = [f"{side}_{kind}" for side in ("chosen", "rejected") for kind in ("ids", "mask", "loss_mask")]
    else:
        names = ["input_ids", "attention_mask", "loss_mask", *(["segment_ids"] if system.packed else [])]
    kinds |= dict.fromkeys(names, jnp.int32)
    pairs = _batch(system, 1, {"pair_mask": jnp.int32}, TRAIN_RULES, system.rows)
    paired = system.packed and SEQUENCES[system.row_kind] == 2
    return _batch(system, system.length, kinds, TRAIN_RULES, system.rows) | (pairs if paired else {})


def teacher_logprobs(system: System) -> Batch:
    """The teacher's most likely tokens of a batch."""
    count, vocab = system.teaching.teacher_top_k, [module.config.vocab_size for module in system.modules.values()]
    shape = (system.rows, system.length, min(count or vocab[0], *vocab))
    kinds = {"teacher_ids": jnp.int32, "teacher_logps": jnp.float32}
    sharding = batch_sharding(system.mesh, shape, TRAIN_RULES)
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, kind in kinds.items()}


NUMBERS = {
    "reward": ("margin",),
    "dpo": ("ref_chosen_logps", "ref_rejected_logps"),
    "kto": ("ref_completion_logps", "kl"),
}
"""Arrays of a train batch with a number for each row or pair."""


def train_batch(system: System) -> Experience | Batch:
    """The batch of the train program."""
    if not system.supervised:
        return experience(system)
    batch = {name: x for name, x in labelled_batch(system).items() if name not in kto.COLUMNS["kl"]}
    if system.trainer == "distill":
        return batch | teacher_logprobs(system)
    like = batch["pair_mask" if "pair_mask" in batch else "row_mask"]
    number = jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=like.sharding)
    return batch | dict.fromkeys(NUMBERS.get(system.trainer, ()), number)


def ppo_state(system: System) -> PPOState:
    """The state as the update gets it: its optimizer moments where they wait, and without rollouts of other steps."""
    moments = {f"{name}_opt_state": system.waiting(f"{name}_optimizer") for name in ("actor", "critic")}
    return system.state.replace(**moments, pending=(), pending_episodes=(), replay=())


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
    system = system.sampled_by(system.sampler)
    key = _key(system.generate_mesh)
    static = {"module": system.modules["actor"], "sampling": sampling(system), "mesh": system.generate_mesh}
    return cast(Any, generate).lower(system.trees["actor"], prompt_batch(system), key, **static)


def _lower_reference(system: System) -> jax.stages.Lowered:
    steps = system.config.run.gradient_accumulation_steps
    static = {"module": system.modules["reference"], "mesh": system.mesh, "micro_batches": steps}
    static["logprobs"] = _scored(system)
    return cast(Any, score_batch).lower(system.read_params("reference"), labelled_batch(system), **static)


def _scored(system: System) -> Callable:
    """Returns the function that a supervised trainer calls on its frozen model."""
    if system.trainer == "distill":
        return distill.reader(1.0, system.teaching.teacher_top_k, system.modules["actor"].config.vocab_size)
    return kto.BOTH if system.trainer == "kto" else dpo.response_logprobs


def _lower_score(system: System) -> jax.stages.Lowered:
    if system.supervised:
        return _lower_reference(system)
    models = system.frozen.with_trained(system.state)
    frozen = {name: getattr(models, name) for name in ("reference", "reward") if name in system.on_host}
    waiting = {name: replace(model, params=system.waiting(name)) for name, model in frozen.items()}
    models = replace(models, **waiting)
    if not system.config.scores_policy:
        models = replace(models, actor=None)
    static = {"hyperparameters": system.state.hyperparameters, "mesh": system.mesh, "sampling": sampling(system)}
    return cast(Any, score_rollout).lower(rollout(system, system.rows), models, **static)


def _objective(trainer: str) -> Objective:
    """A supervised trainer's default loss."""
    if trainer == "dpo":
        return dpo.objective(dpo.Losses())[0]
    if trainer == "kto":
        return kto.objective(kto.Loss(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0))[0]
    if trainer == "distill":
        return distill.objective(distill.Divergence(beta=0.5, temperature=1.0))[0]
    return sft.OBJECTIVE if trainer == "sft" else reward.objective(reward.RewardLoss())[0]


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
