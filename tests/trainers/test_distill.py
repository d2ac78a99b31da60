"""Distillation: the divergence and its gradient against torch, packed and cut-up rows, runs, and what it refuses."""

import contextlib
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import keys, objectives
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.data import DataConfig, load_data
from jaxrlhf.engine import GenerationConfig, HybridEngine, Rollout, SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import decoder as decoders
from jaxrlhf.models import load_pretrained
from jaxrlhf.sharding import make_mesh
from jaxrlhf.trainers.distill import DistillConfig, Divergence, distill_loss, teacher_logprobs, train_distill
from jaxrlhf.trainers.on_policy import OnPolicy, OwnResponses
from jaxrlhf.trainers.on_policy import rows_of as sampled_rows
from jaxrlhf.trainers.rollouts import PiecesConfig
from jaxrlhf.trainers.teachers import attach_teacher

torch = pytest.importorskip("torch")
BETAS = (0.0, 0.3, 0.5, 1.0)


def torch_divergence(teacher, student, beta):
    """From whole distributions, by torch's own KL in float64."""
    kl = lambda p, q: torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)  # noqa: E731
    if beta in (0.0, 1.0):
        return kl(student, teacher) if beta else kl(teacher, student)
    mixture = torch.log(beta * teacher.exp() + (1 - beta) * student.exp())
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


@pytest.mark.parametrize("beta", BETAS)
def test_the_divergence_of_whole_distributions_is_torchs_in_value_and_gradient(beta):
    logits = np.random.default_rng(0).normal(scale=2, size=(2, 5, 11))
    teacher, student = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in logits)
    theirs = torch.tensor(logits[1], requires_grad=True)
    expected = torch_divergence(torch.tensor(logits[0]).log_softmax(-1), theirs.log_softmax(-1), beta)
    expected.sum().backward()
    found = objectives.divergence(teacher, student, beta)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5, atol=2e-6)
    gradient = jax.grad(lambda x: objectives.divergence(teacher, jax.nn.log_softmax(x), beta).sum())
    np.testing.assert_allclose(gradient(jnp.asarray(logits[1], jnp.float32)), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_outcomes_that_are_not_told_apart_are_one(beta):
    """The result is that of distributions in which these outcomes are added up, and so never above the whole one."""
    logits = np.random.default_rng(1).normal(scale=2, size=(2, 50, 11))
    teacher, student = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in logits)

    def added(x):
        p = np.exp(np.asarray(x, np.float64))
        return torch.tensor(np.log(np.concatenate([p[:, :4], p[:, 4:].sum(-1, keepdims=True)], axis=-1)))

    found = objectives.divergence(teacher[:, :4], student[:, :4], beta)
    expected = torch_divergence(added(teacher), added(student), beta)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (found <= objectives.divergence(teacher, student, beta) + 1e-5).all()


@pytest.fixture(scope="module")
def models(demo):
    """A teacher, and a student of the same shape with other weights."""
    teacher = load_pretrained(demo.lm)
    leaves, structure = jax.tree.flatten(teacher.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return teacher, teacher.replace(params=structure.unflatten(moved))


def rows_of(teacher, batch=4, length=13, top_k=0):
    ids = np.random.default_rng(2).integers(3, teacher.config.vocab_size, size=(batch, length)).astype(np.int32)
    lengths = np.arange(batch)[:, None] + length - batch + 1
    mask = (np.arange(length) < lengths).astype(np.int32)
    rows = {"input_ids": ids, "attention_mask": mask, "loss_mask": mask * (np.arange(length) >= 4)}
    found = teacher_logprobs(1.5, top_k, teacher.config.vocab_size, teacher.module, teacher.params, rows)
    return rows | {f"teacher_{name}": values for name, values in found.items()}


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_loss_is_the_mean_divergence_of_both_models_next_tokens(models, beta, monkeypatch):
    """However few columns are worked on at a time; and so is its gradient."""
    teacher, student = models
    rows = rows_of(teacher)

    def whole(params):
        logits = [
            m.module.apply({"params": p}, rows["input_ids"], rows["attention_mask"], contiguous=True)
            for m, p in ((teacher, teacher.params), (student, params))
        ]
        p, q = (jax.nn.log_softmax(x[:, :-1] / 1.5) for x in logits)
        values = objectives.divergence(p, q, beta)
        mask = rows["loss_mask"][:, 1:]
        return jnp.sum(values * mask) / mask.sum()

    expected, gradient = jax.value_and_grad(whole)(student.params)
    settings, count = Divergence(beta, 1.5), rows["loss_mask"].sum()
    for elements in (decoders.READ_ELEMENTS, 4 * teacher.config.vocab_size * 5, 1):
        monkeypatch.setattr(decoders, "READ_ELEMENTS", elements)
        loss = lambda params: distill_loss(settings, student.module, params, rows, count, None)[0]  # noqa: E731
        found, own = jax.value_and_grad(loss)(student.params)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), own, gradient)


def test_the_teachers_most_likely_tokens_are_those_of_its_logits(models):
    teacher, _ = models
    rows = rows_of(teacher, top_k=5)
    logits = teacher.module.apply(
        {"params": teacher.params}, rows["input_ids"], rows["attention_mask"], contiguous=True
    )
    logps, ids = jax.lax.top_k(jax.nn.log_softmax(logits / 1.5), 5)
    np.testing.assert_array_equal(rows["teacher_ids"][:, 1:], ids[:, :-1])
    np.testing.assert_allclose(rows["teacher_logps"][:, 1:], logps[:, :-1], rtol=1e-5, atol=1e-6)
    narrow = teacher_logprobs(1.0, 5, 20, teacher.module, teacher.params, rows)
    assert narrow["ids"].max() < 20, "a student with fewer rows in its vocabulary"


@pytest.fixture
def train(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)

    def start(**options):
        common = {"data_path": demo.train, "eval_data_path": demo.eval, "data_cache_dir": demo.cache, "seed": 3}
        common |= {"max_length": 32, "max_train_samples": 70, "max_eval_samples": 10, "output_dir": str(tmp_path)}
        common |= {"teacher_model_name_or_path": demo.lm, "per_device_train_batch_size": 2}
        common |= {"per_device_eval_batch_size": 2}
        if "model_name_or_path" not in options:
            common |= {"model_type": "gpt2", "tokenizer_name_or_path": demo.lm, "config_overrides": demo.options}
        train_distill(DistillConfig.create(**(common | options)))
        return read_jsonl(Path(options.get("output_dir", tmp_path)) / "metrics.jsonl")

    return start


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [{"packing": False, "gradient_accumulation_steps": 2}, {"packing": True, "beta": 0.0}]
)
def test_a_student_comes_near_its_teacher(train, tmp_path, options):
    records = train(max_steps=30, learning_rate=3e-3, **options)
    before, after = (record["eval/loss"] for record in records if "eval/loss" in record)
    assert after < 0.7 * before
    assert json.loads((tmp_path / "summary.json").read_text())["trainer"] == "distill"


@pytest.mark.long
def test_a_teacher_that_is_the_student_teaches_nothing(train, demo):
    records = train(max_steps=2, learning_rate=0.0, model_name_or_path=demo.lm)
    losses = [record["eval/loss"] for record in records if "eval/loss" in record]  # without dropout
    assert losses == pytest.approx([0, 0], abs=1e-6)


def test_what_is_refused(demo):
    with pytest.raises(InputError, match="teacher_model_name_or_path: name the teacher"):
        train_distill(DistillConfig.create(data_path=demo.train, output_dir="out", model_name_or_path=demo.lm))
    for options in ({"beta": 1.5}, {"kd_temperature": 0.0}, {"teacher_top_k": -1}):
        with pytest.raises(InputError, match=next(iter(options))):
            DistillConfig.create(teacher_model_name_or_path=demo.lm, **options)
    with pytest.raises(InputError, match="head"):
        train_distill(
            DistillConfig.create(
                data_path=demo.train,
                max_length=32,
                output_dir="out",
                model_name_or_path=demo.lm,
                teacher_model_name_or_path=demo.reward,
            )
        )


# ---- the student's own responses


@pytest.fixture(scope="module")
def on_policy(demo):
    """The steps of a run whose responses the student samples, its start model, and its rows beside plain prompts."""
    config = DataConfig(data_path=demo.train, data_cache_dir=demo.cache, packing=False, max_length=64, seed=3)
    rows, _ = load_data(config, demo.tokenizer, "sft")
    prompts, _ = load_data(config, demo.tokenizer, "ppo")
    mesh = make_mesh()
    model = load_pretrained(demo.lm, mesh=mesh)
    teacher = model.replace(params=jax.tree.map(lambda x: 1.2 * x, model.params))
    options = OwnResponses(0.25, SamplingConfig(max_new_tokens=6), GenerationConfig())
    run = SimpleNamespace(print=print, status=lambda _: contextlib.nullcontext([]))
    made = {
        name: OnPolicy(run, own, model, mesh, demo.tokenizer, rows, seed=3)
        for name, own in (
            ("steps", options),
            ("pieces", options._replace(pieces=PiecesConfig(generation_batches=2))),
            ("taught", options._replace(teacher=lambda _: teacher)),
        )
    }
    return SimpleNamespace(model=model, teacher=teacher, data=rows, prompts=prompts, **made)


def test_a_rows_prompt_is_the_one_that_ppo_answers(on_policy):
    units = np.arange(8)
    found, expected = on_policy.data.prompt_batch(units), on_policy.prompts.batch(units)
    for name in ("prompt_ids", "prompt_mask"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_sampled_rows_hold_the_prompts_and_what_the_engine_generates(on_policy):
    steps, units = on_policy.steps, np.arange(8)
    sampled = [batch for batch in range(40) if steps.samples(batch)]
    batch, another = sampled[:2]
    rows, metrics = steps.rows(on_policy.model.params, units, batch)
    prompts = on_policy.data.prompt_batch(units)
    key = keys.stream(3, keys.Stream.ROLLOUTS, batch)
    engine = HybridEngine(on_policy.model, steps.mesh)
    rollout = engine.generate(prompts["prompt_ids"], prompts["prompt_mask"], key, steps.sampling)
    tokens, response = np.asarray(rollout.tokens), np.asarray(rollout.response_mask)
    for i in units:
        n = prompts["prompt_mask"][i].sum()
        expected = [*prompts["prompt_ids"][i][-n:], *tokens[i][response[i]]]
        length = rows["attention_mask"][i].sum()
        assert rows["input_ids"][i][:length].tolist() == expected
        assert np.flatnonzero(rows["loss_mask"][i]).tolist() == list(range(n, length))
    assert (rows["row_mask"] == 1).all() and metrics["timing/generate"] > 0 and metrics["sampling/on_policy"] == 1
    for same in (steps, on_policy.pieces, on_policy.taught):
        again, _ = same.rows(on_policy.model.params, units, batch)
        jax.tree.map(np.testing.assert_array_equal, again, rows)
    other, _ = steps.rows(on_policy.model.params, units, another)
    assert (np.asarray(other["input_ids"]) != np.asarray(rows["input_ids"])).any()


def test_the_teacher_samples_the_batches_that_the_student_does_not(on_policy):
    steps, units = on_policy.taught, np.arange(8)
    batch = next(batch for batch in range(40) if not steps.samples(batch))
    assert on_policy.steps.rows(on_policy.model.params, units, batch) == (None, {"sampling/on_policy": 0.0})
    rows, metrics = steps.rows(on_policy.model.params, units, batch)
    prompts = on_policy.data.prompt_batch(units)
    key = keys.stream(3, keys.Stream.ROLLOUTS, batch)
    given = (prompts["prompt_ids"], prompts["prompt_mask"], key, steps.sampling)
    own, taught = (HybridEngine(m, steps.mesh).generate(*given) for m in (on_policy.model, on_policy.teacher))
    assert metrics["sampling/on_policy"] == 0 and (own.tokens != taught.tokens).any()
    vocab_size = on_policy.model.config.vocab_size
    jax.tree.map(np.testing.assert_array_equal, rows, sampled_rows(taught, vocab_size=vocab_size, mesh=steps.mesh))


def test_a_response_ends_before_a_token_that_the_student_lacks():
    """The first row has token 12 of a teacher with more rows; the second has none."""
    tokens = jnp.array([[0, 3, 4, 12, 5], [1, 2, 3, 9, 6]], jnp.int32)
    mask = jnp.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    response = jnp.array([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1]], bool)
    rollout = Rollout(tokens, mask, response, jnp.zeros((2, 5)), prompt_length=2)
    rows = sampled_rows(rollout, vocab_size=10, mesh=make_mesh(devices=jax.devices()[:1]))
    np.testing.assert_array_equal(rows["input_ids"], [[3, 4, 0, 0, 0], [1, 2, 3, 9, 6]])
    np.testing.assert_array_equal(rows["attention_mask"], [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(rows["loss_mask"], [[0, 1, 0, 0, 0], [0, 0, 1, 1, 1]])


def test_lmbda_is_the_share_of_batches_that_the_student_answers(on_policy):
    chosen = [on_policy.steps.samples(batch) for batch in range(400)]
    assert 0.19 < np.mean(chosen) < 0.31 and chosen[:20] == [on_policy.steps.samples(batch) for batch in range(20)]


@pytest.mark.long
def test_a_student_comes_near_its_teacher_on_its_own_responses(train):
    records = train(max_steps=30, learning_rate=3e-3, lmbda=1.0, max_new_tokens=8, beta=1.0)
    before, after = (record["eval/loss"] for record in records if "eval/loss" in record)
    assert after < 0.8 * before
    assert [r["sampling/on_policy"] for r in records if "loss" in r] == [1] * 30


@pytest.mark.long
def test_a_student_comes_near_its_teacher_on_what_the_teacher_says(train):
    records = train(max_steps=30, learning_rate=3e-3, seq_kd=True, max_new_tokens=8, generation_batches=2)
    before, after = (record["eval/loss"] for record in records if "eval/loss" in record)
    assert after < 0.8 * before
    assert [r["sampling/on_policy"] for r in records if "loss" in r] == [0] * 30
    assert all(r["timing/generate"] > 0 for r in records if "loss" in r)
    with pytest.raises(InputError, match="generation_batches=3 must divide the 16 prompts of a rollout batch"):
        train(seq_kd=True, max_new_tokens=8, generation_batches=3, overwrite_output_dir=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmbda": 1.5}, "lmbda=1.5 must be at least 0 and at most 1"),
        ({"lmbda": 0.5, "packing": True}, "lmbda=0.5 with packing"),
        ({"seq_kd": True, "packing": True}, "seq_kd=true with packing"),
        ({"generation_batches": 2}, "generation_batches=2 requires lmbda"),
        ({"max_new_tokens": 8}, "max_new_tokens=8 requires lmbda"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype=int8 requires lmbda"),
        ({"lmbda": 0.5, "samples_per_prompt": 2}, "setting samples_per_prompt has no use here"),
    ],
)
def test_settings_of_sampling_that_nothing_would_use_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DistillConfig.create(teacher_model_name_or_path="teacher", **options)


@pytest.mark.long
def test_rows_without_a_prompt_and_models_without_room_are_refused(train, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "no prompt here"}\n' * 8)
    with pytest.raises(InputError, match=r"lmbda=0.5: \S*text.jsonl line 1 has no prompt"):
        train(lmbda=0.5, data_path=str(text), max_new_tokens=8)
    with pytest.raises(InputError, match=r"max_length \+ max_new_tokens for the student of 132 tokens exceeds"):
        train(lmbda=0.5, max_new_tokens=100, overwrite_output_dir=True)


# ---- the teacher's log-probs in a folder


@pytest.mark.parametrize("packing", [False, True])
def test_a_teachers_tokens_come_back_from_a_folder(demo, models, lab, tmp_path, packing):
    teacher, _ = models
    options = {"data_cache_dir": demo.cache, "packing": packing, "max_length": 32, "max_train_samples": 14}
    data, other = (load_data(DataConfig(data_path=demo.train, **options), demo.tokenizer, "sft")[0] for _ in range(2))
    score = jax.jit(partial(teacher_logprobs, 1.0, 5, teacher.config.vocab_size, teacher.module, teacher.params))
    attach = partial(attach_teacher, folder=tmp_path / "train", rows=4, mesh=lab.mesh_of())
    attach(data, settings={"kd_temperature": 1.0}, score=score)
    attach(other, settings={"kd_temperature": 1.0}, score=lambda batch: pytest.fail("the folder has them"))
    batch = other.batch(np.array([2, 0, -1, 1]))
    expected = score({name: x for name, x in batch.items() if not name.startswith("teacher")})
    real = (batch["attention_mask"] * batch["row_mask"][:, None]) == 1
    assert batch["teacher_ids"].dtype == np.int32 and not batch["teacher_ids"][~real].any()
    np.testing.assert_allclose(batch["teacher_logps"][real], expected["logps"][real], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(batch["teacher_ids"][real], expected["ids"][real])
    with pytest.raises(InputError, match=r"other settings: kd_temperature \(1.0 then, 2.0 now\)"):
        attach(other, settings={"kd_temperature": 2.0}, score=score)
    path = tmp_path / "train" / "logps.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"logps.npy is missing or damaged; delete the folder"):
        attach(other, settings={"kd_temperature": 1.0}, score=score)


@pytest.mark.long
def test_a_run_with_a_folder_needs_no_teacher_and_is_that_of_one_with_it(train, tmp_path):
    kept, losses = str(tmp_path / "teacher"), []
    for i, options in enumerate(
        [{}, {"teacher_log_probs": kept}, {"teacher_log_probs": kept, "teacher_model_name_or_path": None}]
    ):
        records = train(max_steps=3, output_dir=str(tmp_path / f"run-{i}"), packing=False, **options)
        losses.append([record["loss"] for record in records if "loss" in record])
    assert losses[1] == losses[2] and losses[1] == pytest.approx(losses[0], rel=1e-4)
    with pytest.raises(InputError, match="teacher_log_probs=nothing does not hold its log-probs"):
        options = {"teacher_log_probs": "nothing", "teacher_model_name_or_path": None}
        train(max_steps=1, output_dir=str(tmp_path / "run-4"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmbda": 0.5}, "lmbda=0.5 with teacher_log_probs=kept"),
        ({"seq_kd": True}, "seq_kd=true with teacher_log_probs=kept"),
        ({"teacher_top_k": 0}, "teacher_top_k=0 with teacher_log_probs=kept"),
        ({"streaming": True}, "teacher_log_probs and streaming exclude each other"),
    ],
)
def test_a_folder_holds_the_likeliest_tokens_of_known_rows(options, message):
    with pytest.raises(InputError, match=message):
        DistillConfig.create(teacher_log_probs="kept", **options)
