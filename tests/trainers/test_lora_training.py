"""LoRA training: what is trained and what stays, on any mesh, in all three steps; PPO's shared base; resume, export."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from jaxrlhf.commands.rlhf import RLHFConfig, train_rlhf
from jaxrlhf.data import materialize_demo
from jaxrlhf.engine import generate
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    LoRAConfig,
    add_lora,
    base_leaves,
    config_from_dict,
    create_model,
    load_adapter,
    load_pretrained,
    merged,
    read_config,
    save_pretrained,
    split_trainable,
)
from jaxrlhf.rl import ppo_step, score_rollout
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.trainer import PPOTrainer
from jaxrlhf.runs.checkpoints import list_checkpoints
from jaxrlhf.sharding import make_mesh, place_batch
from jaxrlhf.trainers import reward
from jaxrlhf.trainers.optimizer import OptimizerConfig, make_optimizer
from jaxrlhf.trainers.sft import SFTConfig, sft_loss, token_count, train_sft
from jaxrlhf.trainers.supervised import Objective, has_dropout, init_state, train_step

pytestmark = pytest.mark.long

SHAPE = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SFT = Objective(token_count, sft_loss)


def tiny(head="lm", mesh=None, **lora):
    model = create_model(config_from_dict(SHAPE), head=head, key=jax.random.key(1), mesh=mesh, dtype=jnp.float32)
    return add_lora(model, LoRAConfig(**({"rank": 2} | lora)), jax.random.key(2))


def sft_batch(seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 96, (8, 12)).astype(np.int32)
    mask = (np.arange(12) < rng.integers(6, 13, (8, 1))).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask, "loss_mask": mask * (np.arange(12) > 3), "row_mask": mask[:, 0]}


def pair_batch():
    names = {"ids": "input_ids", "mask": "attention_mask", "loss_mask": "loss_mask"}
    parts = {"chosen": sft_batch(1), "rejected": sft_batch(2)}
    pairs = {f"{side}_{kind}": rows[name] for side, rows in parts.items() for kind, name in names.items()}
    return pairs | {"row_mask": np.ones(8, np.int32)}


def steps(model, batch, objective, mesh, count=2):
    trainable, _ = split_trainable(model.params, model.module)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, weight_decay=0.1), 10, trainable)
    # a copy, because the step takes the state's arrays
    state = init_state(model.replace(params=jax.tree.map(jnp.copy, model.params)), optimizer, mesh)
    losses = []
    for _ in range(count):
        state, metrics = train_step(
            state, place_batch(batch, mesh), jax.random.key(0), objective=objective, micro_batches=1
        )
        losses.append(float(metrics["loss"]))
    return state, losses


def changed(before, after):
    """Paths of the leaves that are not bit for bit the same."""
    before, after = (flatten_dict(jax.device_get(x), sep="/") for x in (before, after))
    assert before.keys() == after.keys()
    return {path for path in before if before[path].tobytes() != after[path].tobytes()}


def shapes(tree):
    return sorted(x.shape for x in jax.tree.leaves(tree) if x.ndim)


@pytest.fixture(scope="module")
def single():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def trained(single):
    """(state, losses) of two SFT steps with the default adapters, on one device."""
    return steps(tiny(), sft_batch(), SFT, single)


def check_training(model, state, losses, expected):
    assert changed(model.params, state.params) == expected
    assert losses[1] < losses[0]
    trainable, frozen = split_trainable(model.params, model.module)
    assert set(flatten_dict(trainable, sep="/")) == expected
    assert not set(flatten_dict(frozen)) & set(flatten_dict(trainable))
    assert shapes(state.opt_state) == sorted(2 * shapes(trainable))


def test_only_adapters_change_and_have_optimizer_state(trained):
    model = tiny()
    check_training(model, *trained, {p for p in flatten_dict(model.params, sep="/") if "lora_" in p})


def test_a_reward_models_head_is_trained_with_the_adapters(single):
    model = tiny("scalar", targets=("query", "mlp/up"))
    expected = {f"layers/{m}/lora_{x}" for m in ("attn/query", "mlp/up") for x in "ab"} | {"score/kernel"}
    check_training(model, *steps(model, pair_batch(), reward.objective(reward.RewardLoss())[0], single), expected)


def test_the_gradient_is_that_of_the_merged_weights_seen_through_the_factors(single):
    # dL/dA = scale · dL/dW Bᵀ, dL/dB = scale · Aᵀ dL/dW
    model = tiny(targets=("mlp/up",), alpha=3.0)
    rng = np.random.default_rng(0)
    up = model.params["layers"]["mlp"]["up"]
    up["lora_b"] = jnp.asarray(rng.normal(0, 0.1, up["lora_b"].shape), jnp.float32)
    batch = {k: jnp.asarray(v) for k, v in sft_batch().items()}
    whole = merged(model)

    def loss(params, module):
        return sft_loss(module, params, batch, token_count(batch), None)[0]

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    ours = gradient(model.params, model.module)["layers"]["mlp"]["up"]
    dense = gradient(whole.params, whole.module)["layers"]["mlp"]["up"]["kernel"]
    a, b = up["lora_a"], up["lora_b"]
    np.testing.assert_allclose(ours["lora_a"], 1.5 * dense @ b.swapaxes(1, 2), rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(ours["lora_b"], 1.5 * a.swapaxes(1, 2) @ dense, rtol=1e-4, atol=1e-8)


def test_the_mesh_does_not_change_the_result(trained):
    mesh = make_mesh(1, 4, 2)
    one, losses = trained
    many, sharded = steps(tiny(mesh=mesh), sft_batch(), SFT, mesh)
    np.testing.assert_allclose(sharded, losses, rtol=1e-6)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(compare, jax.device_get(many.params), jax.device_get(one.params))
    down = many.params["layers"]["mlp"]["down"]
    assert down["lora_a"].sharding.spec[1] == ("tensor", "fsdp")
    moments = [x for x in jax.tree.leaves(many.opt_state) if x.shape == down["lora_a"].shape]
    assert down["lora_a"].sharding in [x.sharding for x in moments]


def test_adapter_dropout_makes_steps_random(trained, single):
    dropped = tiny(dropout=0.5)
    assert has_dropout(dropped.module)
    assert not has_dropout(tiny().module)
    state, _ = trained
    other, _ = steps(dropped, sft_batch(), SFT, single)
    assert changed(state.params, other.params)
    assert changed(base_leaves(state.params), base_leaves(other.params)) == set()


TOKENIZER = SimpleNamespace(
    eos_token_id=2, bos_token_id=1, pad_token_id=0, decode=lambda ids, **_: " ".join(map(str, ids))
)


def prompts():
    ids = np.random.default_rng(3).integers(3, 96, (8, 6)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[::2, :2] = 0
    return {"prompt_ids": ids * mask, "prompt_mask": mask}


def test_ppo_trains_adapters_and_shares_the_base_with_reference_and_reward_model():
    config = PPOConfig.create(
        lora_r=2,
        critic_lora_r=3,
        lora_target_modules=("q_proj", "down_proj"),
        max_prompt_seq_len=6,
        max_answer_seq_len=5,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        critic_learning_rate=1e-2,
        enable_ema=True,
        mesh_fsdp=4,
        mesh_tensor=2,
    )
    actor = create_model(config_from_dict(SHAPE), key=jax.random.key(1), dtype=jnp.float32)
    reward = create_model(config_from_dict(SHAPE), head="scalar", key=jax.random.key(4), dtype=jnp.float32)
    engine = RLHFEngine(actor, reward, TOKENIZER, 10, config)
    trainer = PPOTrainer(engine)
    state = engine.state
    start = jax.device_get({"actor": state.actor_params, "critic": state.critic_params})
    trainable = split_trainable(state.actor_params, state.actor)[0]
    assert shapes(state.actor_opt_state) == sorted(2 * shapes(trainable))
    assert jax.tree.structure(state.ema_params) == jax.tree.structure(trainable)

    programs = (generate, score_rollout, ppo_step)
    compiled = [program._cache_size() for program in programs]
    first = trainer.generate_experience(prompts())
    reference = engine.models(state).reference.params
    assert jax.tree.structure(reference) == jax.tree.structure(actor.params)
    base = base_leaves(state.actor_params)
    assert all(a is b for a, b in zip(jax.tree.leaves(reference), jax.tree.leaves(base), strict=True))
    trainer.train_rlhf(first)
    assert trainer.metrics["objective/kl"] == 0
    assert trainer.metrics["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert trainer.metrics["val/ratio_var"] == pytest.approx(0, abs=1e-9)
    second = trainer.generate_experience(prompts())
    trainer.train_rlhf(second)
    assert trainer.metrics["objective/kl"] != 0
    # a state that came out of a step is one that may go in: nothing is compiled twice
    assert [program._cache_size() for program in programs] == [n + 1 for n in compiled]

    state = engine.state
    moved = {f"layers/{m}/lora_{x}" for m in ("attn/query", "mlp/down") for x in "ab"}
    assert changed(start["actor"], state.actor_params) == moved
    head = {p for p in flatten_dict(start["critic"], sep="/") if "lora" in p} | {"score/kernel"}
    assert changed(start["critic"], state.critic_params) == head
    # reference and reward model are still the first ones, in every bit
    models = engine.models(state)
    assert changed(jax.device_get(actor.params), models.reference.params) == set()
    assert changed(jax.device_get(reward.params), models.reward.params) == set()
    assert jax.tree.structure(engine.actor_model(ema=True).params) == jax.tree.structure(state.actor_params)
    assert len(changed(trainable_of(engine.actor_model(ema=True)), trainable_of(engine.actor_model()))) == 4


def trainable_of(model):
    return split_trainable(model.params, model.module)[0]


@pytest.mark.parametrize("rank", (0, 1))
def test_the_reward_models_head_is_not_rounded_to_the_compute_dtype(rank):
    actor = create_model(config_from_dict(SHAPE), key=jax.random.key(1), dtype=jnp.bfloat16)
    reward = create_model(config_from_dict(SHAPE), head="scalar", key=jax.random.key(4), dtype=jnp.bfloat16)
    config = PPOConfig.create(critic_lora_r=rank, max_prompt_seq_len=6, max_answer_seq_len=5, dtype="bfloat16")
    engine = RLHFEngine(actor, reward, TOKENIZER, 1, config)
    params = engine.models(engine.state).reward.params
    np.testing.assert_array_equal(params["score"]["kernel"], reward.params["score"]["kernel"])
    up = params["layers"]["mlp"]["up"]["kernel"]
    assert up.dtype == jnp.bfloat16  # shared with the critic, or a copy


def test_a_model_that_brings_adapters_is_merged_before_ppo(single):
    given = tiny()
    given.params["layers"]["mlp"]["up"]["lora_b"] += 0.1
    reward = create_model(config_from_dict(SHAPE), head="scalar", key=jax.random.key(4), dtype=jnp.float32)
    config = PPOConfig.create(lora_r=1, max_prompt_seq_len=6, max_answer_seq_len=5)
    engine = RLHFEngine(given, reward, TOKENIZER, 1, config)
    reference = engine.models(engine.state).reference.params
    jax.tree.map(np.testing.assert_array_equal, reference, merged(given).params)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a tiny language model with its tokenizer, and a file of rows."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("base")
    demo = materialize_demo(folder / "cache")
    tokenizer = AutoTokenizer.from_pretrained(demo.tokenizer)
    config = config_from_dict(SHAPE | {"vocab_size": len(tokenizer)})
    save_pretrained(create_model(config, key=jax.random.key(1)), folder / "model", tokenizer)
    rows = demo.train.read_text(encoding="utf-8").splitlines()[:40]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def sft_config(base, output, **changes):
    return SFTConfig.create(
        **{
            "model_name_or_path": str(base / "model"),
            "data_path": (str(base / "rows.jsonl"),),
            "data_cache_dir": str(base / "cache"),
            "output_dir": str(output),
            "max_length": 64,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "max_steps": 4,
            "save_steps": 2,
            "learning_rate": 1e-2,
            "lora_r": 2,
            "lora_dropout": 0.1,
            "lora_export": "both",
        }
        | changes
    )


def test_a_resumed_run_equals_the_uninterrupted_one_and_exports_model_and_adapter(base, tmp_path):
    state = train_sft(sft_config(base, tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(list_checkpoints(tmp_path / "again")[-1])
    resumed = train_sft(sft_config(base, tmp_path / "again", resume=True))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="lora"):
        train_sft(sft_config(base, tmp_path / "again", resume=True, lora_alpha=7.0, max_steps=4))

    start = load_pretrained(base / "model")
    whole = load_pretrained(tmp_path / "run")
    adapter = load_adapter(start, tmp_path / "run" / "adapter")
    note = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert note["base_model_name_or_path"] == str(base / "model")
    jax.tree.map(np.testing.assert_array_equal, adapter.params, jax.device_get(state.params))
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # noqa: E731
    jax.tree.map(compare, whole.params, merged(adapter).params)
    assert changed(start.params, whole.params) == {
        f"layers/{p}/kernel"
        for p in ("attn/query", "attn/key", "attn/value", "attn/out", "mlp/up", "mlp/gate", "mlp/down")
    }


def test_new_tokens_are_trained_with_the_adapters_and_the_adapter_folder_is_a_model(base, tmp_path):
    options = {"chat_template": "chatml", "max_steps": 2, "save_steps": 1}
    state = train_sft(sft_config(base, tmp_path / "run", **options))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(list_checkpoints(tmp_path / "again")[-1])
    resumed = train_sft(sft_config(base, tmp_path / "again", resume=True, **options))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(resumed.params))

    rows, adapter = read_config(base / "model").vocab_size, tmp_path / "run" / "adapter"
    assert state.module.lora.trained_tokens == (rows, rows + 1)
    fresh = np.asarray(state.params["embed"]["embedding"][rows : rows + 2])
    assert (np.asarray(state.params["embed_rows"]["lora_rows"]) != fresh).any(axis=1).all()
    model, ids = load_pretrained(tmp_path / "run"), np.array([[5, rows, 9, rows + 1, 7]])
    expected = np.asarray(model.module.apply({"params": model.params}, ids))
    again = load_pretrained(adapter)
    np.testing.assert_allclose(again.module.apply({"params": again.params}, ids), expected, rtol=1e-4, atol=1e-4)

    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    with torch.no_grad():
        found = theirs(torch.tensor(ids), use_cache=False).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    start = {"model_name_or_path": str(adapter), "max_steps": 1}
    with pytest.raises(InputError, match=r"lora_export=both: the start model .* is an adapter folder"):
        train_sft(sft_config(base, tmp_path / "more", **start))
    more = train_sft(sft_config(base, tmp_path / "more", **start | {"lora_export": "merged"}))
    assert more.module.config.vocab_size == rows + 2 and more.module.lora.trained_tokens == ()


def test_flags_that_cannot_work_are_refused_by_name(tmp_path, base):
    for values, message in (
        ({"lora_r": -1}, "lora_r=-1"),
        ({"lora_r": 2, "lora_alpha": 0.0}, "alpha=0"),
        ({"lora_dropout": 1.0}, "dropout=1"),
        ({"lora_export": "peft"}, "merged, adapter, both"),
    ):
        with pytest.raises(InputError, match=message):
            SFTConfig.create(**values)
    with pytest.raises(InputError, match="ppo never drops out"):
        PPOConfig.create(lora_r=2, lora_dropout=0.1)
    with pytest.raises(InputError, match="critic_lora_r=-2"):
        PPOConfig.create(critic_lora_r=-2)
    values = {"output_dir": str(tmp_path / "x"), "actor_model_name_or_path": "lm", "data_path": ["demo"]}
    config = RLHFConfig.create(**values | {"reward": {"lora_r": 1, "lora_export": "adapter"}})
    with pytest.raises(InputError, match=r"reward.lora_export=adapter: the next step needs the merged model"):
        train_rlhf(config)
    with pytest.raises(InputError, match="'c_attn' matches no linear map of llama"):
        train_sft(sft_config(base, tmp_path / "y", lora_target_modules=("c_attn",)))


def test_weight_decay_counts_adapters_as_matrices():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, weight_decay=0.5), 1, trainable_of(tiny()))
    params = trainable_of(tiny())
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, old / 2, rtol=1e-6),
        optax.apply_updates(params, updates),
        params,
    )
