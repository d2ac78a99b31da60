"""Programs of a step, compiled at the same time before the first batch is there."""

from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.engine import Rollout
from jaxrlhf.rl.experience import Experience, score_rollout
from jaxrlhf.rl.sampler import Sampler
from jaxrlhf.rl.step import PPOState, ppo_step
from jaxrlhf.sharding import GENERATE_RULES, abstract, batch_sharding
from jaxrlhf.trainers.guards import Limits
from jaxrlhf.trainers.programs import Announce
from jaxrlhf.trainers.settings import batch_devices


def compile_ahead(
    sampler: Sampler,
    train: Announce,
    state: PPOState,
    prompt_length: int,
    ptx: dict[str, jax.Array] | None,
    limits: Limits | None,
) -> list[Future[object]]:
    """Begins to compile the generate, scoring and train programs, each in a thread of its own.

    Arguments are those of `PPOTrainer.prepare`. The arrays of a rollout and of its experience are described as the
    programs return them on one device. Where they come out otherwise, the step compiles again.
    """
    engine, config = sampler.engine, sampler.config
    if engine.mesh.size > 1 or config.rollout.generation_devices or sampler.runner is not None:
        return []
    rows = config.rollout_rows(batch_devices(engine.mesh))
    prompts = rows // config.sampling.samples_per_prompt, prompt_length
    state = abstract(state.replace(pending=(), pending_episodes=(), replay=()))
    key, slots = sampler.rollout_plan(0).key, config.generation.generation_slots
    begun: list[Future[object]] = []
    if config.rollout.generation_batches == 1:  # the widths of pieces follow from the prompts

        def generate() -> None:
            engine.actor.compile(prompts, key, sampler.sampling, params=state.actor_params, slots=slots)

        ids = jax.ShapeDtypeStruct(prompts, jnp.int32)
        begun.append(sampler.generate_program.compile_ahead(generate, (ids, ids, key, sampler.sampling)))

    rollout = _rollout(sampler, rows, prompt_length)
    models = engine.models(state)
    models = models if config.scores_policy else models.replace(actor=None)
    of_score = {"hyperparameters": state.hyperparameters, "mesh": engine.mesh, "sampling": sampler.sampling}
    scored: Future[Experience] = Future()

    def score() -> None:
        try:
            traced = score_rollout.trace(rollout, models, **of_score)
            scored.set_result(_on_device(traced.out_info, sampler))
        except BaseException as error:
            scored.set_exception(error)
            raise
        traced.lower().compile()

    def update() -> None:
        ppo_step.lower(state, scored.result(), ptx, limits, engine.rates).compile()

    return [*begun, sampler.score_program.compile_ahead(score, (rollout, models)), train.compile_ahead(update)]


def _on_device(experience: Experience, sampler: Sampler) -> Experience:
    """The experience of a step, with the shapes of a traced one."""
    mesh = sampler.engine.mesh
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh, x.shape)), experience
    )


def _rollout(sampler: Sampler, rows: int, prompt_length: int) -> Rollout:
    """The rollout of a step, as the generate program returns it."""
    shape = rows, prompt_length + sampler.sampling.max_new_tokens
    sharding = batch_sharding(sampler.engine.actor.generate_mesh, shape, GENERATE_RULES)
    kinds = (jnp.int32, bool, bool, jnp.float32)
    arrays: Any = (jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for kind in kinds)
    return Rollout(*arrays, prompt_length=prompt_length)
