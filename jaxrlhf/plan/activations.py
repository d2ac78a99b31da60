"""Bytes of what the passes of a model make on one device: residuals of training, scores, and a layer's scratch.

A backward pass keeps the residuals that `jax.vjp` of the model names. Only the compiler's own scratch is a formula; its
factors were fitted to compilers' reports (benchmarks/plan_grid.py).
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxrlhf.kernels import gathered_blocks, logprob_blocks
from jaxrlhf.kernels.choice import LIBRARIES, decide
from jaxrlhf.models import Decoder, cast_matrices, join, param_shapes, split_trainable
from jaxrlhf.models.config import MLP_STACKS, SPARSE_STACK
from jaxrlhf.models.decoder import READ_ELEMENTS
from jaxrlhf.models.mixed import read_shapes
from jaxrlhf.plan.roofline import expert_elements, flat_shapes, itemsize
from jaxrlhf.plan.system import System
from jaxrlhf.rl import actor_logprobs, critic_values

PyTree = Any


DROPPING = ("sft", "reward", "distill")
"""Trainers with dropout."""


def attends_in_blocks(system: System, name: str, kernel: str = "flash_attention") -> bool:
    """True for a model whose attention keeps scores on the chip, as all kernels but XLA's do."""
    module = system.modules[name]
    c, asked = module.config, module.attention_implementation
    if system.trainer in DROPPING and c.attention_dropout:
        return False
    if asked != "auto":
        return asked != "xla" and (asked not in LIBRARIES or kernel == "flash_attention")
    facts = {"dtype": module.dtype, "head_dim": c.head_dim, "alibi": c.position == "alibi"}
    facts |= {"softcap": c.attention_softcap is not None, "device": system.device}
    return decide(kernel, "auto", **facts).implementation != "xla"


def local_module(module: Decoder, tensor: int) -> Decoder:
    """The model as one of `tensor` devices computes it: its share of heads and MLP."""
    c = module.config
    heads = c.num_heads // tensor
    shares = {"num_heads": heads, "num_kv_heads": math.gcd(heads, max(1, c.num_kv_heads // tensor))}
    shares |= {name: getattr(c, name) // tensor for name in ("intermediate_size", "expert_intermediate_size")}
    return module.clone(config=c.replace(**shares))


@dataclass(frozen=True)
class Pass:
    """A training pass over one micro-batch, as one device computes it."""

    rows: int
    """Rows of the device."""
    length: int
    """Columns of a row."""
    headed: int | None = None
    """Columns that the head runs on; None: all."""
    drops: bool = False
    """Dropout is active, so its masks are kept."""
    tensor: int = 1
    """Devices that share heads and MLP."""
    expert: int = 1
    """Devices that share the experts."""
    blocks: bool = False
    """Attention keeps its scores on the chip. All kernels of that kind keep the same arrays."""


@lru_cache(maxsize=256)
def _residuals(module: Decoder, over: Pass) -> int:
    """Bytes that a training pass keeps for its backward pass, without parameters and casts of them.

    Masks that are computed twice are kept once, as compilers do.
    """
    rows, length = over.rows, over.length
    params = param_shapes(module)
    trainable, frozen = split_trainable(params, module)
    frozen = jax.eval_shape(lambda tree: cast_matrices(tree, module.dtype), frozen)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((rows, length), bool)

    def kept(trainable: PyTree, frozen: PyTree, tokens: jax.Array, mask: jax.Array) -> PyTree:
        def forward(trainable: PyTree) -> PyTree:
            params = join(trainable, frozen)
            if over.drops:
                method, rngs = "logprobs" if module.head == "lm" else None, {"dropout": jax.random.key(0)}
                call = {"contiguous": True, "rngs": rngs, "method": method}
                return cast(Any, module.apply({"params": params}, tokens, mask, **call))
            if module.head == "scalar":
                return critic_values(module, params, tokens, mask)
            return actor_logprobs(module, params, tokens, mask, 1.0, mask, over.headed)[0]

        return jax.vjp(forward, trainable)[1]

    shapes = {x.shape for x in jax.tree.leaves(params)}
    parameter_shapes = shapes | {shape[1:] for shape in shapes} | read_shapes(module.config, params["layers"])
    counts = Counter((x.shape, x.dtype) for x in jax.tree.leaves(jax.eval_shape(kept, trainable, frozen, tokens, mask)))
    return sum(
        math.prod(shape) * dtype.itemsize * (1 if dtype == jnp.bool_ else count)
        for (shape, dtype), count in counts.items()
        if shape not in parameter_shapes
    )


def residual_bytes(module: Decoder, over: Pass) -> int:
    """Bytes that a device keeps of a training pass for the backward pass.

    Where devices share the experts, each has room for all choices of all their tokens. (As many experts on one device,
    each with its own tokens, take as much where every expert computes every token.)
    """
    local = local_module(module, over.tensor).clone(attention_implementation="pallas" if over.blocks else "xla")
    own = replace(over, tensor=1, expert=1, blocks=False)
    kept = _residuals(cast(Any, local), own)
    if over.expert > 1 and local.config.num_experts > 1 and local.expert_implementation == "ragged":
        own = replace(own, drops=False)
        few, more = (
            _residuals(cast(Any, local.clone(config=local.config.replace(experts_per_token=k))), own) for k in (1, 2)
        )
        kept += (over.expert - 1) * local.config.experts_per_token * (more - few)
    return kept


def score_bytes(module: Decoder, rows: int, queries: int, keys: int, tensor: int) -> int:
    """Bytes of one float32 array of attention scores `[B, H, T, S]` on a device: plain XLA attention holds several."""
    return 4 * rows * (module.config.num_heads // tensor) * queries * keys


def layer_weights(module: Decoder, tensor: int, expert: int = 1) -> int:
    """Bytes of one layer's weights in the compute dtype, gathered over all axes but `tensor`, experts but `expert`.

    Of a model with sparse and dense layers, those of the larger kind.
    """
    module = module.clone(lora=None)
    sizes = {name: 0 for name in MLP_STACKS}
    shared = 0
    for path, x in flat_shapes(module).items():
        if path[0] != "layers" or x.ndim < 3:
            continue
        elements = math.prod(x.shape[1:])
        if path[1] in sizes:
            sizes[path[1]] += elements
        else:
            shared += elements
    experts = expert_elements(module) // max(module.config.sparse_layers, 1)
    sizes[SPARSE_STACK] += experts // expert - experts
    return (shared + max(sizes.values())) * itemsize(module) // tensor


def mlp_width(module: Decoder, expert: int) -> int:
    """Hidden elements of the MLP per token of a device, before `tensor` splits them."""
    c = module.config
    if not c.num_experts:
        return c.intermediate_size
    dense = c.intermediate_size if c.dense_layers else 0
    if module.expert_implementation == "ragged":
        return max(dense, expert * c.experts_per_token * (c.expert_size + c.hidden_size))
    return max(dense, c.num_experts * c.expert_size)


@dataclass(frozen=True)
class Scratch:
    """A compiler's factors, fitted to what it reports."""

    forward_layers: int
    """Layers whose gathered weights are on the device at once, in a forward pass alone."""
    backward_layers: int
    """The same in training."""
    layout_copies: bool
    """Gradients of some stacked kernels are held in a second layout."""
    brings_all: bool
    """An update brings all moments from the host at once, instead of one array after the other."""
    hoisted_casts: bool
    """A forward pass alone casts all layers' weights before the first layer, where it gathers them."""


TPU_SCRATCH = Scratch(2, 5, False, True, False)
GPU_SCRATCH = Scratch(1, 1, True, False, True)


def scratch_of(platform: str) -> Scratch:
    """The factors of a platform's compiler."""
    return TPU_SCRATCH if platform == "tpu" else GPU_SCRATCH


def largest(*phases: dict[str, int]) -> dict[str, int]:
    """The phase whose items add up to most bytes."""
    return max(phases, key=lambda items: sum(items.values()))


def _head_scratch(system: System, name: str, rows: int, backward: bool, platform: str) -> dict[str, int]:
    """Blocks of token log-probs: of the logits and what is made of them, and of the head where it is gathered."""
    module = system.modules[name]
    c, tokens = module.config, rows * min(system.length, system.headed) // system.context
    if system.trainer == "distill":  # whole distributions, a few columns at a time
        elements = min(READ_ELEMENTS, tokens * c.vocab_size)
        return {"logits": (5 if backward else 3) * 4 * elements}
    vocab, gathered = c.padded_vocab_size // system.tensor, system.gathers(name)
    blocks = gathered_blocks(tokens, vocab) if gathered else logprob_blocks(tokens, vocab, platform)
    held = itemsize(module) + (4 if backward else 0)
    return {
        "logits": 3 * 4 * blocks.tokens * blocks.vocab,
        "gathered block of the head": held * blocks.vocab * c.embedding_size if gathered else 0,
    }


def pass_scratch(system: System, name: str, rows: int, backward: bool, platform: str) -> dict[str, int]:
    """Scratch of one layer's arithmetic besides the residuals, or of the head where that is more."""
    module = system.modules[name]
    scores = score_bytes(module, rows, system.length, system.length, system.tensor) // system.context
    scores = 0 if attends_in_blocks(system, name) else scores
    factors = scratch_of(platform)
    layers = factors.backward_layers if backward else factors.forward_layers
    layer = {
        "attention scores": int(((3 if backward else 1) + itemsize(module) / 8) * scores),
        "gathered layer weights": layers * layer_weights(module, system.tensor, system.expert)
        if system.gathers(name)
        else 0,
    }
    head = _head_scratch(system, name, rows, backward, platform) if module.head == "lm" else {}
    return largest(layer, head)
