"""One device mesh, two rule tables, placement of parameter trees and optimizer states."""

from jaxrlhf.sharding.mesh import (
    AXES,
    check_divisible,
    check_tensor_parallel,
    default_tensor_parallel,
    generate_mesh,
    make_mesh,
)
from jaxrlhf.sharding.placement import (
    back_like,
    batch_sharding,
    constrain_tree,
    offloaded,
    on_device,
    optimizer_shardings,
    place,
    place_batch,
    replicated,
    tree_shardings,
)
from jaxrlhf.sharding.rules import (
    GENERATE_RULES,
    REPLICATED_RULES,
    TRAIN_RULES,
    Rules,
    constrain,
    named_sharding,
    resolve_spec,
    use,
)

__all__ = [
    "AXES",
    "GENERATE_RULES",
    "REPLICATED_RULES",
    "TRAIN_RULES",
    "Rules",
    "back_like",
    "batch_sharding",
    "check_divisible",
    "check_tensor_parallel",
    "constrain",
    "constrain_tree",
    "default_tensor_parallel",
    "generate_mesh",
    "make_mesh",
    "named_sharding",
    "offloaded",
    "on_device",
    "optimizer_shardings",
    "place",
    "place_batch",
    "replicated",
    "resolve_spec",
    "tree_shardings",
    "use",
]
