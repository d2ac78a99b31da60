"""The trainers as runs: exact resumption, exports, refused input, and a loop of one's own."""

import json
import shutil
import signal
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest

from jaxrlhf.config.files import read_jsonl
from jaxrlhf.data import eval_batches
from jaxrlhf.data.demo import train_tokenizer
from jaxrlhf.errors import InputError, Interrupted, Preempted, TrainingDiverged
from jaxrlhf.models import load_pretrained, save_pretrained, with_head
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.run import train_ppo
from jaxrlhf.rl.trainer import PPOTrainer
from jaxrlhf.runs.checkpoints import list_checkpoints
from jaxrlhf.trainers import evaluation
from jaxrlhf.trainers.distill import DistillConfig, train_distill
from jaxrlhf.trainers.dpo import DPOConfig, train_dpo
from jaxrlhf.trainers.kto import KTOConfig, train_kto
from jaxrlhf.trainers.reward import RewardConfig, train_reward
from jaxrlhf.trainers.sft import SFTConfig, train_sft

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("no_report")]

STEPS = 10
TRAINERS = {"sft": (train_sft, SFTConfig), "reward": (train_reward, RewardConfig), "ppo": (train_ppo, PPOConfig)}
TRAINERS |= {"dpo": (train_dpo, DPOConfig), "kto": (train_kto, KTOConfig), "distill": (train_distill, DistillConfig)}
MODEL = {
    "sft": {"model_name_or_path": "lm", "gradient_accumulation_steps": 2},
    "reward": {"model_name_or_path": "lm"},
    "dpo": {"model_name_or_path": "lm", "gradient_accumulation_steps": 2},
    "kto": {"model_name_or_path": "lm", "gradient_accumulation_steps": 2, "precompute_ref_log_probs": True},
    "distill": {"model_name_or_path": "lm", "teacher_model_name_or_path": "lm", "gradient_accumulation_steps": 2}
    | {"lmbda": 0.5, "max_new_tokens": 8},
    "ppo": {"actor_model_name_or_path": "lm", "critic_model_name_or_path": "reward"}
    | {"max_answer_seq_len": 8, "ppo_epochs": 2, "num_mini_batches": 2, "enable_ema": True, "sample_steps": 4},
}


@pytest.fixture(scope="module")
def train(demo):
    """`train("sft", folder, **options)`: a run on the demo data, on all devices, with every batch of one shape."""

    def start(name, folder, **options):
        run, config = TRAINERS[name]
        model = {k: getattr(demo, v) if k.endswith("_path") else v for k, v in MODEL[name].items()}
        common = {"data_path": demo.train, "eval_data_path": demo.eval, "data_cache_dir": demo.cache, "seed": 3}
        common |= {"max_length": 32, "max_prompt_seq_len": 32, "max_train_samples": 70, "max_eval_samples": 10}
        common |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 2, "max_steps": STEPS}
        common |= {"learning_rate": 1e-3, "warmup_steps": 2, "output_dir": str(folder), "logging_steps": 100}
        return run(config.create(**(common | model | options)))

    return start


@pytest.fixture(scope="module", params=sorted(TRAINERS))
def finished(request, train, tmp_path_factory):
    """A whole run of one trainer: its name, final state on the host, and folder."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)
        state = train(request.param, folder)
    return SimpleNamespace(name=request.param, state=jax.device_get(state), folder=folder)


def figures(folder) -> list[dict]:
    """The records of metrics.jsonl without what a clock or a process says."""
    measured = ("time", "perf/tokens_per_second", "perf/sequences_per_second", "perf/peak_memory_gib")
    return [
        {k: v for k, v in record.items() if k not in measured and not k.startswith("timing/")}
        for record in read_jsonl(folder / "metrics.jsonl")
    ]


def leaves(state) -> dict:
    """Every array of a state by its path; what is not data (optimizers, modules) left out."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(state))}


# ---- resumption


def test_ten_steps_equal_five_a_stop_and_five(finished, train, tmp_path, sigint_after, monkeypatch):
    with sigint_after(5), pytest.raises(Interrupted, match="stopped after step 5; continue with --resume"):
        train(finished.name, tmp_path)
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"]
    assert not (tmp_path / "model.safetensors").exists()
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
    shutil.copytree(tmp_path, elsewhere)
    state = train(finished.name, tmp_path, resume=True)
    chex.assert_trees_all_equal(leaves(state), leaves(finished.state))
    expected = figures(finished.folder)
    assert figures(tmp_path) == expected
    resumes_in_another_layout(finished, train, elsewhere)
    steps = [r["step"] for r in expected if not any(k.startswith("eval/") for k in r)]
    assert steps == list(range(1, STEPS + 1))
    assert [r["step"] for r in expected if any(k.startswith("eval/") for k in r)] == [0, STEPS]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (finished.folder / name).read_bytes()


@pytest.mark.parametrize(("number", "when"), [(0, "before the first step"), (2, "after step 2")])
def test_a_stop_in_an_evaluation_ends_it_within_a_batch_and_a_resume_makes_up_for_it(
    train, tmp_path, monkeypatch, number, when
):
    options = {"max_steps": 4, "eval_steps": 2, "packing": False, "per_device_eval_batch_size": 1}
    train("sft", tmp_path / "whole", **options)
    begun, measured = [], []

    def batches(*args, **kwargs):
        begun.append(kwargs)
        for i, batch in enumerate(eval_batches(*args, **kwargs)):
            if len(begun) == number // 2 + 1 and i == 1:
                signal.raise_signal(signal.SIGTERM)  # in this thread: handled before the next line
            yield batch
            measured.append(len(begun))

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "eval_batches", batches)
        with pytest.raises(Preempted, match=f"stopped during the evaluation {when}; continue with --resume"):
            train("sft", tmp_path / "parts", **options)
    assert measured.count(number // 2 + 1) == 1, "the batch at work is finished, the next not begun"
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == ["checkpoint-2"] * (number > 0)
    train("sft", tmp_path / "parts", resume=True, **options)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")


def resumes_in_another_layout(finished, train, folder):
    """On another mesh, in other ZeRO stages and offloaded, the same steps follow up to rounding."""
    layout = {"mesh_data": 2, "mesh_fsdp": 2, "mesh_tensor": 2, "per_device_train_batch_size": 2, "zero_stage": 1}
    layout |= {"offload_optimizer": True, "remat_policy": "dots"}
    if finished.name == "ppo":
        layout |= {"generate_tensor_parallel": 2, "critic_zero_stage": 0, "reference_zero_stage": 3}
        layout |= {"offload_reference_model": True, "offload_reward_model": True}
    state = train(finished.name, folder, resume=True, **layout)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state)}
    assert kinds == {"device", "pinned_host"}
    chex.assert_trees_all_close(leaves(state), leaves(finished.state), rtol=0, atol=1e-3)
    loss = {"ppo": "loss/value_avg"}.get(finished.name, "loss")
    for ours, theirs in zip(figures(folder), figures(finished.folder), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours.get(loss, 0) == pytest.approx(theirs.get(loss, 0), rel=2e-3, abs=1e-5)


def test_a_second_run_in_the_folder_is_refused_and_a_finished_one_resumes_to_itself(finished, train, tmp_path):
    before = sorted(path.name for path in finished.folder.iterdir())
    with pytest.raises(InputError, match=r"already holds a run.*--resume.*--overwrite_output_dir"):
        train(finished.name, finished.folder)
    assert sorted(path.name for path in finished.folder.iterdir()) == before
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    state = train(finished.name, tmp_path, resume=True)
    chex.assert_trees_all_equal(leaves(state), leaves(finished.state))
    assert figures(tmp_path) == figures(finished.folder)


CHANGED = {
    "sft": {
        "learning_rate": 2e-3,
        "disable_dropout": True,
        "seed": 4,
        "max_steps": 11,
        "gradient_accumulation_steps": 1,
    },
    "reward": {
        "weight_decay": 0.1,
        "reward_loss": "tokenwise",
        "per_device_train_batch_size": 2,
        "max_train_samples": 60,
    },
    "dpo": {"beta": 0.2, "loss_type": "ipo", "reference_free": True, "label_smoothing": 0.1},
    "kto": {"beta": 0.2, "loss_type": "apo_zero_unpaired", "desirable_weight": 1.3},
    "distill": {"beta": 0.2, "kd_temperature": 2.0, "teacher_top_k": 8, "lmbda": 0.7},
    "ppo": {"critic_learning_rate": 1.0, "max_answer_seq_len": 7, "ppo_epochs": 1, "kl_coef": 0.5, "temperature": 0.5},
}
NAMED = {
    "max_answer_seq_len": "max_new_tokens",
    "max_steps": "total_steps",
    "gradient_accumulation_steps": "global_batch_size",
}
NAMED |= {"per_device_train_batch_size": "global_batch_size", "max_train_samples": "train_rows"}


def test_a_gap_between_sampler_and_train_program_beyond_rounding_is_told_once(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxrlhf.rl.run.LOGP_TOLERANCE", {"float32": 0.0})
    train("ppo", tmp_path, max_steps=2, importance_sampling_correction=True, enable_ema=False)
    assert capsys.readouterr().err.count("log-probs of the sampler and the train program differ by") == 1
    records = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if "sampling/logp_difference/mean" in r]
    for record in records:
        low, mean, high = (record[f"sampling/importance_sampling_ratio/{k}"] for k in ("min", "mean", "max"))
        assert 0.999 < low < mean < high < 1.001


def test_a_changed_setting_is_refused_by_name(finished, train):
    for name, value in CHANGED[finished.name].items():
        with pytest.raises(
            InputError, match=rf"cannot resume .*{NAMED.get(name, name)}: .* then, .* now.*another folder"
        ):
            train(finished.name, finished.folder, resume=True, **{name: value})


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_checkpoint_and_export(train, demo, tmp_path):
    older = {name: (demo.folder / "lm" / name).read_bytes() for name in ("model.safetensors", "config.json")}
    for name, content in older.items():
        (tmp_path / name).write_bytes(content)
    options = {"overwrite_output_dir": True, "learning_rate": 1e9, "warmup_steps": 0, "save_steps": 1}
    options |= {"max_steps": 9, "save_total_limit": 1}
    said = r"step 4: .*loss.* non-finite in 3 steps in a row.*nonfinite-step-4.npz.*learning rate.*--resume"
    with pytest.raises(TrainingDiverged, match=said):
        train("sft", tmp_path, **options)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]
    assert {name: (tmp_path / name).read_bytes() for name in older} == older
    saved = np.load(tmp_path / "nonfinite-step-4.npz")
    assert saved["input_ids"].shape == saved["loss_mask"].shape and saved["loss_mask"].any()
    skipped = [r["guard/skipped_updates"] for r in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in r]
    assert skipped == [0, 1, 1, 1]


def test_the_summary_tells_what_training_did(finished):
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert (summary["trainer"], summary["steps"]) == (finished.name, STEPS)
    assert set(summary["eval_before"]) == set(summary["eval_after"])
    assert summary["eval_before"] != summary["eval_after"]
    if finished.name == "sft":
        assert summary["eval_after"]["loss"] < summary["eval_before"]["loss"] - 0.1


# ---- exports


def furthest(tree, other) -> float:
    """The largest difference between two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), tree, other)))


def final(finished):
    return finished.state.actor_params if finished.name == "ppo" else finished.state.params


def test_the_export_holds_the_final_parameters(finished, demo):
    head = "scalar" if finished.name == "reward" else "lm"
    loaded = load_pretrained(finished.folder, head=head, new_head=False)
    chex.assert_trees_all_equal(jax.device_get(loaded.params), final(finished))
    assert loaded.config.eos_token_id == demo.tokenizer.eos_token_id
    assert (finished.folder / "tokenizer.json").exists()
    if finished.name == "ppo":
        critic = load_pretrained(finished.folder / "critic", head="scalar", new_head=False)
        chex.assert_trees_all_equal(jax.device_get(critic.params), finished.state.critic_params)
        ema = load_pretrained(finished.folder / "ema")
        chex.assert_trees_all_equal(jax.device_get(ema.params), finished.state.ema_params)
        start = load_pretrained(demo.lm)
        for tree in (final(finished), finished.state.ema_params):
            assert furthest(tree, start.params) > 2e-3
        start = load_pretrained(demo.reward, head="scalar")
        assert 1e-5 < furthest(finished.state.critic_params, start.params) < 5e-4, "the critic has a rate of its own"


def test_transformers_reads_the_export_and_computes_the_same(finished, demo):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    ids = np.random.default_rng(0).integers(2, 400, (3, 9))
    ids[0, 6:] = demo.tokenizer.pad_token_id
    mask = ids != demo.tokenizer.pad_token_id
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask.astype(int))}
    head = "scalar" if finished.name == "reward" else "lm"
    module = load_pretrained(finished.folder, head=head).module
    ours = np.asarray(module.apply({"params": final(finished)}, ids, mask))
    with torch.no_grad():
        if head == "lm":
            theirs = AutoModelForCausalLM.from_pretrained(finished.folder).eval()(**inputs).logits.numpy()
            theirs, ours = theirs[mask], ours[mask]
        else:
            model = AutoModelForSequenceClassification.from_pretrained(finished.folder, num_labels=1).eval()
            theirs = model(**inputs).logits.numpy()[:, 0]
            ours = ours[np.arange(3), mask.sum(1) - 1]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


# ---- bad input


def test_a_built_in_chat_template_on_a_base_model_reaches_every_file_of_the_export(train, demo, tmp_path, caplog):
    import transformers

    caplog.set_level("INFO", "jaxrlhf")
    train("sft", tmp_path / "run", max_steps=1, chat_template="chatml", system_prompt="Be kind.")
    size = demo.options["vocab_size"]
    assert "chat_template chatml: 2 rows added to the model" in caplog.text
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    files = [json.loads((tmp_path / "run" / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert [file["eos_token_id"] for file in files] == [[end, 1], [end, 1]]  # the base model's own EOS stays one
    assert (len(tokenizer), tokenizer.eos_token_id) == (size + 2, end)
    assert load_pretrained(tmp_path / "run").config.vocab_size == size + 2
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    options = {"actor_model_name_or_path": str(tmp_path / "run"), "chat_template": "chatml", "max_steps": 1}
    with pytest.raises(InputError, match=r"'<\|im_start\|>' has the id 512 for the actor and does not exist"):
        train("ppo", tmp_path / "ppo", **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sft", {"model_name_or_path": "no/such/folder"}, r"no/such/folder"),
        ("sft", {"model_name_or_path": None}, r"exactly one of model_name_or_path .* and model_type"),
        ("sft", {"output_dir": ""}, r"output_dir: name the folder"),
        ("sft", {"data_path": ()}, r"data_path: no data given; name a file"),
        ("sft", {"max_length": 97}, r"max_length of 97 tokens exceeds the model's context of 96; lower it"),
        ("reward", {"max_length": 97}, r"max_length of 97 tokens exceeds"),
        ("ppo", {"actor_model_name_or_path": None}, r"actor_model_name_or_path: name a model folder"),
        ("ppo", {"critic_model_name_or_path": None}, r"reward_model_name_or_path: name a model folder"),
        ("ppo", {"actor_model_name_or_path": "no/such/folder"}, r"no/such/folder"),
        (
            "ppo",
            {"generate_tensor_parallel": 3, "mesh_fsdp": 8},
            r"generate_tensor_parallel=3 does not divide the model's num_heads=4",
        ),
        (
            "ppo",
            {"generate_tensor_parallel": 2, "mesh_tensor": 4, "mesh_fsdp": 2},
            r"generate_tensor_parallel=2 .* 4, 8",
        ),
        ("ppo", {"offload_reference_model": True, "lora_r": 2}, r"offload_reference_model=True: with LoRA .* base"),
        ("ppo", {"reward_zero_stage": 1, "critic_lora_r": 2}, r"reward_zero_stage=1: with LoRA .* base"),
        ("ppo", {"attention_implementation": "fast"}, r"attention_implementation='fast' .*auto, xla, pallas"),
        ("ppo", {"kv_cache_dtype": "int4"}, r"kv_cache_dtype='int4' .*auto, int8, fp8"),
        ("ppo", {"logprob_implementation": "cudnn"}, r"logprob_implementation='cudnn' .*auto, xla, pallas"),
        (
            "sft",
            {"attention_implementation": "cudnn", "packing": False},
            r"attention_implementation: .*'cudnn' .* not on cpu",
        ),
        ("sft", {"attention_implementation": "cudnn"}, r"'cudnn' .* cannot see the segments .* packing: false"),
        ("sft", {"eval_data_path": "missing.jsonl"}, r"^eval_data_path 'missing.jsonl': no such file"),
        ("reward", {"attention_implementation": "cudnn"}, r"attention_implementation: .*'cudnn' .* not on cpu"),
        ("ppo", {"generation_slots": 3, "generate_tensor_parallel": 4}, r"slots=3 must be a multiple of 2"),
        ("ppo", {"critic_zero_stage": 4}, r"critic_zero_stage=4 must be .*0, 1, 2, 3"),
        (
            "ppo",
            {"importance_sampling_cap": 0.0, "importance_sampling_correction": True},
            r"importance_sampling_cap=0.0 must be",
        ),
        ("ppo", {"max_answer_seq_len": 65}, r"max_prompt_seq_len \+ max_new_tokens for the actor of 97 tokens.*96"),
    ],
)
def test_unusable_settings_stop_with_a_message_and_leave_no_run(name, options, message, train, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(InputError, match=message):
        train(name, folder, **options)
    assert not (folder / "metrics.jsonl").exists()


def test_a_language_model_is_no_reward_model(train, demo, tmp_path):
    with pytest.raises(InputError, match=r"no scalar head.*language model, not a reward model.*jaxrlhf reward"):
        train("ppo", tmp_path / "run", critic_model_name_or_path=demo.lm)


def test_tokenizers_that_differ_are_refused_and_padded_embeddings_are_not(train, demo, lab, tmp_path):
    other = train_tokenizer(["quite another text, of the same number of tokens"] * 3, demo.options["vocab_size"])
    save_pretrained(lab.tiny_model(demo.options, "scalar"), tmp_path / "other", other)
    with pytest.raises(InputError, match=r"the actor and the reward model have different tokenizers: \d+ of"):
        train("ppo", tmp_path / "run", critic_model_name_or_path=str(tmp_path / "other"))
    options = demo.options | {"vocab_size": demo.options["vocab_size"] + 90}
    save_pretrained(lab.tiny_model(options, "scalar"), tmp_path / "padded", demo.tokenizer)
    train("ppo", tmp_path / "padded-run", critic_model_name_or_path=str(tmp_path / "padded"), max_steps=1)
    small = demo.options | {"vocab_size": 100}
    save_pretrained(lab.tiny_model(small), tmp_path / "small", demo.tokenizer)
    with pytest.raises(InputError, match=r"the tokenizer of .* has \d+ tokens, the model only 100"):
        train("sft", tmp_path / "run", model_name_or_path=str(tmp_path / "small"))
    with pytest.raises(InputError, match=r"the tokenizer has \d+ tokens, the actor only 100"):
        train("ppo", tmp_path / "run", actor_model_name_or_path=str(tmp_path / "small"))
    save_pretrained(lab.tiny_model(small, "scalar"), tmp_path / "small-reward", demo.tokenizer)
    with pytest.raises(InputError, match=r"has \d+ tokens, the reward model only 100"):
        train("ppo", tmp_path / "run", critic_model_name_or_path=str(tmp_path / "small-reward"))


def own_config() -> PPOConfig:
    """As in the runs above, so that nothing new is compiled."""
    sizes = {name: value for name, value in MODEL["ppo"].items() if not name.endswith("_path")}
    return PPOConfig.create(max_prompt_seq_len=32, learning_rate=1e-3, warmup_steps=2, seed=3, **sizes)


@pytest.fixture
def own_loop(demo):
    """An RLHFEngine and its trainer, as a notebook makes them."""
    config = own_config()
    engine = RLHFEngine(demo.lm, demo.reward, demo.tokenizer, num_total_iters=STEPS, config=config)
    return PPOTrainer(engine)


def test_a_loop_of_ones_own_generates_with_the_trained_parameters(own_loop, lab):
    ids, mask = lab.prompts(rows=16, width=32, vocab=400)
    batch = {"prompt_ids": ids, "prompt_mask": mask}
    before = jax.device_get(own_loop.engine.state.actor_params)
    experience = own_loop.generate_experience(batch)
    assert (np.asarray(experience.logprobs) == np.asarray(own_loop.generate_experience(batch).logprobs)).all()
    losses = own_loop.train_rlhf(experience)
    assert losses == (own_loop.metrics["loss/policy_avg"], own_loop.metrics["loss/value_avg"])
    assert own_loop.engine.actor.params is None, "the state alone has them"
    after = jax.device_get(own_loop.engine.state.actor_params)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    again = own_loop.generate_experience(batch)
    assert own_loop.metrics["sampling/logp_difference/max"] < 1e-4
    assert (np.asarray(again.tokens) != np.asarray(experience.tokens)).any(), "draws are keyed by the step"


def test_a_prompt_batch_that_minibatches_do_not_divide_is_refused_before_it_is_generated(own_loop, lab):
    ids, mask = lab.prompts(rows=15, width=32, vocab=400)
    with pytest.raises(InputError, match=r"num_mini_batches=2 .*must divide the rollout batch of 15 rows"):
        own_loop.generate_experience({"prompt_ids": ids, "prompt_mask": mask})


def test_every_model_of_ppo_takes_the_kernels_that_were_asked_for(demo):
    options = {"attention_implementation": "pallas", "logprob_implementation": "pallas", "kv_cache_dtype": "int8"}
    config = own_config().replace(**options)
    engine = RLHFEngine(demo.lm, demo.reward, demo.tokenizer, num_total_iters=STEPS, config=config)
    models = engine.models(engine.state)
    modules = [model.module for model in (models.actor, models.reference, models.critic, models.reward)]
    for module in (engine.actor.module, engine.state.critic, *modules):
        assert {name: getattr(module, name) for name in options} == options


def test_given_models_may_share_a_body_and_stay_usable(demo, lab):
    actor = load_pretrained(demo.lm, mesh=lab.mesh_of(fsdp=8))
    reward = with_head(actor, "scalar", jax.random.key(1))
    trainer = PPOTrainer(RLHFEngine(actor, reward, demo.tokenizer, num_total_iters=STEPS, config=own_config()))
    ids, mask = lab.prompts(rows=16, width=32, vocab=400)
    trainer.train_rlhf(trainer.generate_experience({"prompt_ids": ids, "prompt_mask": mask}))
    assert not any(x.is_deleted() for x in jax.tree.leaves((actor.params, reward.params)))
