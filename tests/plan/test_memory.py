"""Memory of planned programs: what is counted is what a real engine holds, and close to what compilers report."""

import gc

import jax
import jax.numpy as jnp
import pytest
from planning import config_of, programs_of

from jaxrlhf.errors import InputError
from jaxrlhf.models import config_from_dict, count_params, known_config, save_pretrained
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.model import param_shapes
from jaxrlhf.plan.activations import Pass, residual_bytes
from jaxrlhf.plan.cost import iteration_cost
from jaxrlhf.plan.memory import cache_bytes, estimate, train_memory
from jaxrlhf.plan.programs import lower
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import array_bytes, build_system, tree_bytes
from jaxrlhf.rl.models import RLHFEngine


def bytes_on_first_device(besides: list[jax.Array]) -> int:
    """Of the live arrays other than `besides`."""
    gc.collect()
    first, known = jax.devices()[0], {id(x) for x in besides}
    new = (x for x in jax.live_arrays() if id(x) not in known)
    return sum(shard.data.nbytes for x in new for shard in x.addressable_shards if shard.device == first)


ODD = {"model_type": "opt", "vocab_size": 513, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6}
ODD |= {"ffn_dim": 100, "max_position_embeddings": 94, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}


@pytest.fixture(scope="module")
def odd(lab, demo, tmp_path_factory):
    """Models whose shapes fit no mesh evenly."""
    folder = tmp_path_factory.mktemp("odd")
    options = ODD | {"vocab_size": len(demo.tokenizer)}
    for name, head, seed in (("lm", "lm", 0), ("reward", "scalar", 1)):
        save_pretrained(lab.tiny_model(options, head, seed), folder / name, demo.tokenizer)
    return folder


@pytest.fixture(scope="module")
def sparse(lab, demo, tmp_path_factory):
    """Models with experts."""
    folder = tmp_path_factory.mktemp("sparse")
    options = lab.MIXTRAL | {"vocab_size": len(demo.tokenizer)}
    for name, head, seed in (("lm", "lm", 0), ("reward", "scalar", 1)):
        save_pretrained(lab.tiny_model(options, head, seed), folder / name, demo.tokenizer)
    return folder


@pytest.mark.parametrize("layout", [{"mesh_fsdp": 2, "mesh_expert": 4}, {"mesh_expert": 2, "zero_stage": 1}], ids=str)
def test_resident_arrays_of_sparse_models_are_those_of_a_real_engine(sparse, demo, layout):
    assert_resident_arrays(sparse, demo, layout)


@pytest.mark.parametrize(
    "layout",
    [
        {"enable_ema": True, "async_steps": 2, "importance_sampling_correction": True},
        {"mesh_fsdp": 4, "mesh_tensor": 2, "lora_r": 3, "critic_lora_r": 2},
        {"zero_stage": 1, "reference_zero_stage": 3, "critic_zero_stage": 0},
    ],
    ids=["whole and rollouts that wait", "adapters", "stages"],
)
def test_resident_arrays_are_those_of_a_real_engine(odd, demo, layout):
    assert_resident_arrays(odd, demo, layout)


def assert_resident_arrays(folder, demo, layout):
    plan = PlanConfig.create(
        actor=str(folder / "lm"),
        reward=str(folder / "reward"),
        device="a100-80g",
        devices=8,
        dtype="float32",
        max_prompt_seq_len=16,
        max_answer_seq_len=16,
        **layout,
    )
    before = jax.live_arrays()  # kept alive, so that nothing is freed between the two looks
    engine = RLHFEngine(plan.actor, plan.reward, demo.tokenizer, 4, plan.planned)
    system = build_system(plan)
    state = engine.state
    held = {
        "actor": state.actor_params,
        "critic": state.critic_params,
        "actor_optimizer": state.actor_opt_state,
        "critic_optimizer": state.critic_opt_state,
        "reference": engine.frozen.reference.own,
        "reward": engine.frozen.reward.own,
        "ema": state.ema_params,
        "waiting rollouts": state.pending,
    }
    for name, tree in held.items():
        real = {
            jax.tree_util.keystr(path): (x.shape, x.dtype, x.sharding.shard_shape(x.shape))
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        planned = {
            jax.tree_util.keystr(path): (x.shape, x.dtype, x.sharding.shard_shape(x.shape))
            for path, x in jax.tree_util.tree_leaves_with_path(system.trees.get(name))
        }
        assert planned == real, name
    program = programs_of(plan)["generate"]
    resident = sum(program.arguments.values()) - program.arguments["batch"] + sum(program.resident.values())
    assert resident == pytest.approx(bytes_on_first_device(before), rel=0.03)
    assert engine.actor.generate_mesh.shape == system.generate_mesh.shape


def test_sizes_come_from_the_models_own_shapes_not_from_names(lab, tmp_path):
    options = lab.LLAMA | {"model_type": "llama"}
    for name, head in (("lm", "lm"), ("reward", "scalar")):
        save_pretrained(lab.tiny_model(options, head), tmp_path / name)
    config = config_of(
        actor=str(tmp_path / "lm"),
        reward=str(tmp_path / "reward"),
        max_prompt_seq_len=8,
        max_answer_seq_len=8,
        dtype="float32",
    )
    system = build_system(config)
    shapes = param_shapes(Decoder(config_from_dict(options)))
    assert tree_bytes(system.trees["actor"]) == 4 * count_params(shapes)


@pytest.mark.parametrize(("device", "lanes"), [("a100-80g", 64), ("v5p", 128)])
def test_a_quantised_cache_is_its_bytes_and_a_scale_per_head_and_token(device, lanes):
    config = config_of(actor="opt-1.3b", devices=8, device=device)
    systems = [build_system(config.replace(kv_cache_dtype=name)) for name in ("auto", "int8", "fp8")]
    vectors = 2 * 24 * systems[0].rows * 512 * 32 // 8
    platform = config.accelerator.platform
    assert [cache_bytes(system, platform) for system in systems] == [
        vectors * size for size in (2 * lanes, lanes + 4, lanes + 4)
    ]


def test_what_the_backward_pass_keeps_shrinks_with_remat_and_with_the_split():
    config = known_config("opt-125m")
    kept = {
        remat: residual_bytes(Decoder(config, head="lm", dtype=jnp.bfloat16, remat=remat), Pass(2, 128, 64))
        for remat in ("none", "dots", "full")
    }
    assert kept["full"] < kept["dots"] < kept["none"]
    inputs = config.num_layers * 2 * 128 * config.hidden_size * 2
    assert inputs <= kept["full"] < 3 * inputs
    module = Decoder(config, head="lm", dtype=jnp.bfloat16, remat="none")
    assert residual_bytes(module, Pass(4, 128, 64)) == pytest.approx(2 * kept["none"], rel=0.01)
    assert residual_bytes(module, Pass(2, 128, 64, tensor=4)) < 0.6 * kept["none"]


def test_split_sequences_keep_a_part_of_their_activations_on_each_device():
    settings = {"device": "a100-80g", "devices": 8, "trainer": "sft", "actor": "opt-125m", "max_length": 512}
    settings |= {"per_device_train_batch_size": 1}
    whole, parts = (
        train_memory(build_system(PlanConfig.create(**settings, mesh_fsdp=8 // n, mesh_context=n)), "cuda").temporaries
        for n in (1, 4)
    )
    assert parts["activations"] == whole["activations"] // 4
    assert parts["gradients"] == pytest.approx(whole["gradients"], rel=0.01)


def test_arrays_are_padded_to_tiles_on_a_tpu_only():
    assert array_bytes((24, 32, 64), 4, "cuda") == 24 * 32 * 64 * 4
    assert array_bytes((24, 32, 64), 4, "tpu") == 2 * 24 * 32 * 64 * 4  # 64 lanes of 128
    assert array_bytes((24, 2048, 4, 64), 4, "tpu") == 24 * 2048 * 4 * 64 * 4  # laid out with 2048 along the lanes
    assert array_bytes((786, 2048), 2, "tpu") == 792 * 2048 * 2
    assert array_bytes((7,), 4, "tpu") == 512


def test_items_move_with_what_they_depend_on():
    base = config_of(actor="opt-1.3b", devices=8, remat_policy="full")
    programs = programs_of(base)
    system = build_system(base)
    params = count_params(param_shapes(system.modules["actor"]))
    assert programs["train"].arguments["actor"] == pytest.approx(4 * params / 8, rel=0.01)
    assert programs["train"].arguments["actor_optimizer"] == pytest.approx(8 * params / 8, rel=0.01)
    assert programs["generate"].temporaries["generation weights"] == pytest.approx(2 * params / 8, rel=0.05)
    cache = 2 * 24 * system.rows * 512 * 2048 * 2 / 8
    assert programs_of(base.replace(max_prompt_seq_len=1, max_answer_seq_len=511))["generate"].temporaries[
        "KV cache"
    ] == pytest.approx(cache)

    offloaded = programs_of(base.replace(offload_optimizer=True, offload_reference_model=True))
    assert not {"actor_optimizer", "reference"} & set(offloaded["generate"].resident)
    assert "actor_optimizer" not in offloaded["train"].arguments
    assert offloaded["train"].temporaries == programs["train"].temporaries  # moments come after the backward pass
    tpu = programs_of(base.replace(device="v5p", offload_optimizer=True))["train"]
    assert tpu.temporaries["actor_optimizer on the device"] == pytest.approx(8 * params / 8, rel=0.01)
    assert offloaded["score"].arguments.keys() == {"actor", "critic", "reward", "batch"}

    adapters = programs_of(base.replace(lora_r=8))
    assert "reference" not in adapters["score"].arguments
    assert adapters["train"].arguments["actor_optimizer"] < 0.02 * programs["train"].arguments["actor_optimizer"]
    pieces = programs_of(base.replace(generation_batches=4, max_prompt_seq_len=1, max_answer_seq_len=511))
    assert pieces["generate"].temporaries["KV cache"] == pytest.approx(cache / 4)
    assert pieces["score"].arguments["batch"] == programs["score"].arguments["batch"]
    averaged = programs_of(base.replace(enable_ema=True))
    assert averaged["score"].resident["ema"] == programs["train"].arguments["actor"]


def test_rollouts_that_wait_or_are_replayed_lie_on_the_devices_in_rows_of_their_own():
    base = config_of(trainer="grpo", actor="opt-1.3b", devices=8, importance_sampling_correction=True)
    steps = programs_of(base)
    waiting, replayed = (programs_of(base.replace(**{name: 2})) for name in ("async_steps", "replay_steps"))
    system = build_system(base)
    one = system.rows * system.length * 10 // 8  # int32, float32 and two masks
    for name in steps:
        assert waiting[name].resident["waiting rollouts"] == 2 * one
        assert replayed[name].resident["replayed rollouts"] == pytest.approx(2 * one, rel=0.01)
        assert replayed[name].bytes_per_device - steps[name].bytes_per_device == pytest.approx(2 * one, rel=0.01)
    both = programs_of(base.replace(async_steps=1, replay_steps=3))["train"].resident
    assert both["replayed rollouts"] == replayed["train"].resident["replayed rollouts"]
    assert both["waiting rollouts"] == one
    phases = {n: iteration_cost(build_system(base.replace(replay_steps=n)), base.accelerator) for n in (0, 2)}
    assert phases[2]["train"].flops == pytest.approx(3 * phases[0]["train"].flops)
    assert phases[2]["decode"] == phases[0]["decode"]
    with pytest.raises(InputError, match="async_steps=2 must be below replay_steps=2"):
        base.replace(async_steps=2, replay_steps=2)


LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 4, "intermediate_size": 128, "max_position_embeddings": 128}


@pytest.mark.parametrize(
    "settings",
    [
        {"trainer": "sft", "max_length": 64, "gradient_accumulation_steps": 2},
        {"trainer": "reward", "max_length": 64},
        {"trainer": "dpo", "max_length": 64, "lora_r": 4},
        {"trainer": "kto", "max_length": 64},
        {"trainer": "distill", "teacher": "x", "max_length": 64, "lmbda": 0.5, "max_new_tokens": 32},
        {"trainer": "distill", "teacher": "x", "max_length": 64, "seq_kd": True, "max_new_tokens": 32},
        {"trainer": "grpo", "reward": None, "max_prompt_seq_len": 32, "max_new_tokens": 32},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_estimates_of_other_trainers_against_the_compiler_of_this_cpu(settings):
    shape = config_from_dict(LLAMA)
    figures = {"device_memory_gib": 8.0, "device_tflops": 1.0, "device_bandwidth_gbs": 50.0}
    config = PlanConfig.create(
        **{
            "actor": "x",
            "reward": "x",
            "shapes": dict.fromkeys(("actor", "reward", "teacher"), shape),
            "device": "cpu",
            **figures,
        }
        | settings
    )
    system = build_system(config, jax.devices()[:1])
    estimates = estimate(system, "cpu")
    assert tuple(estimates) == config.programs
    for name in config.programs:
        found = lower(system, name).compile().memory_analysis()
        arguments = sum(estimates[name].arguments.values()) + estimates[name].shared
        assert arguments == pytest.approx(found.argument_size_in_bytes, rel=0.01), name
        # The factors of temporaries are fitted to the compilers of accelerators; this one's are of the same size.
        assert 0.4 < sum(estimates[name].temporaries.values()) / found.temp_size_in_bytes < 2.5, name
