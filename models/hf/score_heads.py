"""Scalar heads as people publish reward models: transformers', OpenRLHF's, TRL's and DeepSpeed-Chat's.

Every head becomes `score.weight` `[1, E]`, with `score.bias` `[1]` where the score has a constant part: TRL's value
heads have one, and OpenRLHF's reward models with `normalize_reward` score `(raw - mean) / std`. Heads that compute
something else are refused by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxrlhf.errors import InputError
from jaxrlhf.models.hf.tensor_source import TensorSource

OPENRLHF_OPTIONS = ("value_head_prefix", "normalize_reward")
"""Options by which a config.json of OpenRLHF is known; `mean` and `std` belong to the second."""
WEIGHT, BIAS = "score.weight", "score.bias"
_TRL = "v_head.summary"
_PLAIN = ("score", "v_head", "value_head")  # transformers and OpenRLHF; DeepSpeed-Chat; older OpenRLHF
_UNKNOWN = (
    (r"score\.\d+\..+", "a process reward model or another head of several layers, such as Qwen2.5-Math-PRM"),
    (r"regression_layer\..+|gating\w*\..+|reward_transform_matrix", "a multi-objective reward model, such as ArmoRM"),
    (r"score_head\..+|normalizer\..+", "a score model of PKU-Alignment's safe-rlhf, with a normaliser of its own"),
    (r"(classifier|qa_outputs)\..+", "a head for token classification or question answering"),
)
_CUSTOM = r"(regression_head|reward_head|rm_head|reward_model_head|regression|reward)\.weight"


@dataclass(frozen=True)
class ScoreHead:
    """The scalar head that a checkpoint holds.

    Attributes:
        name: Module in the file, such as `v_head`.
        bias: The score has a constant part.
        skips_pad: A score is read at the last token that is not padding, as transformers' `ForSequenceClassification`
            classes do, so also before an end token that equals the pad token.
        beside_lm: A language model's head stands beside it (TRL's value head).
    """

    name: str
    bias: bool = False
    skips_pad: bool = False
    beside_lm: bool = False


def find_score_head(source: TensorSource, options: Mapping[str, object]) -> ScoreHead | None:
    """Finds the scalar head among the tensors; None without one.

    Args:
        source: Tensors under the names that the head's own trainer gave them.
        options: The config.json.

    Raises:
        InputError: The head is of a kind that is not supported.
    """
    _refuse_unknown(source)
    own = options.get("value_head_prefix")
    _refuse_custom(source, own)
    if f"{_TRL}.weight" in source.shapes:
        return ScoreHead(_TRL, bias=f"{_TRL}.bias" in source.shapes, beside_lm=True)
    names = (*((own,) if isinstance(own, str) and own else ()), *_PLAIN)
    name = next((name for name in names if f"{name}.weight" in source.shapes), None)
    if name is None:
        return None
    shape = source.shapes[f"{name}.weight"]
    if len(shape) == 2 and shape[0] != 1:
        raise InputError(
            f"{source.where}: the head {name}.weight {shape} gives {shape[0]} scores (labels); a reward model must "
            "give one (num_labels 1)"
        )
    classes = options.get("architectures")
    classes = classes if isinstance(classes, list) else []
    theirs = any(str(kind).endswith("ForSequenceClassification") for kind in classes)
    openrlhf = any(option in options for option in OPENRLHF_OPTIONS)
    bias = f"{name}.bias" in source.shapes or bool(options.get("normalize_reward"))
    return ScoreHead(name, bias, skips_pad=theirs and not openrlhf)


def _refuse_unknown(source: TensorSource) -> None:
    for pattern, what in _UNKNOWN:
        found = [name for name in source.shapes if re.fullmatch(pattern, name)]
        if found:
            raise InputError(
                f"{source.where} is {what} ({sorted(found)[0]}); only heads of one linear layer and one score are "
                "supported"
            )


def _refuse_custom(source: TensorSource, named: object) -> None:
    for name, shape in source.shapes.items():
        if not re.fullmatch(_CUSTOM, name) or name == f"{named}.weight":
            continue
        what = f"{source.where}: {name} {shape} is a head of code of its own"
        if shape[:1] != (1,):
            raise InputError(f"{what}, with several scores; only heads with one score are supported")
        module = name.removesuffix(".weight")
        raise InputError(
            f'{what}, which may do more than one linear layer; if it does not, set "value_head_prefix": "{module}" in '
            "the config.json"
        )


def with_score_names(source: TensorSource, head: ScoreHead | None, options: Mapping[str, object]) -> TensorSource:
    """The source with the head under the names `score.weight` and `score.bias`, normalisation folded in."""
    shapes = dict(source.shapes)
    normalisers = {name for name in ("mean", "std") if math.prod(shapes.get(name, ())) == 1 and name in shapes}
    for name in normalisers:
        del shapes[name]
    if head is None:
        return replace(source, shapes=shapes)
    weight, bias = f"{head.name}.weight", f"{head.name}.bias"
    width = math.prod(shapes.pop(weight))
    shapes.pop(bias, None)
    shapes[WEIGHT] = (1, width)
    if head.bias:
        shapes[BIAS] = (1,)
    mean, std = _normalisation(source, options, normalisers)

    def read(name: str) -> np.ndarray:
        if name == WEIGHT:
            stored = source.read(weight).reshape(1, -1)
            return stored if std == 1 else (stored.astype(np.float64) / std).astype(np.float32)
        if name == BIAS:
            stored = source.read(bias).astype(np.float64) if bias in source.shapes else np.zeros(1)
            return ((stored.reshape(1) - mean) / std).astype(np.float32)
        return source.read(name)

    def peek(name: str) -> np.ndarray:
        return read(name) if name in (WEIGHT, BIAS) else source.peek(name)

    return replace(source, shapes=shapes, read=read, peek=peek)


def _normalisation(source: TensorSource, options: Mapping[str, object], stored: set[str]) -> tuple[float, float]:
    """Mean and standard deviation that a score is normalised by: buffers of the file, else options of the config."""
    if not options.get("normalize_reward"):
        return 0.0, 1.0
    found: dict[str, Any] = {name: options.get(name) for name in ("mean", "std")}
    found |= {name: float(source.read(name).reshape(())) for name in stored}
    for name, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (name == "std" and value <= 0):
            raise InputError(
                f"{source.where}: normalize_reward asks for a finite mean and a std above 0, found {name}={value!r}; "
                'set "normalize_reward": false in the config.json for the raw scores'
            )
    return float(found["mean"]), float(found["std"])
