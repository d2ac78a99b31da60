"""The configurations of the one decoder, which covers every supported family, and of its adapters."""

import dataclasses
import re
from dataclasses import dataclass, field

from jaxrlhf.errors import InputError

Scaling = tuple[tuple[str, float | str | tuple[float, ...]], ...]
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")
SPARSE_STACK, DENSE_STACK = "mlp", "dense_mlp"
MLP_STACKS = (SPARSE_STACK, DENSE_STACK)
"""Stacks of feed-forward parts among the layers' parameters; `dense_mlp` is there only with `dense_layers`."""
_CHOICES = {
    "position": ("learned", "rotary", "alibi"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_placement": ("pre", "post", "branch", "sandwich"),
    "residual": ("sequential", "parallel", "parallel_shared_norm"),
    "activation": ACTIVATIONS,
}


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of a decoder-only transformer. Hashable, so modules that hold it are valid static arguments."""

    family: str
    """Hugging Face `model_type` this configuration came from and exports to."""
    vocab_size: int
    """Real number of tokens; tables are padded to a multiple of `vocab_multiple` inside."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    """Longest sequence; the number of rows of a learned position table less `position_offset`."""

    embed_size: int = 0
    """Width of the token embeddings; 0 means hidden_size. When different, linear projections lead in and out."""
    position: str = "learned"
    position_offset: int = 0
    """Unused rows at the start of a learned position table (OPT: 2)."""
    rotary_dim: int = 0
    """Number of leading features of each head that are rotated; 0 means all of head_dim."""
    rotary_base: float = 10000.0
    rotary_interleaved: bool = False
    """Pairs are neighbours (GPT-J) rather than the two halves (Llama, GPT-NeoX)."""
    rope_scaling: Scaling | None = None
    """Sorted items of HF's rope parameters when they are not the default (see models/rotary.py)."""
    local_rotary_base: float | None = None
    """Base frequency of layers with a window, which then have no `rope_scaling`; None: as the other layers."""
    rotary_layers: tuple[bool, ...] | None = None
    """Per layer: queries and keys are rotated; None: in all layers."""

    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    """Layer norms have a bias."""
    norm_plus_one: bool = False
    """Norms multiply by 1 + weight (Gemma)."""
    norm_placement: str = "pre"
    """`pre`: norms of what attention and MLP read. `post`: of the sum after each. `branch`: of what each adds to the
    sum (OLMo 2). `sandwich`: `pre` and `branch` (Gemma 2)."""
    residual: str = "sequential"
    """`parallel`: attention and MLP read the same input, each through its norm; `parallel_shared_norm`: one norm."""
    residual_from_norm: bool = False
    """The residual branch starts after the norm (BLOOM's apply_residual_connection_post_layernorm)."""
    residual_scale: float = 1.0
    """Factor on what attention and MLP add to the sum (Granite)."""
    embed_scale: float = 1.0
    """Factor on the token embeddings (Granite)."""
    embed_scale_sqrt: bool = False
    """Token embeddings are multiplied by sqrt(hidden_size), rounded to the compute dtype (Gemma)."""
    embed_norm: bool = False
    final_norm: bool = True

    activation: str = "gelu_new"
    gated_mlp: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    num_experts: int = 0
    """MLPs of each layer that a router chooses from; 0: one MLP for all tokens."""
    dense_layers: tuple[int, ...] = ()
    """In a model with experts: the layers that have one MLP for all tokens instead, of `intermediate_size`; ascending
    (models/mixed.py)."""
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    """Width of an expert; 0 means intermediate_size."""
    normalize_experts: bool = True
    """The weights of a token's experts add up to 1 (Qwen3-MoE's norm_topk_prob)."""
    router_aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss in training, unless the run sets another."""
    qk_norm: bool = False
    """RMS norm over head_dim of queries and keys before rotation (Qwen3)."""
    qk_norm_joint: bool = False
    """With `qk_norm`: one norm over the features of all heads (OLMo 2)."""
    attention_scale: float | None = None
    """Factor on the scores; None means head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Scores s become softcap · tanh(s / softcap) (Gemma 2)."""
    scale_by_inverse_layer: bool = False
    """Scores of layer i are divided by i + 1 (GPT-2's scale_attn_by_inverse_layer_idx)."""
    windows: tuple[int, ...] | None = None
    """Per layer: attend to the last N positions only; 0 means all."""

    tie_embeddings: bool = True
    lm_head_bias: bool = False
    logit_scale: float = 1.0
    """Factor on the logits (Cohere, Granite)."""
    logit_softcap: float | None = None
    """Logits z become softcap · tanh(z / softcap), after `logit_scale` (Gemma 2)."""

    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0

    score_bias: bool = False
    """The scalar head has a constant part, as TRL's value heads and OpenRLHF's normalised rewards have."""
    score_skips: int | None = None
    """At this token a scalar head repeats the value of the token before. Transformers reads a score at the last token
    that is not padding, so also before an end token that equals the pad token."""

    initializer_range: float = 0.02
    bos_token_id: int | tuple[int, ...] | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | tuple[int, ...] | None = None
    generation_config: str = ""
    """The source's generation_config.json as JSON text, which exports start from; empty: only the ids above."""
    vocab_multiple: int = 8

    source: str = field(default="", compare=False, repr=False)
    """JSON of the config.json that this configuration was read from; an export keeps what has not changed since."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{self.family} config: {name}={getattr(self, name)!r} is not one of {allowed}")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{self.family} config: {name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"{self.family} config: {self.num_kv_heads} key/value heads do not divide {self.num_heads} heads"
            )
        if not 0 < self.norm_eps < 1:
            raise InputError(f"{self.family} config: norm_eps={self.norm_eps!r} must be above 0 and below 1")
        for name in ("embed_dropout", "attention_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{self.family} config: {name}={getattr(self, name)!r} must be 0 or more, and below 1")
        if self.position == "rotary":
            self._check_rotation()
        if self.lm_head_bias and self.tie_embeddings:
            raise InputError(f"{self.family} config: a head with a bias cannot be tied to the embeddings")
        for name in ("windows", "rotary_layers"):
            per_layer = getattr(self, name)
            if per_layer is not None and len(per_layer) != self.num_layers:
                raise InputError(f"{self.family} config: {len(per_layer)} {name} for {self.num_layers} layers")
        for name in ("attention_softcap", "logit_softcap", "logit_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{self.family} config: {name}={value!r} must be positive")

        if self.num_experts:
            self._check_experts()
        elif self.dense_layers:
            raise InputError(f"{self.family} config: dense_layers={self.dense_layers} needs experts in other layers")

    def _check_rotation(self) -> None:
        rotated, scaling = self.rotated_dim, dict(self.rope_scaling or ())
        if rotated == self.head_dim and rotated % 2:
            raise InputError(f"{self.family} config: head_dim={self.head_dim} must be even: features rotate in pairs")
        if scaling.get("rope_type") == "dynamic" and rotated <= 2:
            raise InputError(f"{self.family} config: rope_type 'dynamic' needs more than {rotated} rotated features")
        for name in ("short_factor", "long_factor"):
            factors = scaling.get(name, (1.0,) * (rotated // 2))
            if not isinstance(factors, tuple) or len(factors) != rotated // 2:
                raise InputError(
                    f"{self.family} config: {name} must be a list of {rotated // 2} numbers, got {factors}"
                )

    def _check_experts(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise InputError(
                f"{self.family} config: num_experts_per_tok={self.experts_per_token} must be from 1 to the number of "
                f"experts, {self.num_experts}"
            )
        if self.mlp_bias or not self.gated_mlp:
            raise InputError(f"{self.family} config: experts are gated MLPs without biases")
        if list(self.dense_layers) != sorted({*range(self.num_layers)} & {*self.dense_layers}):
            raise InputError(
                f"{self.family} config: dense_layers={self.dense_layers} must be ascending and below num_layers"
            )
        if len(self.dense_layers) == self.num_layers:
            raise InputError(f"{self.family} config: all {self.num_layers} layers are dense, so there are no experts")

    @property
    def expert_size(self) -> int:
        """Width of an expert, or of the one MLP of a model without experts."""
        return self.expert_intermediate_size or self.intermediate_size

    @property
    def sparse_layers(self) -> int:
        """Number of layers with experts."""
        return self.num_layers - len(self.dense_layers) if self.num_experts else 0

    def stack(self, name: str) -> tuple[int, ...]:
        """The layers that have an entry in a stack of the layers' parameters (`attn`, `mlp`, …), in order."""
        if name == DENSE_STACK:
            return self.dense_layers
        others = {*self.dense_layers} if name == SPARSE_STACK else set()
        return tuple(i for i in range(self.num_layers) if i not in others)

    @property
    def embedding_size(self) -> int:
        """Width of the token embeddings."""
        return self.embed_size or self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token tables."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def rotated_dim(self) -> int:
        """Features of each head that are rotated."""
        return self.rotary_dim or self.head_dim

    def replace(self, **changes: object) -> "DecoderConfig":
        """Returns a copy with these fields changed."""
        return dataclasses.replace(self, **changes)


SCORE_FIELDS = ("score_bias", "score_skips")
"""Fields of DecoderConfig that a config.json has no options for."""


def check_pattern(pattern: str, what: str) -> None:
    """Raises InputError for text that is no regular expression, or one that could take forever to match.

    A repeated group, or many repetitions in a row, can be matched in exponentially many ways.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{what} {pattern!r} is not a regular expression: {error}") from error
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+}]", pattern)) > 4 or len(pattern) > 500:
        raise InputError(f"{what} {pattern!r} could take forever to match; name the modules, such as 'q_proj'")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters of linear maps: `y += dropout(x) A B · alpha / rank` (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int
    alpha: float = 32.0
    dropout: float = 0.0
    """Dropout rate of the adapter's input; active exactly when a `dropout` RNG is passed to `apply`."""
    targets: tuple[str, ...] = (r"/(attn|mlp)/",)
    """Regular expressions, searched in the paths of the linear maps (`layers/attn/query`)."""
    trained_tokens: tuple[int, ...] = ()
    """Ids, ascending, of tokens whose rows in embedding and head are trained too."""

    def __post_init__(self) -> None:
        if list(self.trained_tokens) != sorted(set(self.trained_tokens)):
            raise InputError(f"LoRA trained_tokens={self.trained_tokens} must be ascending ids")
        if self.rank < 1:
            raise InputError(f"LoRA rank={self.rank} must be at least 1")
        if not self.alpha > 0:
            raise InputError(f"LoRA alpha={self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            raise InputError(f"LoRA dropout={self.dropout} must be 0 or more, below 1")
        for pattern in self.targets:
            check_pattern(pattern, "LoRA target")

    @property
    def scale(self) -> float:
        """Factor on `A B`."""
        return self.alpha / self.rank

    def matches(self, path: str) -> bool:
        """True if the linear map at `path` has an adapter."""
        return any(re.search(pattern, path) for pattern in self.targets)
