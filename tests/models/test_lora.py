"""LoRA: against PEFT in both directions, merging, the flip to generation, targets, and bad adapter folders."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparisons import relative_error
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from jaxrlhf.engine import HybridEngine, SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    LoRAConfig,
    add_lora,
    base_leaves,
    generation_view,
    join,
    load_adapter,
    load_pretrained,
    merged,
    save_adapter,
    save_pretrained,
    split_trainable,
)
from jaxrlhf.models.hf.adapters import _adapter_tensors
from jaxrlhf.models.lora import adapter_leaves, linear_maps, resolve_targets
from jaxrlhf.sharding import make_mesh

CASES = ("gpt2", "opt-350m", "llama", "bloom", "codegen", "phi3", "gemma2")


def adapted(model, **options):
    """The model with adapters that change something: B is not zero."""
    config = LoRAConfig(**({"rank": 3, "alpha": 5.0} | options))
    model = add_lora(model, config, jax.random.key(4))
    rng = np.random.default_rng(5)
    trained = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), adapter_leaves(model.params))
    return model.replace(params=join(base_leaves(model.params), trained))


def logits_of(model, ids, mask):
    return np.asarray(jax.jit(model.module.apply)({"params": model.params}, jnp.asarray(ids), jnp.asarray(mask)))


def inputs_of(theirs, ids, mask):
    """As HF's own generate passes them: positions count real tokens, where the model takes positions."""
    import inspect

    import torch

    base = theirs.get_base_model() if hasattr(theirs, "get_base_model") else theirs
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if base.config.model_type != "opt" and "position_ids" in inspect.signature(base.forward).parameters:
        inputs["position_ids"] = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    return inputs


def as_torch(model, folder):
    """The base model without adapters, in transformers."""
    from transformers import AutoModelForCausalLM

    base = model.replace(module=model.module.clone(lora=None), params=base_leaves(model.params))
    save_pretrained(base, folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def with_peft(theirs, folder):
    import peft

    return peft.PeftModel.from_pretrained(theirs, folder, is_trainable=True).eval()


@pytest.mark.parametrize("case", CASES)
def test_our_adapter_in_peft_has_the_same_logits_gradients_and_step(case, make_model, make_batch, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    model = adapted(make_model(case))
    ids, mask = make_batch("left", model.config.vocab_size)
    save_adapter(model, tmp_path / "adapter")
    theirs = with_peft(as_torch(model, tmp_path / "base"), tmp_path / "adapter")
    weights = np.random.default_rng(0).normal(size=(*ids.shape, model.config.vocab_size)).astype(np.float32)
    weights *= mask[..., None]

    expected = theirs(**inputs_of(theirs, ids, mask), use_cache=False).logits
    (expected * torch.tensor(weights)).sum().backward()
    trainable, frozen = split_trainable(model.params, model.module)

    def total(trainable):
        logits = model.module.apply({"params": join(trainable, frozen)}, jnp.asarray(ids), jnp.asarray(mask))
        return (logits * weights).sum(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(trainable)
    real = mask.astype(bool)
    assert relative_error(np.asarray(logits)[real], expected.detach().numpy()[real]) < 1e-5
    assert relative_error(np.asarray(logits)[real], logits_of(base_of(model), ids, mask)[real]) > 1e-2

    def named(tree):
        return dict(_adapter_tensors(model.replace(params=join(tree, frozen))))

    ours = named(grads)
    # Of a fused map, PEFT also trains the parts of B between one part's A and another's output; ours have none.
    blocks = named(jax.tree.map(jnp.ones_like, trainable))
    parameters = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert set(parameters) == set(ours)
    for name, parameter in parameters.items():
        assert relative_error(ours[name], parameter.grad.numpy() * blocks[name]) < 1e-5, name

    torch.optim.AdamW(parameters.values(), lr=1e-2, betas=(0.9, 0.95), eps=1.0, weight_decay=0.1).step()
    optimizer = optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1.0, weight_decay=0.1)
    updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable)
    stepped = named(optax.apply_updates(trainable, updates))
    for name, parameter in parameters.items():
        assert np.abs(stepped[name] - parameter.detach().numpy() * blocks[name]).max() < 1e-5, name


def base_of(model):
    return model.replace(module=model.module.clone(lora=None), params=base_leaves(model.params))


PEFT_OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"mlp.*": 5}, "alpha_pattern": {"mlp.*": 3}},
}


@pytest.mark.parametrize(
    ("case", "options"),
    [(case, "plain") for case in CASES]
    + [(case, options) for case in ("gpt2", "llama") for options in ("rslora", "patterns")],
)
def test_adapter_of_peft_computes_the_same_here(case, options, make_model, make_batch, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = make_model(case)
    ids, mask = make_batch("left", model.config.vocab_size)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}
    settings |= {"fan_in_fan_out": case == "gpt2"}
    torch.manual_seed(1)
    theirs = peft.get_peft_model(
        as_torch(model, tmp_path / "base"), peft.LoraConfig(**settings, **PEFT_OPTIONS[options])
    ).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(model, tmp_path / "adapter")
    assert [p for p in linear_maps(model.module) if ours.module.lora.matches(p)] == linear_maps(model.module)
    with torch.no_grad():
        expected = theirs(**inputs_of(theirs, ids, mask)).logits.numpy()
    real = mask.astype(bool)
    assert relative_error(logits_of(ours, ids, mask)[real], expected[real]) < 1e-5
    assert relative_error(logits_of(merged(ours), ids, mask)[real], expected[real]) < 1e-5
    # and once more through our own file
    save_adapter(ours, tmp_path / "again")
    again = load_adapter(model, tmp_path / "again")
    assert again.module == ours.module
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)


def test_scalar_head_goes_with_the_adapter(make_model, make_batch, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    base = make_model("gpt2", head="scalar")
    model = adapted(base)
    score = model.params["score"]["kernel"] * 2 + 0.1
    model = model.replace(params=model.params | {"score": {"kernel": score}})
    ids, mask = make_batch("right", model.config.vocab_size)
    ids = np.where(mask > 0, ids, model.config.pad_token_id)
    save_adapter(model, tmp_path / "adapter")
    save_pretrained(base, tmp_path / "base")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1).eval()
    theirs = with_peft(theirs, tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()[:, 0]
    values = logits_of(model, ids, mask)
    np.testing.assert_allclose(values[np.arange(3), mask.sum(1) - 1], expected, rtol=1e-5, atol=1e-5)
    loaded = load_adapter(base, tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    with pytest.raises(InputError, match="head='scalar'"):
        load_adapter(make_model("gpt2"), tmp_path / "adapter")


@pytest.mark.parametrize("case", ("gpt2", "opt-350m"))
def test_merged_model_computes_what_the_adapters_do(case, make_model, make_batch):
    model = adapted(make_model(case), targets=("all-linear",))
    ids, mask = make_batch("left", model.config.vocab_size)
    whole = merged(model)
    assert whole.module == model.module.clone(lora=None)
    assert jax.tree.structure(whole.params) == jax.tree.structure(base_leaves(model.params))
    assert relative_error(logits_of(whole, ids, mask), logits_of(model, ids, mask)) < 1e-5
    assert merged(whole) is whole


def test_export_is_merged(make_model, make_batch, tmp_path):
    model = adapted(make_model("opt-350m"), targets=("all-linear",))
    save_pretrained(model, tmp_path)
    assert (
        relative_error(
            logits_of(load_pretrained(tmp_path), *make_batch("left", 101)), logits_of(model, *make_batch("left", 101))
        )
        < 1e-5
    )


def test_fresh_adapters_change_nothing_and_start_as_in_peft(make_model, make_batch):
    model = make_model("llama")
    fresh = add_lora(model, LoRAConfig(rank=64), jax.random.key(0))
    batch = make_batch("left", model.config.vocab_size)
    np.testing.assert_array_equal(logits_of(fresh, *batch), logits_of(model, *batch))
    leaves = flatten_dict(fresh.params["layers"], sep="/")
    assert not np.asarray(leaves["mlp/down/lora_b"]).any()
    a, inputs = np.asarray(leaves["mlp/down/lora_a"]), model.config.intermediate_size
    # U(-b, b) with b = 1/√inputs has the standard deviation b/√3
    assert np.abs(a).max() <= inputs**-0.5
    assert a.std() == pytest.approx((3 * inputs) ** -0.5, rel=0.03)
    assert np.unique(a).size > 0.99 * a.size  # every layer draws its own
    assert (
        fresh.params["embed"] is not None and fresh.params["embed"]["embedding"] is model.params["embed"]["embedding"]
    )


def test_remat_and_bfloat16_follow_the_plain_model(make_model, make_batch):
    model = adapted(make_model("llama"))
    batch = make_batch("left", model.config.vocab_size)
    plain = logits_of(model, *batch)
    remat = logits_of(model.replace(module=model.module.clone(remat="full")), *batch)
    assert relative_error(remat, plain) < 1e-6
    rounded = logits_of(model.replace(module=model.module.clone(dtype=jnp.bfloat16)), *batch)
    assert 0 < relative_error(rounded, plain) < 0.03


def test_dropout_acts_on_adapters_only_and_only_with_a_key(make_model, make_batch):
    model = adapted(make_model("llama"), dropout=0.5)
    ids, mask = (jnp.asarray(x) for x in make_batch("left", model.config.vocab_size))
    run = jax.jit(lambda params, key: model.module.apply({"params": params}, ids, mask, rngs={"dropout": key}))
    plain = logits_of(model.replace(module=adapted(make_model("llama")).module), ids, mask)
    np.testing.assert_array_equal(logits_of(model, ids, mask), plain)
    first, second = (np.asarray(run(model.params, jax.random.key(k))) for k in (0, 1))
    assert relative_error(first, plain) > 1e-3
    assert relative_error(first, second) > 1e-3
    # with B zero the adapters add nothing, dropped out or not
    silent = add_lora(base_of(model), model.module.lora)
    np.testing.assert_array_equal(
        np.asarray(run(silent.params, jax.random.key(0))), logits_of(base_of(model), ids, mask)
    )


def test_generation_with_adapters_equals_generation_with_merged_weights(make_model, make_batch):
    mesh = make_mesh(1, 4, 2)
    model = adapted(make_model("opt-350m", num_heads=8, num_kv_heads=8, head_dim=3), targets=("all-linear",))
    prompts = [np.concatenate([x] * 4)[:8] for x in make_batch("left", model.config.vocab_size)]
    sampling = SamplingConfig(max_new_tokens=6)
    with_adapters, whole = (
        HybridEngine(m, mesh).generate(*prompts, jax.random.key(3), sampling) for m in (model, merged(model))
    )
    np.testing.assert_array_equal(with_adapters.tokens, whole.tokens)
    np.testing.assert_allclose(with_adapters.logprobs, whole.logprobs, rtol=1e-5, atol=1e-5)
    # and as the train program sees the adapters, not merged
    unmerged, _ = jax.jit(lambda p, t, m: model.module.apply({"params": p}, t, m, method="logprobs"))(
        model.params, np.asarray(with_adapters.tokens), np.asarray(with_adapters.mask)
    )
    drawn = np.asarray(with_adapters.response_mask)
    np.testing.assert_allclose(
        np.asarray(unmerged)[drawn], np.asarray(with_adapters.logprobs)[drawn], rtol=1e-5, atol=1e-5
    )
    # decode pays nothing: its parameters are those of a model without adapters
    views = [jax.eval_shape(lambda p, m=m: generation_view(p, m.module), m.params) for m in (model, merged(model))]
    assert jax.tree.structure(views[0]) == jax.tree.structure(views[1])


def targets_of(model, *targets):
    return set(resolve_targets(model.module, targets))


def test_targets_by_our_path_by_the_name_of_peft_and_by_that_of_deepspeed_chat(make_model):
    gpt2, llama, opt = make_model("gpt2"), make_model("llama"), make_model("opt-350m")
    attention = {"layers/attn/query", "layers/attn/key", "layers/attn/value"}
    assert targets_of(gpt2, "attn/query") == {"layers/attn/query"}
    assert targets_of(gpt2, "attn/(query|value)$") == {"layers/attn/query", "layers/attn/value"}
    assert targets_of(gpt2, "c_attn") == attention
    assert targets_of(gpt2, "c_proj") == {"layers/attn/out", "layers/mlp/down"}
    assert targets_of(gpt2, "attn.c_proj", "c_fc") == {"layers/attn/out", "layers/mlp/up"}
    assert targets_of(llama, "q_proj", "v_proj") == {"layers/attn/query", "layers/attn/value"}
    every = set(linear_maps(opt.module))
    assert targets_of(opt, "decoder.layers.") == targets_of(opt) == every - {"project_in", "project_out"}
    assert targets_of(opt, "all-linear") == every


def test_a_target_that_matches_nothing_lists_what_there_is(make_model):
    with pytest.raises(
        InputError, match=r"'o_prj' matches no linear map of llama(.|\n)*layers/attn/out .*self_attn.o_proj"
    ):
        add_lora(make_model("llama"), LoRAConfig(rank=2, targets=("q_proj", "o_prj")))
    with pytest.raises(InputError, match="not a regular expression"):
        LoRAConfig(rank=2, targets=("q_(proj",))
    for values, message in (
        ({"rank": 0}, "rank=0"),
        ({"rank": 1, "alpha": 0}, "alpha=0"),
        ({"rank": 1, "dropout": 1}, "dropout=1"),
    ):
        with pytest.raises(InputError, match=message):
            LoRAConfig(**values)


def test_adapters_of_a_part_of_a_fused_map_come_back_as_they_were(make_model, make_batch, tmp_path):
    base = make_model("gpt_neox")
    for number, targets in enumerate((("query",), ("query", "value", "mlp/up"))):
        model = adapted(base, targets=targets)
        save_adapter(model, tmp_path / str(number), "somewhere/base")
        config = json.loads((tmp_path / str(number) / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "somewhere/base"
        loaded = load_adapter(base, tmp_path / str(number))
        assert loaded.module == model.module
        jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_adapters_load_onto_the_mesh_of_the_base(make_model, make_batch, tmp_path):
    mesh = make_mesh(1, 4, 2)
    base = make_model("gpt2", num_heads=4, num_kv_heads=4, head_dim=6)
    model = adapted(base)
    save_adapter(model, tmp_path)
    sharded = load_adapter(base.replace(params=HybridEngine(base, mesh).params), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, sharded.params, model.params)
    up = sharded.params["layers"]["mlp"]["up"]
    assert up["lora_b"].sharding.spec[2] == ("tensor", "fsdp")
    batch = make_batch("left", 101)
    assert relative_error(logits_of(sharded, *batch), logits_of(model, *batch)) < 1e-5
    assert relative_error(logits_of(merged(sharded), *batch), logits_of(model, *batch)) < 1e-5


@pytest.fixture
def saved(make_model, tmp_path):
    base = make_model("llama")
    save_adapter(adapted(base), tmp_path / "good")
    return base, tmp_path / "good"


def changed(folder, name, *, config=None, tensors=None):
    """A copy of an adapter folder with other options or tensors."""
    target = shutil.copytree(folder, folder.parent / name)
    if config:
        values = json.loads((target / "adapter_config.json").read_text()) | config
        (target / "adapter_config.json").write_text(json.dumps(values))
    if tensors:
        values = load_file(target / "adapter_model.safetensors")
        tensors(values)
        save_file(values, target / "adapter_model.safetensors")
    return target


def test_bad_adapter_folders_are_refused_with_what_is_wrong(saved, make_model):
    base, folder = saved
    q = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"

    def refused(path, match, model=base):
        with pytest.raises(InputError, match=match):
            load_adapter(model, path)

    refused(folder.parent / "nowhere", "cannot read .*adapter_config.json")
    refused(changed(folder, "ia3", config={"peft_type": "IA3"}), "peft_type='IA3' is not supported")
    refused(changed(folder, "dora", config={"use_dora": True, "bias": "all"}), "use_dora=True, bias='all'")
    refused(changed(folder, "pissa", config={"init_lora_weights": "pissa"}), "init_lora_weights='pissa'")
    refused(changed(folder, "modules", config={"modules_to_save": ["mlp"]}), "modules_to_save='mlp' is not supported")
    refused(
        changed(folder, "absent", tensors=lambda t: t.pop(q.format("B"))),
        "missing model.layers.1.self_attn.q_proj.lora_B",
    )
    extra = changed(folder, "extra", tensors=lambda t: t.update({q.format("C"): t[q.format("A")]}))
    refused(extra, "unexpected model.layers.1.self_attn.q_proj.lora_C")
    nan = changed(folder, "nan", tensors=lambda t: t[q.format("A")].fill(np.nan))
    refused(nan, "q_proj.lora_A.weight; the adapter is damaged")
    refused(folder, r"does not fit this llama model(.|\n)*shape", make_model("llama-biases"))
    refused(folder, "does not fit this gpt2 model", make_model("gpt2"))
    refused(folder, "adapters already", adapted(base))
    truncated = changed(folder, "truncated")
    weights = truncated / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    refused(truncated, "may be truncated")
    weights.unlink()
    refused(truncated, "has no adapter_model.safetensors")


def test_only_finite_adapters_are_saved_and_an_older_folder_survives(saved):
    base, folder = saved
    before = (folder / "adapter_model.safetensors").read_bytes()
    model = adapted(base)
    broken = jax.tree.map(lambda x: x * jnp.nan, model.params)
    with pytest.raises(InputError, match="NaN or infinite; the model has diverged"):
        save_adapter(model.replace(params=broken), folder)
    with pytest.raises(InputError, match="no LoRA adapters to save"):
        save_adapter(base, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
