"""Settings of `jaxrlhf bench`, and the shapes of its models."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from jaxrlhf.config import field
from jaxrlhf.errors import InputError
from jaxrlhf.kernels import LIBRARIES
from jaxrlhf.models import KERNEL_OPTIONS, REMAT_POLICIES, DecoderConfig, known_config, read_config
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.trainers.settings import MeshConfig, batch_devices, check_context

KERNEL_SECTIONS = ("attention", "decode", "logprobs")
PHASES = ("generate", "score", "train")
SECTIONS = (*KERNEL_SECTIONS, *PHASES, "ppo")
ATTENDING = ("attention", "score", "train")
"""Sections that run the attention of training and scoring, as a whole iteration (ppo) does too."""
PEERS = {"hf": ("torch", "transformers"), "hf-compile": ("torch", "transformers"), "trl": ("torch", "trl", "datasets")}
FIRST_BATCH = 8
ITERATION = (*PHASES, "ppo")
USED_BY = {
    "logprob_implementation": ("logprobs", "score", "train", "ppo"),
    "kv_cache_dtype": ("decode", "generate", "ppo"),
    "micro_batch": ("score", "train", "ppo"),
    "remat_policy": ("train", "ppo"),
}
"""Options that only these sections make use of."""


@dataclass(frozen=True)
class BenchConfig(MeshConfig):
    """What is measured."""

    sections: tuple[str, ...] = field(SECTIONS, f"what to measure: {', '.join(SECTIONS)} (a whole iteration)")
    peers: tuple[str, ...] = field(
        (),
        "measured in turns with ours, on the same weights and prompts: hf (Hugging Face generate and a plain torch PPO "
        "step), hf-compile (the same with a static cache and torch.compile in generate), trl (TRL's PPO)",
    )
    actor: str = field("opt-1.3b", "shape of actor and reference: a known model's name, or a folder with a config.json")
    critic: str = field("opt-350m", "shape of critic and reward model, likewise")
    batch: tuple[int, ...] = field(
        (),
        f"rows of a batch, one or several; default: {FIRST_BATCH}, or one per device where there are more, doubled "
        "until it no longer fits (CPU: once)",
    )
    max_batch: int = field(1024, "where that doubling ends at the latest; it does not limit `batch`")
    micro_batch: int = field(0, "rows that scoring and training work on at a time; 0: all")
    prompt: int = field(256, "tokens of a prompt")
    answer: int = field(256, "tokens of an answer: none ends early")
    remat_policy: str = field("none", "what the backward pass recomputes of a layer", choices=tuple(REMAT_POLICIES))
    attention_implementation: str = field(
        "auto",
        "kernels of attention, as in training (cudnn and tokamax have none for generation, which then runs auto)",
        choices=KERNEL_OPTIONS["attention_implementation"],
    )
    logprob_implementation: str = field(
        "auto", "kernels of token log-probs, as in training", choices=KERNEL_OPTIONS["logprob_implementation"]
    )
    kv_cache_dtype: str = field(
        "auto", "how generation holds keys and values, as in ppo", choices=KERNEL_OPTIONS["kv_cache_dtype"]
    )
    repeats: int = field(3, "timed runs of each, after one that compiles")
    seed: int = field(0, "of weights, prompts and draws")
    json: str | None = field(
        None, "file for the result; default: a new one in `results`, named after device, sections and time"
    )
    results: str = field("benchmarks/results", "folder of results")
    render: bool = field(False, "measure nothing: turn all results into tables and plots in `document`")
    document: str = field("docs/benchmarks.md", "what `render` writes; plots lie beside it")

    def __post_init__(self) -> None:
        for name, known in (("sections", SECTIONS), ("peers", tuple(PEERS))):
            for value in getattr(self, name):
                if value not in known:
                    raise InputError(f"{name}: there is no {value!r}; known are {', '.join(known)}")
        if not self.sections:
            raise InputError(f"sections: name at least one of {', '.join(SECTIONS)}")
        for peer in self.peers:
            for package in PEERS[peer]:
                if importlib.util.find_spec(package) is None:
                    raise InputError(
                        f"peers: {peer} needs the package {package}, which is not installed; install it, or leave "
                        f"{peer} out"
                    )
        if "trl" in self.peers and "ppo" not in self.sections:
            raise InputError("peers: trl only runs whole iterations; add ppo to the sections, or leave trl out")
        if self.peers and not self.iterates:
            raise InputError(f"peers: they run {', '.join(PHASES)} and ppo; add one to the sections, or leave them out")
        if self.attention_implementation in LIBRARIES and not {*ATTENDING, "ppo"} & set(self.sections):
            raise InputError(
                f"attention_implementation={self.attention_implementation} serves training and scoring alone, which "
                f"{', '.join(self.sections)} does not run; take auto, xla or pallas, or add one of "
                f"{', '.join(ATTENDING)}, ppo to the sections"
            )
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, users in USED_BY.items():
            if getattr(self, name) != defaults[name] and not set(users) & set(self.sections):
                raise InputError(
                    f"{name}={getattr(self, name)} changes nothing in {', '.join(self.sections)}; leave it out, or add "
                    f"one of {', '.join(users)} to the sections"
                )
        for name in ("prompt", "answer", "repeats", "max_batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if "decode" in self.sections and self.answer < 2:
            raise InputError(f"answer={self.answer}: decode measures the tokens after the first; give 2 or more")
        if any(rows < 1 for rows in self.batch) or list(self.batch) != sorted(set(self.batch)):
            raise InputError(f"batch={','.join(map(str, self.batch))} must be positive and ascending")
        if self.micro_batch < 0:
            raise InputError(f"micro_batch={self.micro_batch} must be 0 (the whole batch) or more")

    @property
    def length(self) -> int:
        return self.prompt + self.answer

    def parts(self, rows: int) -> int:
        """Micro-batches of a batch of `rows`; InputError where `micro_batch` does not divide it, or devices either."""
        devices = batch_devices(self.make_mesh())
        for name, size in (("batch", rows), ("micro_batch", self.micro_batch)):
            if size % devices:
                raise InputError(f"{name}={size} must be a multiple of the {devices} devices of mesh_data × mesh_fsdp")
        if not self.micro_batch or rows <= self.micro_batch:
            return 1
        if rows % self.micro_batch:
            raise InputError(f"micro_batch={self.micro_batch} must divide batch={rows}")
        return rows // self.micro_batch

    def ppo(self) -> PPOConfig:
        """The settings of a PPO run with these shapes, at a constant learning rate."""
        return PPOConfig(
            mesh_data=self.mesh_data,
            mesh_fsdp=self.mesh_fsdp,
            mesh_tensor=self.mesh_tensor,
            dtype=self.dtype,
            remat_policy=self.remat_policy,
            max_prompt_seq_len=self.prompt,
            max_answer_seq_len=self.answer,
            attention_implementation=self.attention_implementation,
            logprob_implementation=self.logprob_implementation,
            kv_cache_dtype=self.kv_cache_dtype,
            lr_scheduler_type="constant",
            seed=self.seed,
        )

    @property
    def iterates(self) -> bool:
        """Whether there is a section that runs an iteration's phases."""
        return bool(set(ITERATION) & set(self.sections))

    def actor_shape(self) -> DecoderConfig:
        """InputError when the text is too long for it."""
        return self._shape("actor")

    def shapes(self) -> tuple[DecoderConfig, DecoderConfig]:
        """Configurations of actor and critic; InputError when they do not go together or the text is too long."""
        shapes = self._shape("actor"), self._shape("critic")
        if shapes[0].vocab_size != shapes[1].vocab_size:
            raise InputError(
                f"actor={self.actor} has a vocabulary of {shapes[0].vocab_size} tokens and critic={self.critic} one of "
                f"{shapes[1].vocab_size}; both must read the same tokens"
            )
        return shapes

    def _shape(self, name: str) -> DecoderConfig:
        value = getattr(self, name)
        try:
            shape = read_config(value) if Path(value).is_dir() else known_config(value)
        except InputError as error:
            raise (
                error if Path(value).is_dir() else InputError(f"{name}: {value!r} is no folder, and {error}")
            ) from error
        check_context(shape, self.length, f"prompt + answer for {name}={value}")
        return shape
