"""Conversion: Hugging Face to checkpoint and back without loss, from checkpoints of training runs, and bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import tensors_of

from jaxrlhf.commands import convert as module
from jaxrlhf.commands.convert import ConvertConfig, convert, read_checkpoint_model
from jaxrlhf.config import parse
from jaxrlhf.data import materialize_demo
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    LoRAConfig,
    Model,
    add_lora,
    config_from_dict,
    create_model,
    join,
    load_pretrained,
    merged,
    save_adapter,
    save_pretrained,
)
from jaxrlhf.models.lora import adapter_leaves
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.run import train_ppo
from jaxrlhf.runs.saving import save_checkpoint
from jaxrlhf.sharding import make_mesh
from jaxrlhf.trainers.sft import SFTConfig, train_sft

pytestmark = pytest.mark.long

SHAPE = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SHAPE |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def same_files(a, b):
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert left[name].tobytes() == right[name].tobytes(), name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders `lm` and `reward` of tiny models with a tokenizer, and a file of rows."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("root")
    demo = materialize_demo(folder / "cache")
    tokenizer = AutoTokenizer.from_pretrained(demo.tokenizer)
    config = config_from_dict(SHAPE | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    for head, name in (("lm", "lm"), ("scalar", "reward")):
        save_pretrained(create_model(config, head=head, key=jax.random.key(1)), folder / name, tokenizer)
    rows = demo.train.read_text(encoding="utf-8").splitlines()[:40]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def run_options(root, output):
    return {
        "data_path": (str(root / "rows.jsonl"),),
        "data_cache_dir": str(root / "cache"),
        "output_dir": str(output),
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "max_steps": 1,
        "learning_rate": 1e-2,
    }


@pytest.fixture(scope="module")
def sft_run(root):
    train_sft(SFTConfig.create(model_name_or_path=str(root / "lm"), max_length=48, **run_options(root, root / "sft")))
    return root / "sft"


@pytest.fixture(scope="module")
def ppo_run(root):
    """The actor with adapters and a moving average, the critic whole."""
    config = PPOConfig.create(
        actor_model_name_or_path=str(root / "lm"),
        critic_model_name_or_path=str(root / "reward"),
        max_prompt_seq_len=40,
        max_answer_seq_len=4,
        lora_r=2,
        enable_ema=True,
        ema_decay=0.5,
        sample_steps=0,
        **run_options(root, root / "ppo"),
    )
    train_ppo(config)
    return root / "ppo"


def run(*argv):
    convert(parse(ConvertConfig, [str(a) for a in argv], "jaxrlhf convert", ""))


@pytest.mark.parametrize("name", ("lm", "reward"))
def test_to_a_checkpoint_and_back_is_byte_identical(root, name, tmp_path, capsys):
    run("--input", root / name, "--output", tmp_path / "mid", "--from", "hf", "--to", "orbax", "--verify")
    run("--input", tmp_path / "mid", "--output", tmp_path / "back", "--from", "orbax", "--to", "hf", "--verify")
    same_files(root / name, tmp_path / "back")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (root / name, tmp_path / "back"))
    assert before == after
    printed = capsys.readouterr().out
    assert printed.count("verified: ") == 2
    assert f"{'scalar' if name == 'reward' else 'lm'} head" in printed


def test_dtype_rounds_and_verify_compares_with_the_rounded(root, tmp_path):
    half = ("--dtype", "bfloat16", "--verify")
    run("--input", root / "lm", "--output", tmp_path / "mid", "--from", "hf", "--to", "orbax", *half)
    run("--input", tmp_path / "mid", "--output", tmp_path / "back", "--from", "orbax", "--to", "hf", *half)
    ours, rounded = tensors_of(root / "lm"), tensors_of(tmp_path / "back")
    for name, x in ours.items():
        assert rounded[name].tobytes() == np.asarray(jnp.asarray(x).astype(jnp.bfloat16)).tobytes()
    # and once more, now that nothing is rounded any more
    run("--input", tmp_path / "back", "--output", tmp_path / "mid2", "--from", "hf", "--to", "orbax", *half)
    run("--input", tmp_path / "mid2", "--output", tmp_path / "back2", "--from", "orbax", "--to", "hf", *half)
    same_files(tmp_path / "back", tmp_path / "back2")


def test_a_training_runs_checkpoint_gives_the_exported_model_and_its_tokenizer(sft_run, tmp_path):
    run("--input", sft_run, "--output", tmp_path / "a", "--from", "orbax", "--to", "hf", "--verify")
    same_files(sft_run, tmp_path / "a")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (sft_run / "tokenizer.json").read_bytes()
    run("--input", sft_run / "checkpoint-1", "--output", tmp_path / "b", "--from", "orbax", "--to", "hf")
    same_files(sft_run, tmp_path / "b")


def test_models_of_a_ppo_run_come_out_by_name_and_merged(root, ppo_run, tmp_path):
    folders = {"actor_params": ppo_run, "critic_params": ppo_run / "critic", "ema_params": ppo_run / "ema"}
    converted = {}
    for name, exported in folders.items():
        run(
            "--input",
            ppo_run,
            "--output",
            tmp_path / name,
            "--from",
            "orbax",
            "--to",
            "hf",
            "--params",
            name,
            "--verify",
        )
        converted[name] = tensors_of(tmp_path / name)
        for tensor, x in tensors_of(exported).items():
            np.testing.assert_allclose(converted[name][tensor], x, rtol=1e-6, atol=1e-8)
    assert "score.weight" in converted["critic_params"]
    base, trained = tensors_of(root / "lm"), "transformer.h.0.attn.c_attn.weight"
    for name in ("actor_params", "ema_params"):
        same = {tensor for tensor in base if base[tensor].tobytes() == converted[name][tensor].tobytes()}
        assert trained not in same
        assert {"transformer.wte.weight", "transformer.h.0.ln_1.weight"} <= same
    assert (converted["actor_params"][trained] != converted["ema_params"][trained]).any()
    run("--input", ppo_run, "--output", tmp_path / "default", "--from", "orbax", "--to", "hf")
    same_files(tmp_path / "default", tmp_path / "actor_params")


def test_a_peft_adapter_is_merged_into_a_hugging_face_input(root, tmp_path):
    model = add_lora(load_pretrained(root / "lm"), LoRAConfig(rank=2), jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.01, model.params)
    model = model.replace(params=params)
    save_adapter(model, tmp_path / "adapter")
    run(
        "--input",
        root / "lm",
        "--output",
        tmp_path / "out",
        "--from",
        "hf",
        "--to",
        "hf",
        "--adapter",
        tmp_path / "adapter",
    )
    base = load_pretrained(root / "lm")
    expected = merged(model.replace(params=join(base.params, adapter_leaves(params))))
    got = load_pretrained(tmp_path / "out")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got.params, expected.params)


def test_verify_finds_a_parameter_that_differs(root, tmp_path, monkeypatch):
    def spoiled(model, *args, **kwargs):
        params = dict(model.params)
        table = params["embed"]["embedding"]
        save_pretrained(
            Model(model.module, params | {"embed": {"embedding": table.at[3, 4].add(1)}}, model.config), *args, **kwargs
        )

    monkeypatch.setattr(module, "save_pretrained", spoiled)
    with pytest.raises(InputError, match=r"differs from .* in embed/embedding$"):
        run("--input", root / "lm", "--output", tmp_path / "out", "--from", "hf", "--to", "hf", "--verify")


def test_bad_input_is_refused_with_what_to_do(root, sft_run, tmp_path):
    def refused(message, **options):
        with pytest.raises(InputError, match=message):
            convert(ConvertConfig.create(**({"input": str(root / "lm"), "output": str(tmp_path / "out")} | options)))

    checkpoint = {"input": str(sft_run), "source": "orbax", "target": "hf"}
    refused("holds no checkpoint-N folder", **checkpoint | {"input": str(tmp_path)})
    refused("there is no checkpoint", **checkpoint | {"input": str(sft_run / "checkpoint-9")})
    refused("holds no parameters 'actor_params'; it has params", **checkpoint, params="actor_params")
    refused("params='x' is for checkpoints", params="x")
    refused("head is for Hugging Face folders", **checkpoint, head="lm")
    refused("adapter is for Hugging Face folders", **checkpoint, adapter="somewhere")
    refused("is the input; name another folder", output=str(root / "lm"))
    refused("no config.json", input=str(root))
    refused("is a language model, not a", head="scalar")
    save_checkpoint(tmp_path / "other", 3, {"x": jnp.zeros(2)}, {"identity": {}})
    refused("does not say which models it holds", **checkpoint | {"input": str(tmp_path / "other")})
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_read_onto_any_mesh(sft_run):
    whole = load_pretrained(sft_run)
    model = read_checkpoint_model(sft_run, "", make_mesh(1, 4, 2))
    jax.tree.map(np.testing.assert_array_equal, model.params, whole.params)
    assert not model.params["layers"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated
