"""Options of generation, continuous batching, and what the compiled loop may move: no cache and no weight."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from comparisons import assert_same_rollout

from jaxrlhf.engine import HybridEngine, SamplingConfig, generate
from jaxrlhf.errors import InputError
from jaxrlhf.models import generation_view, load_pretrained
from jaxrlhf.sharding import GENERATE_RULES, use

STOPS = ((7,), (16, 68), (92, 5, 32))
GPT2 = {"vocab_size": 101, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 48, "initializer_range": 0.3}
GPT2 |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}


@pytest.fixture(scope="module")
def everything(lab):
    """All options at once, with two responses per prompt and a temperature per prompt."""
    options = {"min_new_tokens": 2, "repetition_penalty": 1.4, "stop_sequences": STOPS, "samples_per_prompt": 2}
    return lab.sampling.replace(**options), {"temperature": np.linspace(0, 2, lab.ROWS)}


def run(engine, lab, sampling, **options):
    return jax.device_get(engine.generate(*lab.prompts(), jax.random.key(3), sampling, **options))


# ---- options


def test_repetition_penalty_and_stop_sequences_equal_transformers(lab, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    torch.manual_seed(1)
    torch.set_num_threads(1)
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT2)).eval()
    reference.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(3, 101, (5, 9))
    options = {"do_sample": False, "max_new_tokens": 32, "pad_token_id": 0, "eos_token_id": None}
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(ids.shape, dtype=torch.long)}
    plain = reference.generate(**inputs, **options).numpy()[:, 9:]
    free = reference.generate(**inputs, **options, repetition_penalty=1.3).numpy()[:, 9:]
    assert (plain != free).any(axis=1).all()
    stops = [free[0, 4:6].tolist(), free[1, 10:13].tolist(), [int(free[2, 20])]]

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            rows = [row[9:].tolist() for row in input_ids]
            return torch.tensor([any(row[-len(stop) :] == stop for stop in stops) for row in rows])

    # transformers pads rows that have stopped only where there is an EOS; this one never comes.
    options |= {"eos_token_id": min(set(range(3, 101)) - set(free.ravel().tolist())), "repetition_penalty": 1.3}
    expected = reference.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([Stop()])).numpy()
    ours = HybridEngine(load_pretrained(tmp_path), lab.mesh_of())
    sampling = SamplingConfig(32, temperature=0, repetition_penalty=1.3, stop_sequences=stops)
    got = jax.device_get(ours.generate(ids, np.ones_like(ids), jax.random.key(0), sampling))
    np.testing.assert_array_equal(got.tokens[:, : expected.shape[1]], expected)
    lengths = got.response_mask.sum(1)
    assert lengths[0] <= 6 and lengths[1] <= 13 and lengths[2] <= 21 and len(set(lengths.tolist())) > 2
    np.testing.assert_array_equal(got.response_mask[:, 9:], np.arange(32) < lengths[:, None])


def test_padding_is_not_seen_by_the_repetition_penalty(setup, lab):
    ids, mask = lab.prompts()
    sampling = lab.sampling.replace(temperature=0, repetition_penalty=3.0)
    other = np.where(mask, ids, np.random.default_rng(8).integers(3, 101, ids.shape))
    key = jax.random.key(3)
    a, b = (np.asarray(setup.engine.generate(x, mask, key, sampling).tokens) for x in (np.where(mask, ids, 0), other))
    np.testing.assert_array_equal(a, b)


def test_options_do_not_change_the_reported_distribution(setup, lab, everything):
    """Log-probs are those of the tempered model at temperature 1 where greedy, whatever the penalty and the stops."""
    sampling, options = everything
    rollout = run(setup.engine, lab, sampling, **options)
    logits = np.asarray(setup.actor.module.apply({"params": setup.actor.params}, rollout.tokens, rollout.mask))
    temperature = np.repeat(np.where(options["temperature"] > 0, options["temperature"], 1.0), 2)
    logp = np.asarray(jax.nn.log_softmax(logits / temperature[:, None, None].astype("f4")))[:, :-1]
    logp = np.take_along_axis(logp, rollout.tokens[:, 1:, None], axis=-1)[..., 0]
    keep = rollout.response_mask[:, 1:]
    np.testing.assert_allclose(rollout.logprobs[:, 1:][keep], logp[keep], rtol=0, atol=2e-4)


def test_a_stop_sequence_ends_a_row_with_its_last_token_and_not_before_min_new_tokens(setup, lab):
    free = run(setup.engine, lab, lab.sampling.replace(eos_token_id=None)).tokens[:, lab.PROMPT :]
    stops = (tuple(free[0, 1:3].tolist()), tuple(free[1, 5:8].tolist()), (int(free[2, 4]),))
    for least in (0, 3):
        sampling = lab.sampling.replace(eos_token_id=None, stop_sequences=stops, min_new_tokens=least)
        got = run(setup.engine, lab, sampling)
        for row, tokens in enumerate(free.tolist()):
            ends = [n for n in range(least + 1, lab.ANSWER) if any(tuple(tokens[:n][-len(s) :]) == s for s in stops)]
            assert got.response_mask[row].sum() == min([*ends, lab.ANSWER]), row
            assert sampling.ended(got.tokens[row][got.response_mask[row]]) == any(
                tuple(tokens[: min([*ends, lab.ANSWER])][-len(s) :]) == s for s in stops
            )
        assert (got.response_mask.sum(1)[0] == 3) == (least < 3)


def test_samples_of_a_prompt_are_what_its_copies_get(setup, lab):
    ids, mask = lab.prompts(rows=4)
    key = jax.random.key(3)
    numbers = np.array([5, 1, 9, 30, 31, 2, 8, 7])
    sampling = lab.sampling.replace(samples_per_prompt=2)
    got = jax.device_get(setup.engine.generate(ids, mask, key, sampling, sample_index=numbers))
    copies = (np.repeat(x, 2, axis=0) for x in (ids, mask))
    assert_same_rollout(got, jax.device_get(setup.engine.generate(*copies, key, lab.sampling, sample_index=numbers)))
    default = jax.device_get(setup.engine.generate(ids, mask, key, sampling))
    assert len({tuple(row) for row in default.tokens.tolist()}) == 8


def test_a_temperature_per_prompt_equals_that_of_the_config_and_compiles_once(setup, lab):
    values = np.array([0, 0.7, 1.3] * lab.ROWS)[: lab.ROWS]
    before = generate._cache_size()
    got = run(setup.engine, lab, lab.sampling, temperature=values)
    run(setup.engine, lab, lab.sampling, temperature=values[::-1] + 0.1)
    assert generate._cache_size() == before + 1
    for value in np.unique(values):
        expected = run(setup.engine, lab, lab.sampling.replace(temperature=float(value)))
        rows = values == value
        assert_same_rollout(jax.tree.map(lambda x: x[rows], got), jax.tree.map(lambda x: x[rows], expected))  # noqa: B023


def test_a_stream_draws_as_generate_with_every_option(setup, lab, everything):
    ids, mask = lab.prompts()
    sampling = replace(everything[0], samples_per_prompt=1, temperature=0.8)
    expected = run(setup.engine, lab, sampling)
    streamed = np.stack(list(setup.engine.stream(ids, mask, jax.random.key(3), sampling)), axis=1)
    longest = expected.response_mask.sum(1).max()
    assert streamed.shape[1] == longest
    np.testing.assert_array_equal(streamed, expected.tokens[:, lab.PROMPT : lab.PROMPT + longest])


def test_requests_that_do_not_fit_are_refused_by_name(setup, lab):
    ids, mask = lab.prompts(rows=4)
    key = jax.random.key(0)
    for bad in ([1.0] * 3, [1.0, -0.5, 1.0, 1.0], [1.0, float("nan"), 1.0, 1.0]):
        with pytest.raises(InputError, match=r"temperature=\[.*one number per prompt, \[4\]"):
            setup.engine.generate(ids, mask, key, lab.sampling, temperature=bad)
    twice = lab.sampling.replace(samples_per_prompt=2)
    with pytest.raises(InputError, match=r"sample_index.*\(4,\).*samples_per_prompt=2.*\[8\]"):
        setup.engine.generate(ids, mask, key, twice, sample_index=np.arange(4))
    with pytest.raises(InputError, match=r"samples_per_prompt=2.*one response per prompt"):
        next(setup.engine.stream(ids, mask, key, twice))


# ---- continuous batching


@pytest.mark.parametrize(("mesh", "slots"), [((1, 1, 1), 3), ((2, 2, 2), 8)])
def test_slots_give_the_same_rollout_with_every_option(mesh, slots, lab, everything):
    sampling, options = everything
    mesh = lab.mesh_of(*mesh)
    engine = HybridEngine(lab.tiny_model(mesh=mesh), mesh)
    fixed = run(engine, lab, sampling, **options)
    lengths = fixed.response_mask.sum(1)
    assert lengths.min() < 5 < lab.ANSWER == lengths.max()
    assert_same_rollout(run(engine, lab, sampling, **options, slots=slots), fixed)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_slots_change_no_answer_and_neither_does_the_order_of_the_queue(temperature, setup, lab):
    sampling = lab.sampling.replace(temperature=temperature)
    fixed = run(setup.engine, lab, sampling)
    assert_same_rollout(run(setup.engine, lab, sampling, slots=8), fixed)
    order = np.random.default_rng(4).permutation(lab.ROWS)
    ids, mask = lab.prompts()
    key = jax.random.key(3)
    moved = setup.engine.generate(ids[order], mask[order], key, sampling, sample_index=order, slots=8)
    assert_same_rollout(jax.device_get(moved), jax.tree.map(lambda x: x[order], fixed))


def test_one_slot_answers_the_whole_queue(setup, lab):
    assert_same_rollout(run(setup.engine, lab, lab.sampling, slots=1), run(setup.engine, lab, lab.sampling))


def test_groups_of_devices_work_through_queues_of_their_own(lab):
    """On a mesh that only splits the batch, the loops exchange nothing but the scalars of their conditions."""
    options = lab.LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 4}
    mesh = lab.mesh_of(fsdp=8)
    engine = HybridEngine(lab.tiny_model(options, mesh=mesh), mesh, 1)
    assert engine.generate_mesh.shape["replica"] == 8
    inside = [sizes for loop, sizes in collectives(compiled_text(engine, lab, slots=8)) if loop]
    assert inside and {x for sizes in inside for x in sizes} == {()}
    alone = HybridEngine(lab.tiny_model(options), lab.mesh_of())
    assert_same_rollout(run(engine, lab, lab.sampling, slots=8), run(alone, lab, lab.sampling))


def test_as_many_slots_as_rows_are_the_fixed_batch(setup, lab):
    run(setup.engine, lab, lab.sampling)
    before = generate._cache_size()
    for slots in (lab.ROWS, lab.ROWS + 5):
        run(setup.engine, lab, lab.sampling, slots=slots)
    assert generate._cache_size() == before


def test_slots_that_do_not_fit_the_mesh_are_refused_by_name(lab):
    mesh = lab.mesh_of(data=4)
    engine = HybridEngine(lab.tiny_model(mesh=mesh), mesh)
    ids, mask = lab.prompts(rows=10)
    for slots, rows, message in (
        (-1, 8, "slots=-1"),
        (6, 8, "slots=6 must be a multiple of 4"),
        (4, 10, "=10 must be"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            engine.generate(ids[:rows], mask[:rows], jax.random.key(0), lab.sampling, slots=slots)


# ---- the compiled program

COLLECTIVE = re.compile(r" = (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def computations(text):
    """(whether it is the entry, line) of every instruction of an HLO text."""
    entry = False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        yield entry, line


def collectives(text):
    """(whether outside of the entry, so within a loop; dimensions of each result) of every collective."""
    for entry, line in computations(text):
        if found := COLLECTIVE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
            yield not entry, [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]


def compiled_text(engine, lab, **options):
    requests = engine._requests(*lab.prompts(), lab.sampling, None, None)
    static = {"module": engine.module, "sampling": lab.sampling, "mesh": engine.generate_mesh}
    return generate.lower(engine.params, requests, jax.random.key(0), **static, **options).compile().as_text()


@pytest.mark.parametrize("slots", [0, 4])
def test_no_cache_is_copied_within_the_loops(slots, setup, lab):
    text = compiled_text(setup.engine, lab, slots=slots)
    shape = rf"f32\[{slots or lab.ROWS},8,{lab.PROMPT + lab.ANSWER},4\]"
    inside = [line for entry, line in computations(text) if not entry and re.search(rf" = {shape}\S* ", line)]
    writes = [line for line in inside if re.search(r" (dynamic-update-slice|scatter)\(", line)]
    assert len(writes) >= 4, "keys and values of two layers"
    assert not [line for line in inside if re.search(r" copy\(", line)]


def test_refilling_slots_moves_activations_only(lab):
    """As in the fixed batch (test_compiled_programs.py): sums of activations, and scalars or a few numbers per row."""
    mesh = lab.mesh_of(2, 2, 2)
    engine = HybridEngine(lab.tiny_model(mesh=mesh), mesh)
    assert (engine.generate_mesh.shape["data"], engine.generate_mesh.shape["replica"]) == (2, 1)
    inside = [shape for loop, shapes in collectives(compiled_text(engine, lab, slots=8)) if loop for shape in shapes]
    activations = [shape for shape in inside if engine.config.hidden_size in shape and len(shape) == 3]
    assert activations, "the loop of a tensor-parallel group adds activations up"
    rest = [shape for shape in inside if shape not in activations]
    assert max(int(np.prod(shape)) for shape in rest) <= lab.ROWS * 8, rest


@pytest.mark.parametrize(("kv_heads", "mesh", "groups"), [(4, (2, 2, 2), 4), (2, (2, 2, 2), 0), (2, (4, 1, 2), 2)])
def test_qkv_is_one_kernel_where_every_shard_holds_its_own_heads(kv_heads, mesh, groups, lab):
    options = lab.LLAMA | {"num_key_value_heads": kv_heads}
    mesh = lab.mesh_of(*mesh)
    engine = HybridEngine(lab.tiny_model(options, mesh=mesh), mesh)
    with use(engine.generate_mesh, GENERATE_RULES):
        view = jax.eval_shape(lambda p: generation_view(p, engine.module), engine.params)
    assert view.form.qkv_groups == groups
    attn = view.layers[0]["attn"]
    if groups:
        assert attn["qkv"]["kernel"].shape == (groups, (8 + 2 * kv_heads) // groups, 4, 32)
    assert set(attn) == ({"qkv", "out"} if groups else {"query", "key", "value", "out"})
    alone = HybridEngine(lab.tiny_model(options), lab.mesh_of())
    assert_same_rollout(run(engine, lab, lab.sampling), run(alone, lab, lab.sampling))
