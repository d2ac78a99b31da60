"""The planner: what it counts is what a real engine holds, what it refuses, what it proposes, what it writes."""

import gc
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import cli
from jaxrlhf.config import parse
from jaxrlhf.errors import InputError
from jaxrlhf.models import config_from_dict, count_params, known_config, save_pretrained
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.model import param_shapes
from jaxrlhf.plan.command import make_plan, run_plan
from jaxrlhf.plan.cost import run_cost
from jaxrlhf.plan.devices import DEVICES, find_device, target_config
from jaxrlhf.plan.memory import cache_bytes, estimate, residual_bytes, train_memory
from jaxrlhf.plan.programs import array_bytes, build_system, lower, tree_bytes
from jaxrlhf.plan.report import as_dict
from jaxrlhf.plan.roofline import forward
from jaxrlhf.plan.search import CHANGES, capacity, flags_between, largest_micro_batches, nearest_on_mesh, peak
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.runs.console import Console

PUBLISHED = {"reward": "opt-350m", "device": "a100-80g"}


def config_of(**settings) -> PlanConfig:
    return PlanConfig.create(**(PUBLISHED | settings))


def fits(config: PlanConfig) -> bool:
    plan = make_plan(config)
    assert plan.fits == (plan.peak <= capacity(config))
    return plan.fits


def programs_of(config: PlanConfig):
    return estimate(build_system(config), config.accelerator.platform)


# ---- against a real engine


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
        {"enable_ema": True},
        {"mesh_fsdp": 4, "mesh_tensor": 2, "lora_r": 3, "critic_lora_r": 2},
        {"zero_stage": 1, "reference_zero_stage": 3, "critic_zero_stage": 0},
    ],
    ids=["whole", "adapters", "stages"],
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


# ---- counting


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
        remat: residual_bytes(Decoder(config, head="lm", dtype=jnp.bfloat16, remat=remat), 2, 128, 64, 1)
        for remat in ("none", "dots", "full")
    }
    assert kept["full"] < kept["dots"] < kept["none"]
    inputs = config.num_layers * 2 * 128 * config.hidden_size * 2
    assert inputs <= kept["full"] < 3 * inputs
    module = Decoder(config, head="lm", dtype=jnp.bfloat16, remat="none")
    assert residual_bytes(module, 4, 128, 64, 1) == pytest.approx(2 * kept["none"], rel=0.01)
    assert residual_bytes(module, 2, 128, 64, 4) < 0.6 * kept["none"]


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


def test_work_of_an_iteration_against_counts_by_hand():
    config = config_of(
        actor="opt-13b", devices=1, per_device_train_batch_size=2, train_rows=100, price_per_device_hour=3
    )
    system = build_system(config)
    params = known = 12_853_473_280
    module = system.modules["actor"]
    body = known - 50272 * 5120 - 2050 * 5120
    tokens = 2 * 512
    attention = 4 * tokens * 512 * 5120 * 40
    whole = forward(module, 2, 512, 512, 512, padded=True).flops
    assert whole == pytest.approx(2 * tokens * (body + 50272 * 5120) + attention, rel=1e-3)
    cost = run_cost(system, config)
    # the head runs on answers only, and the critic's is a vector
    actor = 2 * tokens * body + 2 * (tokens / 2) * 50272 * 5120 + attention
    critic = forward(system.modules["critic"], 2, 512, 512, 512, padded=True).flops
    assert cost.phases["score"].flops == pytest.approx(2 * (actor + critic), rel=1e-3)
    assert cost.phases["train"].flops == pytest.approx(3 * (actor + critic), rel=1e-2)
    # decoding reads all weights and the cache once per token, and is bound by that
    moved = 2 * params + 2 * 40 * 2 * 512 * 5120 * 2
    assert cost.seconds["decode"] == pytest.approx(255 * moved / 2039e9, rel=0.01)
    assert cost.iterations == 50
    assert cost.cost == pytest.approx(50 * cost.seconds_per_iteration / 3600 * 3)
    assert cost.tokens_per_second == pytest.approx(tokens / cost.seconds_per_iteration)
    half = run_cost(system, config.replace(roofline_share=0.5))
    assert half.seconds_per_iteration == pytest.approx(2 * cost.seconds_per_iteration)
    remat = config.replace(remat_policy="full")
    again = run_cost(build_system(remat), remat).phases["train"].flops / cost.phases["train"].flops
    assert again == pytest.approx(4 / 3, rel=0.01)


def test_links_between_hosts_are_slower_than_those_inside():
    one_host = config_of(actor="opt-13b", devices=16, devices_per_host=16)
    two_hosts = config_of(actor="opt-13b", devices=16, generate_tensor_parallel=8)
    same_group = one_host.replace(generate_tensor_parallel=8)
    fast, slow = (run_cost(build_system(c), c) for c in (same_group, two_hosts))
    assert slow.phases["train"].links == fast.phases["train"].links
    assert slow.phases["train"].hidden > fast.phases["train"].hidden
    assert slow.phases["reshard"].exposed > fast.phases["reshard"].exposed


# ---- other trainers


LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 4, "intermediate_size": 128, "max_position_embeddings": 128}


@pytest.mark.parametrize(
    "settings",
    [
        {"trainer": "sft", "max_length": 64, "gradient_accumulation_steps": 2},
        {"trainer": "reward", "max_length": 64},
        {"trainer": "dpo", "max_length": 64, "lora_r": 4},
        {"trainer": "grpo", "reward": None, "max_prompt_seq_len": 32, "max_new_tokens": 32},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_estimates_of_other_trainers_against_the_compiler_of_this_cpu(settings):
    shape = config_from_dict(LLAMA)
    figures = {"device_memory_gib": 8.0, "device_tflops": 1.0, "device_bandwidth_gbs": 50.0}
    config = PlanConfig.create(
        **{"actor": "x", "reward": "x", "shapes": {"actor": shape, "reward": shape}, "device": "cpu", **figures}
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


def test_other_trainers_are_searched_and_shown_without_what_they_do_not_have(tmp_path, capsys):
    target, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    command = f"plan --trainer dpo --model opt-6.7b --device h100 --devices 1 --json {target} --plot {picture}"
    assert cli.main(command.split()) == 0
    said = capsys.readouterr().err
    assert "dpo: opt-6.7b on 1 × h100" in said and "generate" not in said and "critic" not in said
    assert "does not fit" in said and "--lora_r 64" in said
    written = json.loads(target.read_text())
    assert {"score", "train"} <= written.keys() and "generate" not in written
    assert picture.stat().st_size > 0


def test_a_run_without_a_critic_needs_less_than_one_with_it():
    peaks = [make_plan(config_of(actor="opt-1.3b", devices=8, trainer=name)).peak for name in ("grpo", "ppo")]
    assert peaks[0] < peaks[1]
    assert build_system(config_of(actor="opt-1.3b", trainer="grpo")).config.value("samples_per_prompt") == 8


@pytest.mark.parametrize("device", ["h200", "b200", "gb200", "mi300x"])
def test_a_larger_device_holds_what_an_a100_does_not(device):
    settings = {"actor": "opt-6.7b", "trainer": "sft", "devices": 1, "remat_policy": "full", "max_length": 512}
    assert not fits(config_of(**settings))
    assert fits(config_of(**settings | {"device": device}))


def test_a_chip_of_tpu7x_is_two_devices():
    config = config_of(actor="opt-1.3b", device="tpu7x", devices=8)
    assert config.shape == "2x2x1" and config.accelerator.devices_per_host == 8
    assert config.accelerator.memory == 96 * 2**30


# ---- the published table (arXiv 2308.01320, tables 1 to 3)


def test_one_device_of_80_gb_trains_13b_with_adapters_and_not_whole():
    assert not fits(config_of(actor="opt-13b", remat_policy="full", per_device_train_batch_size=1))
    with_adapters = {"lora_r": 64, "remat_policy": "full", "per_device_train_batch_size": 1}
    assert fits(config_of(actor="opt-13b", gradient_accumulation_steps=4, **with_adapters))
    proposed = make_plan(
        config_of(actor="opt-13b", per_device_train_batch_size=4, gradient_accumulation_steps=4)
    ).nearest
    assert "--lora_r 64" in proposed.flags and not proposed.same_training


@pytest.mark.parametrize(
    ("actor", "devices", "layout"),
    [
        ("opt-1.3b", 1, {}),
        ("opt-13b", 8, {}),
        ("opt-13b", 64, {}),
        ("opt-66b", 64, {"generate_tensor_parallel": 8}),
        ("opt-175b", 64, {"mesh_tensor": 8, "generate_tensor_parallel": 32}),
    ],
)
def test_what_was_published_as_trained_fits(actor, devices, layout):
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "remat_policy": "full"}
    assert fits(config_of(actor=actor, devices=devices, **small, **layout))


def test_66b_does_not_fit_one_host_of_eight_with_all_parameters_trained():
    plan = make_plan(config_of(actor="opt-66b", devices=8, per_device_train_batch_size=1, remat_policy="full"))
    assert not plan.fits
    assert plan.nearest is None or not plan.nearest.same_training
    assert plan.larger is not None and plan.larger.config.devices > 8


# ---- the nearest setting


def test_the_nearest_setting_fits_and_is_told_in_flags():
    asked = ["--actor", "opt-13b", "--device", "a100-80g", "--devices", "8", "--per_device_train_batch_size", "64"]
    plan = make_plan(parse(PlanConfig, asked, "plan", ""))
    assert not plan.fits and plan.nearest.same_training and plan.larger is None
    again = make_plan(parse(PlanConfig, asked + plan.nearest.flags.split(), "plan", ""))
    assert again.fits
    assert again.config == plan.nearest.config
    assert again.system.rows == plan.system.rows


def test_changes_of_layout_keep_the_rollout_batch():
    config = config_of(actor="opt-175b", devices=16, per_device_train_batch_size=2, zero_stage=1, devices_per_host=8)
    rows = build_system(config).rows
    tried = 0
    for change in CHANGES:
        changed = change.apply(config)
        assert changed != config, change.reason
        if change.same_training:
            assert build_system(changed).rows == rows, flags_between(config, changed)
            tried += 1
    assert tried == len(CHANGES) - 2 == 8


def test_micro_batches_are_tried_before_anything_that_costs_more():
    config = config_of(actor="opt-1.3b", devices=8, per_device_train_batch_size=256)
    found = nearest_on_mesh(config)
    assert found.flags == "--per_device_train_batch_size 128 --gradient_accumulation_steps 2"
    assert not fits(config), "the next larger one"


def test_the_largest_micro_batches_of_training_and_of_scoring_are_proposed():
    config = config_of(actor="opt-1.3b", per_device_train_batch_size=8, gradient_accumulation_steps=32)
    larger = largest_micro_batches(config)
    flags = "--per_device_train_batch_size 64 --gradient_accumulation_steps 4 --per_device_score_batch_size 256"
    assert flags_between(config, larger) == flags
    assert peak(programs_of(larger)) <= capacity(config) and build_system(larger).rows == build_system(config).rows
    assert largest_micro_batches(larger) == larger
    next_one = larger.replace(per_device_train_batch_size=128, gradient_accumulation_steps=2)
    assert peak(programs_of(next_one)) > capacity(config)


def test_a_model_that_fits_nowhere_in_the_mesh_is_refused_with_the_devices_it_takes(tmp_path):
    config = config_of(actor="opt-175b", devices=1, per_device_train_batch_size=1, json=str(tmp_path / "plan.json"))
    with pytest.raises(InputError, match=r"no setting fits 1 × a100-80g[\s\S]*--devices \d+"):
        run_plan(config, Console(quiet=True))
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["fits"] is False
    assert written["nearest"] is None
    assert "--devices" in written["nearest_with_more_devices"]["flags"]


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"device": "a100-90g"},
            "unknown device 'a100-90g'; known are a100-40g, a100-80g, h100, h200, b200, gb200, mi300x, v4.*tpu7x",
        ),
        ({"device": "v5p", "devices": 64, "topology": "4x4x5"}, "unknown topology '4x4x5' of v5p; known are 1x1x1"),
        ({"device": "v5p", "devices": 64, "topology": "2x2x2"}, "has 8 chips, but devices=64"),
        ({"device": "v5p", "devices": 7}, "devices=7: v5p has no slice of that many chips"),
        ({"topology": "2x2"}, "only TPU slices have one"),
        ({"device": "cpu"}, "give --device_memory_gib"),
        ({"devices": 12}, "devices=12 do not fill hosts of 8"),
        ({"devices": 8, "mesh_fsdp": 4}, "needs 4 devices, but 8 are present"),
        ({"devices": 8, "mesh_tensor": 8, "actor": "opt-125m"}, "mesh tensor=8 does not divide the model's num_heads"),
        ({"devices": 8, "generate_tensor_parallel": 3}, "generate_tensor_parallel=3 does not"),
        ({"reward": "gpt2"}, "vocabulary of 50272 tokens and reward=gpt2 one of 50257"),
        ({"actor": "opt-1.4b"}, "'opt-1.4b' is no folder, and unknown model 'opt-1.4b'; known shapes are"),
        ({"max_answer_seq_len": 4000}, "exceeds the model's context of 2048"),
        ({"trainer": "sft", "max_new_tokens": 9}, "max_new_tokens=9 is no setting of sft"),
        ({"trainer": "grpo", "critic_lora_r": 9}, "critic_lora_r=9 is no setting of grpo"),
        ({"trainer": "grpo", "per_device_train_batch_size": 3}, "samples_per_prompt"),
        ({"device": "tpu7x", "devices": 6}, "no slice of that many devices, 2 per chip; known are 1x1x1 \\(2\\)"),
        ({"roofline_share": 0.0}, "roofline_share=0.0 must be above 0"),
        ({"plot": "plan.pdf"}, r"must end in .png or .svg"),
        ({"lora_r": 8, "offload_reference_model": True}, "offload_reference_model"),
    ],
)
def test_bad_input_is_refused_by_name(settings, message):
    with pytest.raises(InputError, match=message):
        make_plan(config_of(**({"actor": "opt-1.3b"} | settings)))


def test_offload_is_refused_for_devices_without_pinned_host_memory():
    figures = {"device_memory_gib": 64.0, "device_tflops": 1.0, "device_bandwidth_gbs": 50.0}
    plan = make_plan(config_of(actor="opt-125m", device="cpu", **figures))
    assert plan.fits
    assert plan.system.modules["actor"].dtype == jnp.float32
    with pytest.raises(InputError, match="offload_optimizer: cpu devices have no pinned host memory"):
        config_of(actor="opt-125m", device="cpu", offload_optimizer=True, **figures)


def test_figures_of_a_device_can_be_replaced():
    device = find_device("H100", {"device_memory_gib": 40.0, "network_gbs": 12.5})
    assert (device.memory, device.network) == (40 * 2**30, 12.5e9)
    assert device.flops == DEVICES["h100"].flops
    for name, entry in DEVICES.items():
        if entry.platform == "cuda":
            assert f"device_memory_size: {entry.memory} " in target_config(entry), name


# ---- what is written


def test_the_command_writes_table_json_and_picture(tmp_path, capsys):
    from PIL import Image

    target, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    command = "plan --actor opt-13b --reward opt-350m --device a100-80g --devices 8 --remat_policy full "
    command += f"--per_device_train_batch_size 4 --price_per_device_hour 4 --json {target} --plot {picture}"
    assert cli.main(command.split()) == 0
    said = capsys.readouterr().err
    assert "GiB per device while it runs (of 72.92 usable)" in said
    assert "fits: " in said and "KV cache" in said and "decode" in said
    written = json.loads(target.read_text())
    assert written["fits"] is True
    assert written == json.loads(json.dumps(as_dict(make_plan(parse(PlanConfig, command.split()[1:], "plan", "")))))
    for name in ("generate", "score", "train"):
        entry = written[name]
        items = [*entry["arguments"].values(), *entry["temporaries"].values(), *entry["resident"].values()]
        assert entry["bytes_per_device"] == sum(items) + entry["outputs"]
    assert written["peak_bytes_per_device"] == max(
        written[n]["bytes_per_device"] for n in ("generate", "score", "train")
    )
    phases = [phase["seconds"] for n in ("generate", "score", "train") for phase in written[n]["phases"].values()]
    assert written["seconds_per_iteration"] == pytest.approx(sum(phases))
    assert written["cost"] == pytest.approx(written["hours"] * 8 * 4)
    width, height = Image.open(picture).size
    assert math.isclose(width / height, 2, rel_tol=0.05)
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    _, counts = np.unique(pixels, axis=0, return_counts=True)
    assert (counts > 500).sum() >= 6, "white, and a colour for each kind of item"


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
