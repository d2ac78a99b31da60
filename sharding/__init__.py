"""One device mesh, two rule tables, placement of parameter trees and optimizer states."""

from jaxrlhf.sharding.mesh import AXES, check_divisible, make_mesh
from jaxrlhf.sharding.placement import (
    batch_sharding,
    constrain_tree,
    held_rows,
    optimizer_shardings,
    place,
    place_batch,
    replicated,
    tree_shardings,
)
from jaxrlhf.sharding.rules import (
    GENERATE_GATHERED_RULES,
    GENERATE_RULES,
    TRAIN_RULES,
    Rules,
    constrain,
    generate_rules,
    named_sharding,
    resolve_spec,
    use,
)

__all__ = [
    "AXES",
    "GENERATE_GATHERED_RULES",
    "GENERATE_RULES",
    "TRAIN_RULES",
    "Rules",
    "batch_sharding",
    "check_divisible",
    "constrain",
    "constrain_tree",
    "generate_rules",
    "held_rows",
    "make_mesh",
    "named_sharding",
    "optimizer_shardings",
    "place",
    "place_batch",
    "replicated",
    "resolve_spec",
    "tree_shardings",
    "use",
]
