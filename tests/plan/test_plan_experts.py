"""The planner with sparse models: parameters, FLOPs and bytes of their experts, memory over `mesh_expert`."""

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.models import Decoder, config_from_dict, count_params, known_config, param_shapes
from jaxrlhf.plan import roofline
from jaxrlhf.plan.activations import Pass, layer_weights, residual_bytes
from jaxrlhf.plan.command import make_plan
from jaxrlhf.plan.copies import generation_view_bytes
from jaxrlhf.plan.cost import run_cost
from jaxrlhf.plan.report import as_dict
from jaxrlhf.plan.roofline import active_params, expert_elements, forward
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import build_system

SHAPE = {"model_type": "mixtral", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 6}
DENSE, ROUTER, EXPERT, HEAD = 2 * 4 * 32 * 32, 2 * 32 * 6, 2 * 3 * 32 * 48, 96 * 32


def module_of(implementation="ragged", **options) -> Decoder:
    return Decoder(config_from_dict(SHAPE | options), dtype=jnp.float32, expert_implementation=implementation)


@pytest.mark.parametrize(("name", "active"), [("mixtral-8x7b", 12.88e9), ("qwen3-30b-a3b", 3.35e9)])
def test_active_parameters_are_the_published_ones(name, active):
    module = Decoder(known_config(name))
    assert active_params(module) == pytest.approx(active, rel=0.01)
    assert active_params(Decoder(known_config("opt-125m"))) == count_params(
        param_shapes(Decoder(known_config("opt-125m")))
    )


def test_a_pass_computes_chosen_experts_and_reads_touched_ones():
    module = module_of()
    assert expert_elements(module) == 6 * EXPERT
    assert roofline.matrices(module) == (DENSE + ROUTER, HEAD)
    many = forward(module, 3, 5, 5, 2)
    attention = 4 * 3 * 15 * 32 * 2
    assert many.flops == pytest.approx(2 * 3 * (5 * (DENSE + ROUTER + 2 * EXPERT) + 2 * HEAD) + attention)
    assert many.bytes == 4 * (DENSE + ROUTER + 6 * EXPERT + HEAD)
    one = forward(module, 1, 1, 1, 1)
    assert one.bytes == pytest.approx(4 * (DENSE + ROUTER + 2 * EXPERT + HEAD))
    shared = forward(module, 1, 1, 1, 1, expert=3)  # 2 experts of a device get the 6 choices of 3 devices
    assert shared.bytes == pytest.approx(4 * (DENSE + ROUTER + 2 * EXPERT + HEAD))
    every = forward(module_of("dense"), 1, 1, 1, 1, padded=True)
    assert every.bytes == 4 * (DENSE + ROUTER + 6 * EXPERT + HEAD)
    assert every.flops - one.flops == pytest.approx(2 * 4 * EXPERT)


def test_the_compiler_counts_as_many_flops():
    module = module_of("dense", hidden_size=64, intermediate_size=96, vocab_size=512)
    rows, length = 4, 64
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    compiled = jax.jit(module.apply).lower({"params": param_shapes(module)}, ids).compile()
    counted = compiled.cost_analysis()["flops"]
    # The loop over layers is counted once by the compiler.
    whole = forward(module, rows, length, length, length, padded=True).flops
    head = 2 * rows * length * module.config.padded_vocab_size * module.config.embedding_size
    once = (whole - head) / module.config.num_layers + head
    assert min(abs(counted - x) / x for x in (once, whole)) < 0.1


ALONE = {"generate_tensor_parallel": 1}


def plan_config(**settings) -> PlanConfig:
    return PlanConfig.create(
        actor="qwen3-30b-a3b", reward="qwen3-30b-a3b", device="h100", devices=64, **(ALONE | settings)
    )


def test_memory_falls_with_the_split_of_the_experts():
    module = Decoder(known_config("mixtral-8x7b"), dtype=jnp.bfloat16)
    experts = 2 * 3 * 8 * 4096 * 14336
    assert layer_weights(module, 1) - layer_weights(module, 1, expert=4) == pytest.approx(experts * 3 / 4)
    systems = [build_system(plan_config(mesh_expert=n, mesh_fsdp=64 // n)) for n in (1, 8)]
    assert [system.rows for system in systems] == [systems[0].rows] * 2
    whole, split = (generation_view_bytes(system) for system in systems)
    experts = 2 * expert_elements(systems[0].modules["actor"])
    assert whole - split == pytest.approx(experts * 7 / 8)
    held = [sum(x.size for x in jax.tree.leaves(system.trees["actor"])) for system in systems]
    assert held[0] == held[1]


def test_sorted_tokens_of_peers_need_room():
    module = module_of("ragged")
    one, two, three = (residual_bytes(module, Pass(2, 16, 8, expert=expert)) for expert in (1, 2, 3))
    assert three - two == two - one > 0
    dense = module_of("dense")
    assert residual_bytes(dense, Pass(2, 16, 8, expert=3)) == residual_bytes(dense, Pass(2, 16, 8))


def test_layers_without_experts_count_by_their_own_mlp():
    moe = SHAPE | {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    moe |= {"num_hidden_layers": 8, "head_dim": 16}
    del moe["num_local_experts"]
    sparse, mixed = (
        Decoder(config_from_dict(moe | {"mlp_only_layers": layers}), dtype=jnp.float32, expert_implementation="ragged")
        for layers in ([], [0, 2, 4, 6])
    )
    dense = sparse.clone(config=sparse.config.replace(num_experts=0, experts_per_token=0))
    expert, mlp = 3 * 32 * 40, 3 * 32 * 48
    assert expert_elements(mixed) == 4 * 6 * expert
    both = [count_params(param_shapes(module)) for module in (sparse, mixed, dense)]
    assert both[1] == (both[0] + both[2]) / 2
    assert active_params(mixed) == both[1] - 4 * 4 * expert
    flops = [forward(module, 1, 8, 8, 8).flops for module in (sparse, mixed, dense)]
    assert flops[1] == (flops[0] + flops[2]) / 2
    attention = layer_weights(dense, 1) - 4 * mlp
    assert layer_weights(mixed, 1) == layer_weights(sparse, 1) == attention + 4 * (6 * expert + 6 * 32)
    assert layer_weights(mixed, 1, expert=6) == attention + 4 * max(mlp, expert + 6 * 32)
    kept = [residual_bytes(module, Pass(2, 16, 8)) for module in (sparse, mixed, dense)]
    assert kept[1] == pytest.approx((kept[0] + kept[2]) / 2, rel=0.04)


def test_experts_exchange_tokens_only_over_their_axis():
    costs = [run_cost(build_system(c), c).phases for c in (plan_config(), plan_config(mesh_expert=8, mesh_fsdp=8))]
    assert costs[1]["decode"].links > costs[0]["decode"].links
    assert costs[1]["train"].hidden < costs[0]["train"].hidden  # experts are gathered over fewer devices
    assert costs[1]["train"].flops == pytest.approx(costs[0]["train"].flops)


def test_the_report_has_total_and_active_parameters():
    found = as_dict(make_plan(plan_config()))["parameters"]
    module = Decoder(known_config("qwen3-30b-a3b"))
    assert found["actor"] == {"total": count_params(param_shapes(module)), "active": active_params(module)}
    assert found["critic"]["active"] < found["critic"]["total"]
