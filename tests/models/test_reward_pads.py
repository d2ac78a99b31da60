"""Exported reward models score alike in transformers, whatever their tokenizer pads with."""

import numpy as np
import pytest
from end_tokenizers import gpt2_tokenizer, shaped_tokenizer

from jaxrlhf.models import load_pretrained, save_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Pad token before, and in the export.
PADS = {
    "qwen2.5-instruct": ("<|endoftext|>", "<pad>"),
    "llama-3.1-instruct": (None, "<pad>"),
    "vicuna": ("<s>", "<s>"),
    "gpt2": ("<|endoftext|>", "<|pad|>"),
    "gpt2 without a pad token": (None, "<|pad|>"),
    "gpt2 with a full table": (None, "<|pad|>"),
}


@pytest.mark.parametrize("shape", PADS)
def test_the_pad_token_ends_nothing_and_transformers_scores_alike(shape, lab, tmp_path):
    gpt2 = shape.startswith("gpt2")
    tokenizer = gpt2_tokenizer(264 if "full" in shape else 265) if gpt2 else shaped_tokenizer(shape)
    before, after = PADS[shape]
    tokenizer.pad_token = before
    ends = ["<|im_end|>", "<|endoftext|>"] if shape == "qwen2.5-instruct" else [tokenizer.eos_token]
    ids = tokenizer.convert_tokens_to_ids(ends)
    model = lab.tiny_model(lab.LLAMA | {"vocab_size": len(tokenizer), "eos_token_id": ids}, "scalar")
    save_pretrained(model, tmp_path, tokenizer)

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    assert theirs.pad_token == after and scorer.config.pad_token_id == theirs.pad_token_id not in ids
    assert tokenizer.pad_token == before  # that of the run is as it was
    texts = [text + ends[-1] for text in ("The sun is hot!", "hello", "You are kind. hello there")]
    rows = theirs(texts, padding=True, padding_side="right")
    inputs, mask = np.array(rows["input_ids"]), np.array(rows["attention_mask"])
    with torch.no_grad():
        found = scorer(torch.tensor(inputs), attention_mask=torch.tensor(mask)).logits[:, 0].numpy()
    again = load_pretrained(tmp_path, head="scalar", new_head=False)
    last = np.arange(3), mask.sum(1) - 1
    np.testing.assert_allclose(found, again.module.apply({"params": again.params}, inputs, mask)[last], atol=1e-4)
    np.testing.assert_allclose(
        found, model.module.apply({"params": model.params}, inputs * mask, mask)[last], atol=1e-4
    )
