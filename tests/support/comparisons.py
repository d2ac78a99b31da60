"""Comparisons that several test files make: rollouts, files of models, relative errors."""

import re

import jax
import numpy as np

from jaxrlhf.models import param_shardings
from jaxrlhf.models.hf.checkpoint_files import open_checkpoint
from jaxrlhf.models.moe import ROUTER_SUMS
from jaxrlhf.sharding import TRAIN_RULES, place, use


def assert_same_rollout(got, expected):
    """Equal tokens and masks, and log-probs to 1e-4."""
    for name in ("tokens", "mask", "response_mask"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    np.testing.assert_allclose(got.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def tensors_of(folder):
    """{name: array} of a model folder's files."""
    source = open_checkpoint(folder)
    return {name: source.read(name) for name in source.shapes}


def relative_error(got, expected, floor=0.0):
    """Largest absolute difference over the largest expected value, or over `floor` where that is larger."""
    assert got.shape == expected.shape
    return np.abs(got - expected).max() / max(np.abs(expected).max(), floor)


def fused_experts(tensors):
    """Tensors in files by their names in transformers' modules, which hold the experts of a layer in one."""
    stacks, fused = {}, {}
    for name, x in tensors.items():
        found = re.fullmatch(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight", name)
        if found:
            stacks.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = x
        else:
            fused[name.replace("block_sparse_moe", "mlp")] = x
    for layer, kinds in stacks.items():
        kinds = {kind: np.stack([part[e] for e in sorted(part)]) for kind, part in kinds.items()}
        gate, up, down = (
            kinds.get(a, kinds.get(b)) for a, b in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
        )
        fused[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"{layer}.mlp.experts.down_proj"] = down
    return fused


def routed_outputs(model, mesh, ids, mask, implementation="dense"):
    """Logits, sums of the routers and gradients of a loss, on a mesh."""
    module = model.module.clone(expert_implementation=implementation)

    def loss(params):
        with use(mesh, TRAIN_RULES):
            logits, state = module.apply({"params": params}, ids, mask, mutable=[ROUTER_SUMS])
            return (jax.nn.log_softmax(logits)[..., 7] * mask).sum(), (logits, state[ROUTER_SUMS]["layers"])

    params = model.params if mesh is None else place(model.params, param_shardings(module, mesh))
    (_, (logits, sums)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return jax.device_get((logits, jax.tree.leaves(sums), grads))
