"""The planner: cost of an iteration, what it refuses, what it writes."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from planning import config_of

from jaxrlhf import cli
from jaxrlhf.config import parse
from jaxrlhf.errors import InputError
from jaxrlhf.plan.command import make_plan
from jaxrlhf.plan.cost import run_cost
from jaxrlhf.plan.devices import DEVICES, find_device, target_config
from jaxrlhf.plan.report import as_dict
from jaxrlhf.plan.roofline import forward
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import build_system


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


def test_a_chip_of_tpu7x_is_two_devices():
    config = config_of(actor="opt-1.3b", device="tpu7x", devices=8)
    assert config.shape == "2x2x1" and config.accelerator.devices_per_host == 8
    assert config.accelerator.memory == 96 * 2**30


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
