"""Our decoder against Hugging Face torch, per family and option: outputs, gradients, a step, and files both ways."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparisons import fused_experts, relative_error, tensors_of

from jaxrlhf.models import load_pretrained, save_pretrained

SIDES = ("left", "right")


def as_hf(model, params, folder):
    """Our tree (parameters, gradients, …) under the names of Hugging Face's modules."""
    save_pretrained(model.replace(params=params), folder)
    in_modules = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX, in files only
    return {in_modules.get(name, name): x for name, x in fused_experts(tensors_of(folder)).items()}


@pytest.mark.parametrize("side", SIDES)
def test_logits_loss_and_every_gradient_equal_torch(reference, side, tmp_path):
    their_logits, their_loss, their_grads = reference.theirs(side)
    logits, loss, grads = reference.our_outputs(side)
    _, mask = reference.batch(side)
    real = mask.astype(bool)
    assert relative_error(logits[real], their_logits[real]) < 1e-5
    assert loss == pytest.approx(their_loss, rel=1e-5)
    ours = as_hf(reference.ours, grads, tmp_path)
    assert set(ours) == set(their_grads)
    # A key bias has no gradient (softmax does not see it): noise there is measured against the largest of all.
    largest = max(np.abs(g).max() for g in their_grads.values())
    errors = {name: relative_error(ours[name], their_grads[name], floor=1e-3 * largest) for name in ours}
    assert max(errors.values()) < 2e-5, errors


def test_bfloat16_forward_is_as_close_as_torch_is(reference):
    import torch

    if reference.case not in ("gpt2", "opt-350m", "llama", "bloom", "gpt_neox"):
        pytest.skip("a few families are enough: the rounding happens in shared code")
    ids, mask = reference.batch("left")
    real = mask.astype(bool)
    exact, _, _ = reference.our_outputs("left")
    half = reference.ours.module.clone(dtype=jnp.bfloat16)
    ours = np.asarray(jax.jit(half.apply)({"params": reference.ours.params}, jnp.asarray(ids), jnp.asarray(mask)))
    assert ours.dtype == np.float32
    with torch.no_grad():
        theirs = copy.deepcopy(reference.model).bfloat16()(**reference.inputs("left")).logits.float().numpy()
    our_error, their_error = (relative_error(x[real], exact[real]) for x in (ours, theirs))
    assert 1e-4 < our_error < max(1.5 * their_error, 2**-6)


def test_one_adamw_step_equals_torch(reference, tmp_path):
    import torch

    if "-" in reference.case:
        pytest.skip("one case per family is enough: the step sees gradients only")
    _, _, grads = reference.theirs("left")
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    parameters = {name: torch.nn.Parameter(p.detach().clone()) for name, p in reference.model.named_parameters()}
    for name, parameter in parameters.items():
        parameter.grad = torch.tensor(grads[name])
    torch.optim.AdamW(parameters.values(), **settings).step()
    model = reference.ours
    optimizer = optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.1)
    _, _, ours = reference.our_outputs("left")
    updates, _ = jax.jit(optimizer.update)(ours, optimizer.init(model.params), model.params)
    stepped = as_hf(model, optax.apply_updates(model.params, updates), tmp_path)
    for name, parameter in parameters.items():
        assert np.abs(stepped[name] - parameter.detach().numpy()).max() < 1e-5, name


def test_files_come_back_byte_for_byte(reference, tmp_path):
    from transformers import AutoModelForCausalLM

    save_pretrained(reference.ours, tmp_path)
    before, after = tensors_of(reference.folder), tensors_of(tmp_path)
    assert set(after) == set(before)
    for name in before:
        assert after[name].dtype == before[name].dtype
        assert after[name].tobytes() == before[name].tobytes(), name
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = reference.model.state_dict()
    for name, tensor in reloaded.state_dict().items():
        assert tensor.numpy().tobytes() == expected[name].numpy().tobytes(), name


def test_exported_config_says_what_the_original_said(reference, tmp_path):
    from transformers import AutoConfig

    save_pretrained(reference.ours, tmp_path)
    theirs, ours = reference.model.config.to_dict(), AutoConfig.from_pretrained(tmp_path).to_dict()
    # exports name the rope type for transformers 4 as well, which called it `type`; 5 reads it and keeps both names
    (ours.get("rope_parameters") or {}).pop("type", None)
    differing = {k: (theirs.get(k), ours.get(k)) for k in set(theirs) | set(ours) if theirs.get(k) != ours.get(k)}
    inert = {"architectures", "_name_or_path", "use_cache", "dtype", "transformers_version", "seq_length"}
    # written out where the original left it to the class, or told by `layer_types` and `attention_layers`
    inert |= {"n_inner", "head_dim", "max_window_layers", "attention_types"}
    inert |= {"rope_theta", "partial_rotary_factor"}  # as transformers 4 reads them; 5 reads `rope_parameters`
    for name in inert:
        differing.pop(name, None)
    assert not differing
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(reference.model).__name__]


def test_reward_export_scores_the_last_token_as_transformers_does(reference, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    if reference.model.config.model_type not in CLASSES:
        pytest.skip("transformers has no sequence classification for this family")
    if reference.case.endswith("-options"):
        pytest.skip("the head sees hidden states only, and those of each option are compared above")
    ours = load_pretrained(reference.folder, head="scalar", key=jax.random.key(1))
    save_pretrained(ours, tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, attn_implementation="eager")
    score = jax.jit(ours.module.apply)
    for side in SIDES:
        ids, mask = reference.batch(side)
        values = np.asarray(score({"params": ours.params}, jnp.asarray(ids), jnp.asarray(mask)))
        last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
        inputs = reference.inputs(side)
        # transformers finds the last token by the pad id, not by the mask
        pad = theirs.config.pad_token_id
        inputs["input_ids"] = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], pad)
        with torch.no_grad():
            expected = theirs.eval()(**inputs).logits
        assert expected.shape == (3, 1)
        np.testing.assert_allclose(values[np.arange(3), last], expected.numpy()[:, 0], rtol=1e-5, atol=1e-5)


def test_reward_model_of_transformers_loads_and_saves_unchanged(reference, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    if reference.model.config.model_type not in CLASSES:
        pytest.skip("transformers has no sequence classification for this family")
    if reference.case.endswith("-options"):
        pytest.skip("the head sees hidden states only, and those of each option are compared above")
    config = AutoConfig.from_pretrained(reference.folder, num_labels=1)
    theirs = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    reference.perturb(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs", head="scalar", new_head=False)
    save_pretrained(ours, tmp_path / "ours")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert set(after) == set(before)
    assert all(after[name].tobytes() == before[name].tobytes() for name in before)

    if "-" in reference.case:
        return  # the body's gradients are those of the language model: one case per family is enough
    inputs = reference.inputs("left")
    ids, mask = reference.batch("left")
    hidden = theirs.base_model(**inputs)[0]
    mask = mask * (ids != config.pad_token_id)  # a score is never read at the pad token (DecoderConfig.score_skips)
    weights = np.random.default_rng(0).normal(size=ids.shape).astype(np.float32) * mask
    expected = theirs.score(hidden)[..., 0]
    (expected * torch.tensor(weights)).sum().backward()

    def total(params):
        values = ours.module.apply({"params": params}, jnp.asarray(ids), jnp.asarray(reference.batch("left")[1]))
        return (values * weights).sum(), values

    grads, values = jax.jit(jax.grad(total, has_aux=True))(ours.params)
    real = mask.astype(bool)
    assert relative_error(np.asarray(values)[real], expected.detach().numpy()[real]) < 1e-5
    got = as_hf(ours, grads, tmp_path / "grads")
    their_grads = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
    largest = max(np.abs(g).max() for g in their_grads.values())
    for name, grad in their_grads.items():
        assert relative_error(got[name], grad, floor=1e-3 * largest) < 2e-5, name
