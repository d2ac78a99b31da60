"""Sparse mixture of experts: a router picks a few gated MLPs for each token. No token is ever dropped.

Experts are stacked parameters `[E, …]`. Their matrix products run on tokens that are sorted by expert
(`jax.lax.ragged_dot`), or on all tokens for every expert ("dense") where a platform has no efficient form of that.

On a mesh, the axis `expert` splits the experts and, like `data` and `fsdp`, the rows of the batch. Each device gathers
the tokens of its peers on that axis, computes the share of its own experts in them, and the shares are summed and
scattered back. So shapes are static, whatever the routers choose, at the price of a buffer that could hold every token
of the peers. Source: Shazeer et al. 2017 (arXiv 1701.06538); Jiang et al. 2024 (arXiv 2401.04088), section 2.1.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrlhf.models.activations import ACTIVATION_FUNCTIONS, Activation
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.sharding import constrain, current_rules, mesh_axes, platform, resolve_spec

ROUTER_SUMS = "router_sums"
"""The flax collection that routers write their `RouterSums` to, where the caller of `apply` makes it mutable."""
EXPERT_IMPLEMENTATIONS = ("auto", "ragged", "dense")
_AXES = {"up": ("expert", "embed", "mlp"), "gate": ("expert", "embed", "mlp"), "down": ("expert", "mlp", "embed")}


class RouterSums(flax.struct.PyTreeNode):
    """Sums over the real tokens of a batch, and with leading axes per layer; all float32."""

    counts: jax.Array
    """`[E]`: tokens that chose each expert; they add up to `experts_per_token · tokens`."""
    probabilities: jax.Array
    """`[E]`: the routers' probabilities."""
    squared_log_z: jax.Array
    """Squares of the logarithm of the softmax's denominator."""
    tokens: jax.Array
    """Real tokens, each counted once per layer."""


class Routing(NamedTuple):
    """The choice of a router."""

    weights: jax.Array
    """float32 `[…, k]`."""
    experts: jax.Array
    """int32 `[…, k]`."""


def route(logits: jax.Array, experts_per_token: int, normalize: bool) -> Routing:
    """Picks the experts of each token by float32 router logits `[…, E]`.

    A token's weights are the probabilities of its experts, divided by their sum if `normalize`.
    """
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits), experts_per_token)
    return Routing(weights / weights.sum(-1, keepdims=True) if normalize else weights, experts)


def router_sums(logits: jax.Array, experts: jax.Array, real: jax.Array) -> RouterSums:
    """Sums of one layer.

    Args:
        logits: float32 `[B, T, E]`.
        experts: int `[B, T, k]`.
        real: `[B, T]`, set for real tokens.
    """
    real = real.astype(jnp.float32)
    chosen = jax.nn.one_hot(experts, logits.shape[-1], dtype=jnp.float32).sum(-2)
    total = partial(jnp.einsum, "bt,bte->e", precision=jax.lax.Precision.HIGHEST)
    return RouterSums(
        counts=total(real, chosen),
        probabilities=total(real, jax.nn.softmax(logits)),
        squared_log_z=jnp.sum(real * jnp.square(jax.nn.logsumexp(logits, axis=-1))),
        tokens=real.sum(),
    )


class Experts(NamedTuple):
    """Kernels of gated MLPs, or their gradients: `up` and `gate` `[E, D, F]`, `down` `[E, F, D]`."""

    up: jax.Array
    gate: jax.Array
    down: jax.Array


def dense_experts(x: jax.Array, routing: Routing, kernels: Experts, activation: Activation) -> jax.Array:
    """Computes every expert for every token `x` `[N, D]`: the weighted sum of the chosen ones, float32 `[N, D]`.

    Numbers in `routing` outside 0 … E-1 mean experts of other devices, which add nothing.
    """
    chosen = jax.nn.one_hot(routing.experts, kernels.up.shape[0], dtype=jnp.float32)
    weights = jnp.einsum("nk,nke->en", routing.weights, chosen)[..., None]
    hidden = activation(jnp.einsum("nd,edf->enf", x, kernels.gate)) * jnp.einsum("nd,edf->enf", x, kernels.up)
    hidden = (hidden.astype(jnp.float32) * weights).astype(x.dtype)
    return jnp.einsum("enf,efd->nd", hidden, kernels.down, preferred_element_type=jnp.float32)


def ragged_experts(x: jax.Array, routing: Routing, kernels: Experts, activation: Activation) -> jax.Array:
    """`dense_experts` on tokens sorted by expert, so that each expert computes its own tokens only.

    Choices of other devices' experts come last, beyond all groups. What `ragged_dot` leaves there is undefined, so they
    are masked on the way in, for the gradients, and on the way out.
    """
    tokens, k = routing.experts.shape
    count = kernels.up.shape[0]
    chosen = routing.experts.reshape(-1)
    ours = (chosen >= 0) & (chosen < count)
    order = jnp.argsort(jnp.where(ours, chosen, count), stable=True)
    sizes = jnp.sum(jax.nn.one_hot(chosen, count, dtype=jnp.int32), axis=0)
    sorted_ours = ours[order][:, None]
    rows = jnp.where(sorted_ours, x[order // k], 0)
    hidden = activation(jax.lax.ragged_dot(rows, kernels.gate, sizes)) * jax.lax.ragged_dot(rows, kernels.up, sizes)
    results = jax.lax.ragged_dot(jnp.where(sorted_ours, hidden, 0), kernels.down, sizes)
    results = jnp.where(sorted_ours, results, 0)[jnp.argsort(order)]
    results = results.reshape(tokens, k, -1).astype(jnp.float32)
    return jnp.sum(results * routing.weights[..., None], axis=1)


_COMPUTE: dict[str, Callable[[jax.Array, Routing, Experts, Activation], jax.Array]] = {
    "dense": dense_experts,
    "ragged": ragged_experts,
}


def choose_experts(implementation: str) -> str:
    """Returns "ragged" or "dense": for "auto" the one that is efficient on the platform at hand.

    XLA multiplies ragged groups natively on TPUs. On GPUs it pads every group to all rows, unless JAX is told to take
    its Triton kernel (`JAX_RAGGED_DOT_USE_GPU_PALLAS_TRITON_LOWERING=1`).
    """
    if implementation != "auto":
        return implementation
    kernel = getattr(jax.config, "jax_ragged_dot_use_gpu_pallas_triton_lowering", False)
    return "ragged" if platform() == "tpu" or (platform() == "gpu" and kernel) else "dense"


def mix_experts(
    x: jax.Array, routing: Routing, kernels: Experts, activation: Activation, implementation: str
) -> jax.Array:
    """Computes the weighted sum of each token's experts, under the current `use(mesh, rules)`.

    Args:
        x: `[B, T, D]` in the compute dtype.
        routing: `[B, T, k]` each.
        kernels: In the compute dtype, split by `expert`, `mlp` and perhaps axes of the batch.
        activation: Of the gate.
        implementation: "ragged" or "dense".

    Returns:
        `[B, T, D]` in the compute dtype.
    """
    width = x.shape[-1]
    compute = _COMPUTE[implementation]

    def flat(x: jax.Array, routing: Routing, kernels: Experts, first: jax.Array | int) -> jax.Array:
        choice = Routing(*(part.reshape(-1, part.shape[-1]) for part in routing))
        choice = choice._replace(experts=choice.experts - first)
        return compute(x.reshape(-1, width), choice, kernels, activation).reshape(x.shape).astype(x.dtype)

    current = current_rules()
    if current is None:
        return flat(x, routing, kernels, 0)
    mesh, rules = current
    tokens = resolve_spec(("batch", "sequence"), x.shape[:2], mesh, rules)
    batch, columns = mesh_axes(tokens, 0), mesh_axes(tokens, 1)
    whole = resolve_spec(_AXES["up"], kernels.up.shape, mesh, rules)
    experts = mesh_axes(whole, 0)
    # Parts that follow the axes of the tokens are gathered: those devices compute other tokens with the same weights.
    mlp = tuple(axis for axis in mesh_axes(whole, 2) if axis not in (*batch, *columns))
    peers = tuple(axis for axis in experts if axis in batch)
    partial_sums = (*(axis for axis in experts if axis not in batch), *mlp)

    def local(x: jax.Array, weights: jax.Array, chosen: jax.Array, *kernels: jax.Array) -> jax.Array:
        routing = Routing(weights, chosen)
        if peers:
            gather = partial(jax.lax.all_gather, axis_name=peers, tiled=True)
            x, routing = gather(x), Routing(*(gather(part) for part in routing))
        first = jax.lax.axis_index(experts) * kernels[0].shape[0] if experts else 0
        y = flat(x, routing, Experts(*kernels), first)
        y = jax.lax.psum(y, partial_sums) if partial_sums else y
        return jax.lax.psum_scatter(y, peers, tiled=True) if peers else y

    wide, narrow = PartitionSpec(experts or None, None, mlp or None), PartitionSpec(experts or None, mlp or None)
    specs = (tokens, tokens, tokens, wide, wide, narrow)
    mixed = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)
    return mixed(x, *routing, *kernels)


class Kernel(nn.Module):
    """A parameter `kernel` with logical axes."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stddev: float

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.axes)
        return cast(jax.Array, self.param("kernel", init, self.shape))


class MoE(nn.Module):
    """The feed-forward part of a sparse block: `router/kernel` `[D, E]`, and `up`, `gate` and `down` of the experts."""

    config: DecoderConfig
    dtype: jnp.dtype
    implementation: str = "auto"
    """One of EXPERT_IMPLEMENTATIONS."""

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array | None = None) -> jax.Array:
        """Computes `[B, T, D]` of `x` `[B, T, D]`.

        Args:
            x: The normed hidden states.
            real: `[B, T]`, set for real tokens, which `RouterSums` count; None: nothing is counted.
        """
        c = self.config
        router = Kernel((c.hidden_size, c.num_experts), ("embed", None), c.initializer_range, name="router")()
        width = {"embed": c.hidden_size, "mlp": c.expert_size, "expert": c.num_experts}
        kernels = Experts(
            *(
                Kernel(tuple(width[a] for a in _AXES[name]), _AXES[name], c.initializer_range, name=name)()
                for name in Experts._fields
            )
        )
        if self.is_initializing():
            return x  # initialisation only creates parameters
        x = x.astype(self.dtype)
        # Logits are float32 sums of products in the compute dtype, in training and in generation alike.
        logits = jnp.einsum("btd,de->bte", x, router.astype(self.dtype), preferred_element_type=jnp.float32)
        routing = route(logits, c.experts_per_token, c.normalize_experts)
        if real is not None and self.is_mutable_collection(ROUTER_SUMS):
            self.variable(ROUTER_SUMS, "sums", lambda: router_sums(logits, routing.experts, real))
        kernels = Experts(*(kernel.astype(self.dtype) for kernel in kernels))
        activation = ACTIVATION_FUNCTIONS[c.activation]
        y = mix_experts(x, routing, kernels, activation, choose_experts(self.implementation))
        return constrain(y, "batch", "sequence", None)
