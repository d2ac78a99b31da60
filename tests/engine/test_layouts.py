"""One PPO iteration is the same on every mesh, decode group and ZeRO stage, offloaded or not, dense or sparse."""

import itertools
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest
from lab import few

from jaxrlhf.rl import ppo_step
from jaxrlhf.trainers.optimizer import OptimizerConfig, make_optimizer


class Layout(NamedTuple):
    mesh: tuple[int, int, int]
    tensor_parallel: int
    stages: tuple[int, int, int, int] = (3, 3, 3, 3)
    offload: bool = False
    expert: int = 1
    context: int = 1


ONE = Layout((1, 1, 1), 1)
# Every mesh shape, group size and stage at least once; 3, 5 and 6 divide neither rows nor widths evenly.
LAYOUTS = [
    Layout((1, 8, 1), 8),
    Layout((2, 2, 2), 4, (0, 1, 2, 3)),
    Layout((1, 4, 2), 4, (2, 2, 0, 0), offload=True),
    Layout((2, 4, 1), 2, (1, 0, 3, 0)),
    Layout((8, 1, 1), 1, (0, 0, 0, 0)),
    Layout((1, 1, 8), 8, (2, 1, 0, 3)),
    Layout((1, 8, 1), 1, (2, 3, 3, 3), offload=True),
    Layout((1, 3, 1), 1),
    Layout((1, 6, 1), 2, (1, 1, 3, 3)),
    Layout((5, 1, 1), 1, (3, 2, 0, 0)),
    Layout((1, 2, 2), 4, (3, 1, 2, 0), context=2),
]

EXPERT_LAYOUTS = [
    Layout((1, 1, 1), 1, expert=4),
    Layout((1, 4, 1), 2, (3, 1, 3, 0), expert=2),
    Layout((2, 1, 2), 2, (2, 3, 0, 0), offload=True, expert=2),
    Layout((1, 2, 1), 1, (0, 2, 0, 3), expert=4),
    Layout((1, 2, 2), 4, expert=2),
    Layout((1, 1, 1), 1, expert=2, context=4),
    Layout((1, 8, 1), 8),
]


def full_matrix() -> list[Layout]:
    """Every mesh of 8 devices × every legal decode group × every stage (the same for all models)."""
    meshes = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
    groups = {mesh: [mesh[2] * part for part in (1, 2, 4, 8) if mesh[1] % part == 0] for mesh in meshes}
    return [
        Layout(mesh, group, (stage,) * 4)
        for mesh, stage in itertools.product(meshes, (0, 1, 2, 3))
        for group in groups[mesh]
    ]


def pytest_generate_tests(metafunc):
    if "expert_layout" in metafunc.fixturenames:
        metafunc.parametrize("expert_layout", few(EXPERT_LAYOUTS, EXPERT_LAYOUTS[1:3]), ids=str)
    if "layout" in metafunc.fixturenames:
        layouts = full_matrix() if metafunc.config.getoption("full_matrix") else few(LAYOUTS, LAYOUTS[:4])
        metafunc.parametrize("layout", layouts, ids=str)


def make_adam(lab, options):
    """Adam whose epsilon keeps the rounding of tiny gradients from being blown up by its first, sign-like step."""
    config = OptimizerConfig(learning_rate=1e-2, adam_epsilon=1e-3, lr_scheduler_type="constant", weight_decay=0.1)
    return {head: make_optimizer(config, 10, lab.tiny_model(options, head=head).params) for head in ("lm", "scalar")}


@pytest.fixture(scope="module")
def adam(lab):
    return make_adam(lab, lab.LLAMA)


@pytest.fixture(scope="module")
def adam_of_experts(lab):
    return make_adam(lab, lab.MIXTRAL)


def iterate(lab, adam, layout: Layout, **options):
    """Sampled rollout, metrics and new parameters of one PPO iteration; shardings before and after; what was freed."""
    mesh = lab.mesh_of(*layout.mesh, layout.expert, layout.context)
    models = lab.Setup(mesh, layout.tensor_parallel, layout.stages, layout.offload, **options)
    rollout = models.rollout(lab.sampling)
    experience = models.experience(rollout)
    state = models.state(adam["lm"], critic_optimizer=adam["scalar"])
    before = jax.tree.map(lambda x: x.sharding, state)
    old = state
    state, metrics = ppo_step(state, experience)
    jax.block_until_ready(state)
    deleted = [x.is_deleted() for x in jax.tree.leaves((old.actor_params, old.critic_params, old.actor_opt_state))]
    after = jax.tree.map(lambda x: x.sharding, state)
    return jax.device_get((rollout, experience, metrics, state)), before, after, deleted


@pytest.fixture(scope="module")
def on_one_device(lab, adam):
    return iterate(lab, adam, ONE)[0]


@pytest.fixture(scope="module")
def experts_on_one_device(lab, adam_of_experts):
    return iterate(lab, adam_of_experts, ONE, options=lab.MIXTRAL)[0]


@pytest.fixture(autouse=True)
def release_programs_of_many_layouts(request):
    yield
    if request.config.getoption("full_matrix"):
        jax.clear_caches()


def axes_of(sharding) -> set[str]:
    return {axis for entry in sharding.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())}


def assert_same_iteration(got, expected):
    (rollout, experience, metrics, state), before, after, deleted = got
    np.testing.assert_array_equal(rollout.tokens, expected[0].tokens)
    np.testing.assert_array_equal(rollout.mask, expected[0].mask)
    chex.assert_trees_all_close(experience, expected[1], rtol=0, atol=3e-5)
    chex.assert_trees_all_close(metrics, expected[2], rtol=2e-5, atol=2e-5)
    for one in (metrics, expected[2]):
        assert (one["val/ratio"], one["val/ratio_var"], one["policy/approxkl_avg"]) == (1, 0, 0)
    for name in ("actor_params", "critic_params", "ema_params"):
        chex.assert_trees_all_close(getattr(state, name), getattr(expected[3], name), rtol=0, atol=1e-5)
    for x, one, other in zip(*map(jax.tree.leaves, (state, before, after)), strict=True):
        if x.ndim:
            assert one.is_equivalent_to(other, x.ndim), f"{x.shape}: {one} became {other}"
            assert one.memory_kind == other.memory_kind
    assert all(deleted)


def test_one_iteration_is_the_same_in_every_layout(layout, lab, adam, on_one_device):
    got = iterate(lab, adam, layout)
    assert_same_iteration(got, on_one_device)
    state, after = got[0][3], got[2]
    sizes = dict(zip(("fsdp", "tensor"), layout.mesh[1:], strict=True)) | {"context": layout.context}
    big = {name for name, size in sizes.items() if size in (2, 4, 8)}
    for params, stage in ((after.actor_params, layout.stages[0]), (after.critic_params, layout.stages[1])):
        assert axes_of(params["layers"]["mlp"]["up"]["kernel"]) == (big if stage else big & {"tensor"})
    moments = [
        s for s, x in zip(*map(jax.tree.leaves, (after.actor_opt_state, state.actor_opt_state)), strict=True) if x.ndim
    ]
    assert {s.memory_kind for s in moments} == {"pinned_host" if layout.offload else "device"}


def test_one_iteration_with_experts_is_the_same_in_every_layout(
    expert_layout, lab, adam_of_experts, experts_on_one_device
):
    got = iterate(lab, adam_of_experts, expert_layout, options=lab.MIXTRAL)
    assert_same_iteration(got, experts_on_one_device)
    for params in (got[2].actor_params, got[2].critic_params):
        assert ("expert" in axes_of(params["layers"]["mlp"]["up"]["kernel"])) == (expert_layout.expert > 1)


def test_parameters_move_far_more_than_layouts_differ(setup, on_one_device):
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), on_one_device[3].actor_params, setup.actor.params)
    assert np.median(jax.tree.leaves(moved)) > 1e-3
