"""The reference moved towards the policy, every so many steps."""

from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrlhf.models import Decoder, param_shardings

PyTree = Any


@partial(jax.jit, static_argnames=("weight", "module", "mesh"), donate_argnums=0)
def refreshed(reference: PyTree, policy: PyTree, *, weight: float, module: Decoder, mesh: Mesh) -> PyTree:
    """Computes the new reference `weight · policy + (1 - weight) · reference`, in its own dtypes and places.

    Args:
        reference: Its parameters; donated.
        policy: The policy's, without adapters.
        weight: Share of the policy; 1 makes the reference a copy of it.
        module: The reference's module, which says where its parameters lie.
        mesh: Where.
    """

    def leaf(old: jax.Array, new: jax.Array, place: jax.sharding.Sharding) -> jax.Array:
        mixed = new if weight == 1 else weight * new + (1 - weight) * old.astype(new.dtype)
        return jax.lax.with_sharding_constraint(mixed.astype(old.dtype), place)

    return jax.tree.map(leaf, reference, policy, param_shardings(module, mesh))
