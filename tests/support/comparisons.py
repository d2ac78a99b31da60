"""Comparisons that several test files make: rollouts, files of models, relative errors."""

import numpy as np

from jaxrlhf.models.hf.checkpoint_files import open_checkpoint


def assert_same_rollout(got, expected):
    """Equal tokens and masks, and log-probs to 1e-4."""
    for name in ("tokens", "mask", "response_mask"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    np.testing.assert_allclose(got.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def tensors_of(folder):
    """{name: array} of a model folder's files."""
    source = open_checkpoint(folder)
    return {name: source.read(name) for name in source.shapes}


def relative_error(got, expected, floor=0.0):
    """Largest absolute difference over the largest expected value, or over `floor` where that is larger."""
    assert got.shape == expected.shape
    return np.abs(got - expected).max() / max(np.abs(expected).max(), floor)
