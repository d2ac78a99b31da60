"""The losses of routers: transformers' formula, its gradients, independence of micro-batches, all trainers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import fused_experts, relative_error, tensors_of
from lab import few

from jaxrlhf import objectives
from jaxrlhf.errors import InputError
from jaxrlhf.models import config_from_dict, load_pretrained, save_pretrained
from jaxrlhf.models.moe import router_sums
from jaxrlhf.rl import PPOHyperparameters, ppo_step
from jaxrlhf.trainers import reward
from jaxrlhf.trainers.dpo import Losses, objective
from jaxrlhf.trainers.gradients import model_gradients
from jaxrlhf.trainers.routers import RouterOptions
from jaxrlhf.trainers.sft import OBJECTIVE
from jaxrlhf.trainers.supervised import init_state, train_step

METRICS = {"moe/load_balancing_loss", "moe/z_loss", "moe/expert_share_max", "moe/expert_share_min"}


def batch_of(rows=8, columns=9, vocab=101):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, vocab, (rows, columns))
    mask = (np.arange(columns) < rng.integers(3, columns + 1, (rows, 1))).astype(np.int32)
    loss_mask = mask * (np.arange(columns) >= 1)
    arrays = {"input_ids": ids, "attention_mask": mask, "loss_mask": loss_mask, "row_mask": np.ones(rows, int)}
    return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}


def pairs_of(rows=8):
    batch = batch_of(2 * rows)
    sides = {"chosen": slice(None, rows), "rejected": slice(rows, None)}
    names = {"ids": "input_ids", "mask": "attention_mask", "loss_mask": "loss_mask"}
    pairs = {f"{side}_{name}": batch[old][part] for side, part in sides.items() for name, old in names.items()}
    return pairs | {"row_mask": batch["row_mask"][:rows]} | {f"ref_{side}_logps": jnp.zeros(rows) for side in sides}


def test_the_load_balancing_loss_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rng = np.random.default_rng(0)
    layers, rows, columns, experts, k = 3, 4, 5, 6, 2
    logits = rng.normal(size=(layers, rows, columns, experts)).astype(np.float32)
    mask = rng.integers(0, 2, (rows, columns))
    flat = tuple(torch.tensor(x.reshape(-1, experts)) for x in logits)
    expected = load_balancing_loss_func(flat, experts, k, torch.tensor(mask)).item()
    sums = [router_sums(jnp.asarray(x), jax.lax.top_k(x, k)[1], mask) for x in logits]
    total = jax.tree.map(lambda *parts: sum(parts), *sums)
    assert total.tokens == layers * mask.sum() and total.counts.sum() == k * total.tokens
    got = objectives.load_balancing_loss(total.counts, total.probabilities, total.tokens)
    assert float(got) == pytest.approx(expected, rel=1e-6)
    real = np.broadcast_to(mask[None], logits.shape[:3]).astype(bool)
    z = np.square(np.log(np.exp(np.float64(logits)).sum(-1)))[real].mean()
    assert float(objectives.router_z_loss(total.squared_log_z, total.tokens)) == pytest.approx(z, rel=1e-6)


def test_equally_busy_experts_have_the_smallest_loss():
    even = objectives.load_balancing_loss(jnp.full(4, 5.0), jnp.full(4, 2.5), 10)
    uneven = objectives.load_balancing_loss(jnp.array([10.0, 10, 0, 0]), jnp.array([5.0, 5, 0, 0]), 10)
    assert (float(even), float(uneven)) == (2.0, 4.0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_gradients_with_the_loss_equal_transformers(family, lab, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    options = lab.MIXTRAL | {"router_aux_loss_coef": 0.7}
    if family == "qwen3_moe":
        options = lab.LLAMA | {"model_type": family, "num_experts": 4, "num_experts_per_tok": 2}
        options |= {"moe_intermediate_size": 16, "router_aux_loss_coef": 0.7, "head_dim": 4}
    model = lab.tiny_model(options)
    save_pretrained(model, tmp_path)
    model = load_pretrained(tmp_path)
    batch = batch_of()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids, mask, loss_mask = (torch.tensor(np.array(batch[n])) for n in ("input_ids", "attention_mask", "loss_mask"))
    labels = torch.where(loss_mask > 0, ids, -100).long()
    output = theirs(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True, use_cache=False)
    output.loss.backward()
    count = OBJECTIVE.count(batch)

    def loss(module, params, rows, key):
        return OBJECTIVE.loss(module, params, rows, count, key)

    run = jax.jit(lambda params: model_gradients(loss, model.module, params, batch, 1, None))
    value, _, grads, metrics = run(model.params)
    assert float(metrics["moe/load_balancing_loss"]) == pytest.approx(output.aux_loss.item(), rel=1e-5)
    assert float(value + 0.7 * metrics["moe/load_balancing_loss"]) == pytest.approx(output.loss.item(), rel=1e-5)
    save_pretrained(model.replace(params=grads), tmp_path / "grads")
    ours = fused_experts(tensors_of(tmp_path / "grads"))
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert ours.keys() == expected.keys()
    largest = max(np.abs(g).max() for g in expected.values())
    errors = {name: relative_error(ours[name], expected[name], floor=1e-3 * largest) for name in ours}
    assert max(errors.values()) < 2e-5, errors
    router = relative_error(ours["model.layers.0.mlp.gate.weight"], expected["model.layers.0.mlp.gate.weight"])
    assert router < 2e-5


def cases(lab):
    return {
        "sft": (OBJECTIVE, "lm", batch_of()),
        "reward": (reward.objective(reward.RewardLoss())[0], "scalar", pairs_of()),
        "dpo": (objective(Losses())[0], "lm", pairs_of()),
    }


@pytest.mark.parametrize("kind", few(["sft", "reward", "dpo"], ["dpo"]))
def test_micro_batches_and_meshes_change_neither_losses_nor_steps(kind, lab):
    chosen, head, batch = cases(lab)[kind]
    routers = RouterOptions(router_aux_loss_coef=0.5, router_z_loss_coef=0.3)

    def step(parts, routers=routers, **mesh):
        mesh = lab.mesh_of(**mesh)
        state = init_state(lab.tiny_model(lab.MIXTRAL, head=head, mesh=mesh), lab.sgd, mesh)
        options = {"objective": chosen, "micro_batches": parts, "routers": routers}
        state, metrics = train_step(state, batch, jax.random.key(0), **options)
        return jax.device_get((metrics, state.params))

    metrics, params = step(1)
    assert metrics.keys() >= METRICS
    assert 0 <= metrics["moe/expert_share_min"] < 0.25 < metrics["moe/expert_share_max"] <= 0.5
    for other in (step(4), step(2, expert=2, fsdp=2)):
        for name, value in metrics.items():
            np.testing.assert_allclose(other[0][name], value, rtol=2e-5, atol=1e-6, err_msg=name)
        for a, b in zip(*map(jax.tree.leaves, (other[1], params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    plain = step(1, RouterOptions(router_aux_loss_coef=0.0))
    assert (
        np.abs(plain[1]["layers"]["mlp"]["router"]["kernel"] - params["layers"]["mlp"]["router"]["kernel"]).max() > 1e-3
    )
    np.testing.assert_allclose(plain[0]["loss"], metrics["loss"], rtol=1e-6)


def test_steps_with_the_loss_make_experts_equally_busy(lab):
    mesh = lab.mesh_of()
    state = init_state(lab.tiny_model(lab.MIXTRAL, mesh=mesh), lab.sgd, mesh)
    routers, balance = RouterOptions(router_aux_loss_coef=2.0), []
    for _ in range(20):
        options = {"objective": OBJECTIVE, "micro_batches": 1, "routers": routers}
        state, metrics = train_step(state, batch_of(), jax.random.key(0), **options)
        balance.append(float(metrics["moe/load_balancing_loss"]))
    assert balance[-1] < 0.85 * balance[0]


def test_ppo_has_the_losses_of_actor_and_critic(lab):
    setup = lab.Setup(lab.mesh_of(), options=lab.MIXTRAL)
    experience = setup.experience(setup.rollout(lab.sampling))

    def run(routers, **options):
        state = setup.state(lab.sgd, PPOHyperparameters(**options)).replace(routers=routers)
        state, metrics = ppo_step(state, experience)
        return jax.device_get((metrics, state.actor_params, state.critic_params))

    routers = RouterOptions(router_aux_loss_coef=0.5, router_z_loss_coef=0.3)
    metrics, actor, critic = run(routers)
    assert metrics.keys() >= METRICS | {f"val/{name}" for name in METRICS}
    other = run(routers, micro_batches=4)
    for name in METRICS | {f"val/{name}" for name in METRICS}:
        np.testing.assert_allclose(other[0][name], metrics[name], rtol=1e-5, err_msg=name)
    for a, b in zip(*map(jax.tree.leaves, (other[1:], (actor, critic))), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    plain = run(RouterOptions(router_aux_loss_coef=0.0))
    for a, b in ((plain[1], actor), (plain[2], critic)):
        assert np.abs(a["layers"]["mlp"]["router"]["kernel"] - b["layers"]["mlp"]["router"]["kernel"]).max() > 1e-3


def test_a_model_without_experts_has_no_such_losses(lab):
    mesh = lab.mesh_of()
    state = init_state(lab.tiny_model(mesh=mesh), lab.sgd, mesh)
    _, metrics = train_step(state, batch_of(), jax.random.key(0), objective=OBJECTIVE, micro_batches=1)
    assert not any(name.startswith("moe/") for name in metrics)
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        with pytest.raises(InputError, match=f"{name}=0.1: llama has no experts; leave it out"):
            RouterOptions(**{name: 0.1}).check_models(config_from_dict(lab.LLAMA))
    RouterOptions(router_aux_loss_coef=0.1).check_models(config_from_dict(lab.LLAMA), config_from_dict(lab.MIXTRAL))


def test_the_default_weight_is_the_models_own(lab):
    config = config_from_dict(lab.MIXTRAL | {"router_aux_loss_coef": 0.02})
    assert RouterOptions().coefficients(config) == (0.02, 0.0)
    assert RouterOptions(router_aux_loss_coef=0.0, router_z_loss_coef=0.1).coefficients(config) == (0.0, 0.1)
