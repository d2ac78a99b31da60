"""The map between Hugging Face checkpoints and our parameter tree: tensor layouts, families, a config reader.

A family declares each tensor once (`Tensor`), and the same declaration loads and saves. A declared tensor is skipped in
both directions if a configuration does not have its leaves (an absent bias, a tied head).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, TypedDict, TypeVar, overload

import jax
import numpy as np

from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig

Shape = tuple[int, ...]
Array = np.ndarray | jax.Array
Option = TypeVar("Option")


class Layout(NamedTuple):
    """Two inverse rearrangements between one HF tensor and one or several of our (per-layer) leaves."""

    to_ours: Callable[[np.ndarray, Sequence[Shape]], Sequence[np.ndarray]]
    """(HF tensor, shapes of our leaves) → our leaves."""
    to_hf: Callable[[Sequence[Any], ModuleType], Any]
    """(our leaves, array module: numpy or jax.numpy) → HF tensor."""


# The same shape and order of elements: norms, biases, embeddings, output heads.
SAME = Layout(lambda x, shapes: [x.reshape(shapes[0])], lambda parts, xp: parts[0])
# The same order of elements, flat in HF: our bias [H, D] is [H·D] there.
FLAT = Layout(lambda x, shapes: [x.reshape(shapes[0])], lambda parts, xp: parts[0].reshape(-1))
# A scalar head: [E] here, [1, E] there.
ROW = Layout(lambda x, shapes: [x.reshape(shapes[0])], lambda parts, xp: parts[0].reshape(1, -1))


def _matrix(kernel: Array, inputs: int) -> Array:
    """A kernel whose first `inputs` axes are contracted, as `[in, out]`."""
    return kernel.reshape(math.prod(kernel.shape[:inputs]), -1)


def linear(inputs: int = 1) -> Layout:
    """The layout of torch.nn.Linear, `[out, in]`; the first `inputs` axes of our kernel are contracted."""
    return Layout(lambda x, shapes: [x.T.reshape(shapes[0])], lambda parts, xp: _matrix(parts[0], inputs).T)


def conv1d(inputs: int = 1) -> Layout:
    """GPT-2's Conv1D `[in, out]`."""
    return Layout(lambda x, shapes: [x.reshape(shapes[0])], lambda parts, xp: _matrix(parts[0], inputs))


def _split(x: np.ndarray, shapes: Sequence[Shape], axis: int) -> list[np.ndarray]:
    """The parts of these shapes that lie side by side along `axis`, which holds their axes from that one on."""
    cuts = np.cumsum([math.prod(shape[axis:]) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(x, cuts, axis=axis), shapes, strict=True)]


def conv1d_fused() -> Layout:
    """Several kernels `[in, …]` side by side in one Conv1D `[in, Σ out]` (GPT-2's c_attn)."""
    return Layout(
        lambda x, shapes: _split(x, shapes, axis=1),
        lambda parts, xp: xp.concatenate([_matrix(part, 1) for part in parts], axis=1),
    )


def linear_fused() -> Layout:
    """Several kernels `[in, …]` one below the other in one Linear `[Σ out, in]` (Phi-3's qkv_proj)."""

    def to_ours(x: np.ndarray, shapes: Sequence[Shape]) -> Sequence[np.ndarray]:
        return _split(x.T, shapes, axis=1)

    return Layout(to_ours, lambda parts, xp: xp.concatenate([_matrix(part, 1).T for part in parts]))


def bias_fused() -> Layout:
    """Several biases end to end."""
    return Layout(
        lambda x, shapes: _split(x, shapes, axis=0),
        lambda parts, xp: xp.concatenate([part.reshape(-1) for part in parts]),
    )


def linear_grouped(groups: int | None = None) -> Layout:
    """Several kernels `[in, H, D]` in one Linear `[Σ H·D, in]`, taking turns `groups` times (None: H times).

    BLOOM and GPT-NeoX interleave query, key and value head by head; CodeGen in four partitions.
    """

    def to_ours(x: np.ndarray, shapes: Sequence[Shape]) -> Sequence[np.ndarray]:
        inputs, heads, width = shapes[0]
        turns = groups or heads
        x = x.reshape(turns, len(shapes), heads // turns, width, inputs)
        return [x[:, j].reshape(heads, width, inputs).transpose(2, 0, 1) for j in range(len(shapes))]

    def to_hf(parts: Sequence[Array], xp: ModuleType) -> Array:
        inputs, heads, width = parts[0].shape
        turns = groups or heads
        parts = [p.transpose(1, 2, 0).reshape(turns, heads // turns, width, inputs) for p in parts]
        return xp.stack(parts, axis=1).reshape(-1, inputs)

    return Layout(to_ours, to_hf)


def bias_interleaved() -> Layout:
    """Several biases `[H, D]`, taking turns head by head."""
    return Layout(
        lambda x, shapes: list(x.reshape(shapes[0][0], len(shapes), shapes[0][1]).swapaxes(0, 1)),
        lambda parts, xp: xp.stack(parts, axis=1).reshape(-1),
    )


@dataclass(frozen=True)
class Tensor:
    """One HF tensor: its name (`{i}`: layer, `{e}`: expert), our leaf or leaves, and the layout between them.

    Leaves are stacked: `[L, …]` where the name has `{i}`, `[L, E, …]` where it has `{e}` too. The layout sees only the
    axes that follow.
    """

    hf: str
    ours: str | tuple[str, ...]
    layout: Layout = SAME
    aliases: tuple[str, ...] = ()
    """Other names of the same tensor in files; it is written as `hf`."""

    @property
    def leaves(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def stack(self) -> str:
        """The stack of the layers' parameters that holds a tensor per layer, such as `attn`."""
        return self.leaves[0].split("/")[1]

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.hf

    @property
    def stacked(self) -> int:
        """Leading axes of our leaves that the name counts."""
        return ("{i}" in self.hf) + ("{e}" in self.hf)

    def names(self, config: DecoderConfig, name: str | None = None) -> dict[str, tuple[int, ...]]:
        """Returns the index into our leaves of each tensor in a file, by its name; `name` replaces `hf`."""
        name = self.hf if name is None else name
        layers = config.stack(self.stack) if self.per_layer else ()
        sizes = (len(layers), config.num_experts)[: self.stacked]
        return {
            name.format(**{"i": layers[index[0]] if layers else 0, "e": index[-1] if index else 0}): index
            for index in np.ndindex(*sizes)
        }


@dataclass(frozen=True)
class FusedExperts:
    """One HF tensor `[E, n · out, in]` that holds the tensors of all experts of a layer; it is read, never written."""

    hf: str
    parts: tuple[str, ...]
    """Declared names of the n tensors `[out, in]` of an expert, in their order along the second axis."""


# Heads of other names: models/hf/score_heads.py.
SCORE = Tensor("score.weight", "score/kernel", ROW)
SCORE_BIAS = Tensor("score.bias", "score/bias")

MAX_SIZE, MAX_LAYERS = 10**9, 10**4
"""Sizes and numbers of layers beyond these are mistakes."""


class CommonFields(TypedDict):
    """The fields of DecoderConfig that every family reads alike."""

    vocab_size: int
    bos_token_id: int | tuple[int, ...] | None
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | tuple[int, ...] | None


class HFConfig:
    """Reads the options of a `config.json`, and remembers which of them were read.

    Args:
        values: Content of the file.
        where: Name of the file in messages.
        aliases: Second names of options, as `attribute_map` of the family's class in transformers lists them.
    """

    def __init__(self, values: Mapping[str, object], where: str, aliases: Mapping[str, str] | None = None) -> None:
        self.where = where
        self._values: dict[str, Any] = dict(values)
        self._read: set[str] = set()
        self.ignored: list[str] = []
        """What the options that were read hold beside what they may, for the log."""
        for alias, name in (aliases or {}).items():
            value = self._values.pop(alias, None)
            if value is not None and self._values.get(name) is None:
                self._values[name] = value
            elif value is not None:
                self.same(name, alias, value)

    def items(self) -> dict[str, object]:
        """All options, with aliases under their proper name."""
        return dict(self._values)

    def unread(self) -> dict[str, object]:
        """The options that nothing has read."""
        return {name: value for name, value in self._values.items() if name not in self._read}

    def same(self, name: str, other: str, value: object) -> None:
        """Raises InputError if option `name` is set and differs from `value`, which option `other` gives."""
        found = self.take(name)
        if found is not None and found != value:
            raise InputError(f"{self.where}: options {name}={found!r} and {other}={value!r} contradict each other")

    @overload
    def take(self, name: str) -> Any: ...

    @overload
    def take(self, name: str, default: Option) -> Option: ...

    def take(self, name: str, default: object = None) -> object:
        """Returns an option, or `default` if it is absent or null; InputError if its type is not the default's.

        Numbers must be finite.
        """
        self._read.add(name)
        value = self._values.get(name)
        if value is None:
            return default
        if default is not None:
            kinds = (float, int) if isinstance(default, float) else type(default)
            if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
                raise InputError(f"{self.where}: option {name}={value!r} must be of type {type(default).__name__}")
            if isinstance(default, float):
                self.check_number(name, value)
        return value

    def check_number(self, name: str, value: Any, *, positive: bool = False) -> None:
        """Raises InputError unless `value` is a finite number of a sane size, and above 0 if `positive`."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -1e30 < value < 1e30 or (positive and not value > 0):
            kind = "a positive number" if positive else "a finite number"
            raise InputError(f"{self.where}: option {name}={value!r} must be {kind}")

    def positive(self, name: str, default: float) -> float:
        """Returns a number above 0, such as the epsilon of a norm."""
        value = self.take(name, default)
        self.check_number(name, value, positive=True)
        return value

    def rate(self, name: str, default: float) -> float:
        """Returns a dropout rate, 0 or more and below 1."""
        value = self.take(name, default)
        if not 0 <= value < 1:
            raise InputError(f"{self.where}: option {name}={value!r} must be 0 or more, and below 1")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """Returns an option that is a JSON object; empty if it is absent or null."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise InputError(f"{self.where}: option {name}={value!r} must be an object with named values")
        return dict(value or {})

    def nullable(self, name: str, default: Option) -> Option | None:
        """Returns an option, `default` if it is absent; an explicit null is None."""
        return self.take(name) if name in self._values else default

    def refuse(self, name: str, value: object, why: str) -> InputError:
        """Returns the error for a value that this family does not support; the caller raises it."""
        return InputError(f"{self.where}: option {name}={value!r} is not supported: {why}")

    def size(self, name: str, default: int | None = None) -> int:
        """Returns a positive integer up to MAX_SIZE (or MAX_LAYERS); without a default the option is required."""
        value = self.take(name)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.where}: option {name!r} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{self.where}: option {name}={value!r} must be a positive integer")
        most = MAX_LAYERS if name in ("num_hidden_layers", "num_layers", "n_layer") else MAX_SIZE
        if value > most:
            raise InputError(f"{self.where}: option {name}={value!r} is too large: at most {most} is supported")
        return value

    def size_or_none(self, name: str, default: int | None) -> int | None:
        """Returns a positive integer, `default` if it is absent; an explicit null is None."""
        return None if self.nullable(name, default) is None else self.size(name, default)

    def positive_or_none(self, name: str, default: float | None) -> float | None:
        """Returns a number above 0, `default` if it is absent; an explicit null is None."""
        value = self.nullable(name, default)
        if value is not None:
            self.check_number(name, value, positive=True)
        return value

    def width_and_heads(self, width: str, heads: str) -> tuple[int, int]:
        """Returns the hidden size and the number of heads, which must divide it."""
        sizes = self.size(width), self.size(heads)
        if sizes[0] % sizes[1]:
            raise InputError(f"{self.where}: {width}={sizes[0]} is not a multiple of {heads}={sizes[1]}")
        return sizes

    def refuse_unless(self, name: str, allowed: object) -> None:
        """Raises InputError unless an option is `allowed` or absent."""
        value = self.take(name, allowed)
        if value != allowed:
            raise InputError(f"{self.where}: option {name}={value!r} is not supported (only {allowed!r} is)")

    def activation(self, name: str, default: str) -> str:
        """Returns an activation by our name (`ACTIVATIONS` of models/config.py)."""
        value = self.take(name, default)
        names = {"gelu_new": "gelu_new", "gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "swish": "silu"}
        names |= {"relu": "relu", "gelu": "gelu", "silu": "silu"}
        if value not in names:
            raise InputError(f"{self.where}: option {name}={value!r} is not supported (one of {sorted(names)})")
        return names[value]

    def token(self, name: str, default: int | None) -> int | tuple[int, ...] | None:
        """Returns a token id (or several), `default` if it is absent; an explicit null means that there is none."""
        value = self.nullable(name, default)
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise InputError(f"{self.where}: option {name}={value!r} must be a token id or a list of them")
        return tuple(value) if isinstance(value, list) else value

    def common(self, bos: int | None, eos: int | None, pad: int | None = None) -> CommonFields:
        """Returns the fields that every family shares; `bos`, `eos` and `pad` are the defaults of transformers."""
        self.refuse_unless("is_encoder_decoder", False)
        self.refuse_unless("add_cross_attention", False)
        return {
            "vocab_size": self.size("vocab_size"),
            "bos_token_id": self.token("bos_token_id", bos),
            "eos_token_id": self.token("eos_token_id", eos),
            "pad_token_id": self.token("pad_token_id", pad),
        }


def common_to_hf(config: DecoderConfig) -> dict[str, object]:
    """The inverse of `HFConfig.common`."""
    eos = config.eos_token_id
    return {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": config.tie_embeddings,
    }


@dataclass(frozen=True)
class Family:
    """A Hugging Face model family: its config in both directions and the place of each tensor."""

    name: str
    """`model_type` in config.json."""
    classes: str
    """Stem of the transformers classes: `GPT2` for GPT2LMHeadModel and GPT2ForSequenceClassification."""
    lm_class: str
    prefix: str
    """base_model_prefix of the HF classes; files saved from the base model lack it."""
    config_from_hf: Callable[[HFConfig], DecoderConfig]
    config_to_hf: Callable[[DecoderConfig], dict[str, object]]
    tensors: tuple[Tensor, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Second names of options in config.json, each with the name that `config_from_hf` reads."""
    rewritten: frozenset[str] = frozenset()
    """Options that an export never takes from its source, because versions of transformers read them differently."""
    fused_experts: tuple[FusedExperts, ...] = ()
    """Other forms of declared tensors in files."""
    heads: tuple[Tensor, ...] = field(
        default=(
            Tensor("lm_head.weight", "lm_head/kernel"),
            Tensor("lm_head.bias", "lm_head/bias"),
            SCORE,
        )
    )

    @property
    def all_tensors(self) -> tuple[Tensor, ...]:
        return (*self.tensors, *self.heads, SCORE_BIAS)

    def architecture(self, head: str) -> str:
        """Name of the transformers class of a model with this head, "lm" or "scalar"."""
        return self.lm_class if head == "lm" else f"{self.classes}ForSequenceClassification"
