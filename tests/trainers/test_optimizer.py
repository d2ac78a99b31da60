"""The optimizer against torch.optim.AdamW, clip_grad_norm_ and the schedules of transformers, over several steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.trainers.optimizer import (
    OptimizerConfig,
    decay_mask,
    make_optimizer,
    make_rates,
    make_schedule,
    with_rates,
)

STEPS = 12


def parameters(rng):
    """A tree with the names and stacked shapes of a model of two layers."""
    tree = {
        "embed": {"embedding": (11, 4)},
        "layers": {"attention": {"query": {"kernel": (2, 4, 4), "bias": (2, 4)}}, "norm": {"scale": (2, 4)}},
        "final_norm": {"scale": (4,), "bias": (4,)},
    }
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def gradients_of_step(rng, params, step):
    """Some steps far above, some far below a norm of 1, so that clipping is on in some and off in others."""
    scale = 0.01 if step % 3 == 0 else 3.0
    return jax.tree.map(lambda p: (scale * rng.normal(size=p.shape)).astype(np.float32), params)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_grad_norm": 0.0, "weight_decay": 0.0},
        {"lr_scheduler_type": "linear", "warmup_steps": 3},
        {"lr_scheduler_type": "constant", "warmup_ratio": 0.3},
    ],
)
def test_updates_equal_torch_adamw_with_clipping_and_scheduler(changes):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    config = OptimizerConfig(learning_rate=0.05, weight_decay=0.1).replace(**changes)
    rng = np.random.default_rng(0)
    params = parameters(rng)
    leaves, structure = jax.tree.flatten(params)
    theirs = [torch.nn.Parameter(torch.tensor(leaf, dtype=torch.float64)) for leaf in leaves]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    decayed = [p for p, name in zip(theirs, names, strict=True) if "kernel" in name or "embedding" in name]
    undecayed = [p for p, name in zip(theirs, names, strict=True) if "bias" in name or "scale" in name]
    assert len(decayed) == 2 and len(undecayed) == 4
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    schedule_name = config.lr_scheduler_type
    warmup = 3 if config.warmup_steps else 4 if config.warmup_ratio else 0
    if schedule_name == "constant" and warmup:
        schedule_name = "constant_with_warmup"
    scheduler = get_scheduler(schedule_name, adamw, num_warmup_steps=warmup, num_training_steps=STEPS)

    optimizer = make_optimizer(config, STEPS, params)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        gradients = gradients_of_step(rng, params, step)
        for p, g in zip(theirs, jax.tree.leaves(gradients), strict=True):
            p.grad = torch.tensor(g, dtype=torch.float64)
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(theirs, config.max_grad_norm)
        adamw.step()
        scheduler.step()
        updates, state = update(gradients, state, params)
        before, params = params, optax.apply_updates(params, updates)
        if warmup and step == 0:
            jax.tree.map(np.testing.assert_array_equal, before, params)
        expected = jax.tree.unflatten(structure, [p.detach().numpy() for p in theirs])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), params, expected)


@pytest.mark.parametrize(("kind", "floor"), [("linear", 0.0), ("cosine", 0.0), ("cosine", 0.1), ("constant", 0.0)])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedule_equals_transformers_at_every_step(kind, warmup, floor):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    total, peak = 50, 3e-4
    name, extra = kind, {}
    if kind == "constant" and warmup:
        name = "constant_with_warmup"
    if floor:
        name, extra = "cosine_with_min_lr", {"scheduler_specific_kwargs": {"min_lr_rate": floor}}
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(name, sgd, num_warmup_steps=warmup, num_training_steps=total, **extra)
    theirs = []
    for _ in range(total + 1):
        theirs.append(scheduler.get_last_lr()[0])
        sgd.step()
        scheduler.step()
    config = OptimizerConfig(learning_rate=peak, lr_scheduler_type=kind, warmup_steps=warmup, min_lr_ratio=floor)
    schedule = make_schedule(config, total)
    np.testing.assert_allclose([schedule(step) for step in range(total + 1)], theirs, rtol=1e-6, atol=1e-7 * peak)


def test_schedule_values_by_hand():
    linear = make_schedule(OptimizerConfig(learning_rate=1.0, lr_scheduler_type="linear", warmup_ratio=0.15), 10)
    np.testing.assert_allclose([linear(s) for s in (0, 1, 2, 6, 10, 99)], [0, 0.5, 1, 0.5, 0, 0], rtol=1e-6)
    floored = make_schedule(OptimizerConfig(learning_rate=2.0, lr_scheduler_type="linear", min_lr_ratio=0.25), 4)
    np.testing.assert_allclose([floored(s) for s in (0, 2, 4, 9)], [2, 1.25, 0.5, 0.5], rtol=1e-6)
    cosine = make_schedule(OptimizerConfig(learning_rate=1.0, min_lr_ratio=0.2), 4)
    np.testing.assert_allclose([cosine(s) for s in (0, 2, 4, 9)], [1, 0.6, 0.2, 0.2], rtol=1e-6)
    constant = make_schedule(OptimizerConfig(learning_rate=1.0, lr_scheduler_type="constant", warmup_steps=2), 4)
    np.testing.assert_allclose([constant(s) for s in (0, 1, 2, 9)], [0, 0.5, 1, 1], rtol=1e-6)
    steps_win = OptimizerConfig(learning_rate=1.0, lr_scheduler_type="constant", warmup_steps=2, warmup_ratio=1.0)
    assert make_schedule(steps_win, 100)(2) == 1


def test_decay_goes_by_leaf_name_not_by_rank():
    params = parameters(np.random.default_rng(0))
    assert params["layers"]["norm"]["scale"].ndim == 2
    assert decay_mask(params) == {
        "embed": {"embedding": True},
        "layers": {"attention": {"query": {"kernel": True, "bias": False}}, "norm": {"scale": False}},
        "final_norm": {"scale": False, "bias": False},
    }
    with pytest.raises(ValueError, match="layers/gate"):
        decay_mask({"layers": {"gate": np.zeros(2)}})


def test_moments_and_updates_are_float32_for_half_precision_parameters():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), parameters(np.random.default_rng(0)))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, weight_decay=0.1), STEPS, params)
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    floats = [x for x in jax.tree.leaves((updates, state)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) == 3 * len(jax.tree.leaves(params))
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}


def test_state_structure_does_not_depend_on_hyper_parameters():
    params = parameters(np.random.default_rng(0))
    plain = OptimizerConfig()
    other = OptimizerConfig(weight_decay=0.1, max_grad_norm=0.0, lr_scheduler_type="constant", warmup_steps=3)
    structures = [jax.tree.structure(make_optimizer(c, STEPS, params).init(params)) for c in (plain, other)]
    assert structures[0] == structures[1]


def test_a_schedule_whose_numbers_are_arguments_is_no_part_of_the_program():
    params = parameters(np.random.default_rng(0))
    gradients = gradients_of_step(np.random.default_rng(1), params, 0)
    programs = set()
    for options, total in (({"learning_rate": 1e-3, "warmup_ratio": 0.2}, 20), ({"min_lr_ratio": 0.1}, 50)):
        config = OptimizerConfig(**options)
        optimizer, rates = make_optimizer(config, total, params), make_rates(config, total)
        state = optimizer.init(params)
        _, state = optimizer.update(gradients, state, params)

        def update(rates, optimizer=optimizer, state=state):
            return with_rates(optimizer, rates).update(gradients, state, params)

        jax.tree.map(np.testing.assert_array_equal, update(rates), optimizer.update(gradients, state, params))
        with pytest.raises(AssertionError):
            jax.tree.map(np.testing.assert_array_equal, update(rates._replace(peak=1.0)), update(rates))
        programs.add(jax.jit(update).lower(rates).as_text())
    assert len(programs) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("weight_decay", -0.1),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("adam_epsilon", 0.0),
        ("max_grad_norm", -1.0),
        ("lr_scheduler_type", "polynomial"),
        ("warmup_steps", -1),
        ("warmup_ratio", 1.5),
        ("min_lr_ratio", 2.0),
    ],
)
def test_invalid_values_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"{name}={value!r}"):
        OptimizerConfig(**{name: value})


def test_a_run_without_steps_is_refused():
    with pytest.raises(InputError, match="total_steps=0"):
        make_schedule(OptimizerConfig(), 0)
