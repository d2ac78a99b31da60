"""Settings of `jaxrlhf bench`, and the shapes of its models."""

import importlib.util
from dataclasses import dataclass
from typing import Literal, get_args

from jaxrlhf.config import NonNegativeInt, PositiveInt, Seed, Settings, default_of, settings
from jaxrlhf.config.compilation import CompilationConfig
from jaxrlhf.data import DataConfig
from jaxrlhf.engine import GenerationConfig, SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.kernels import LIBRARIES
from jaxrlhf.models import DecoderConfig, check_same_rows
from jaxrlhf.plan.system import model_config
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.trainers.optimizer import OptimizerConfig
from jaxrlhf.trainers.settings import ComputeConfig, MeshConfig, RunConfig, batch_devices

SectionName = Literal["attention", "decode", "logprobs", "generate", "score", "train", "ppo"]
SECTIONS: tuple[SectionName, ...] = get_args(SectionName)
KERNEL_SECTIONS, PHASES = SECTIONS[:3], SECTIONS[3:6]
ATTENDING = ("attention", "score", "train")
"""Sections that run the attention of training and scoring, as a whole iteration (ppo) does too."""
PeerName = Literal["hf", "hf-compile", "trl"]
PEERS = {"hf": ("torch", "transformers"), "hf-compile": ("torch", "transformers"), "trl": ("torch", "trl", "datasets")}
FIRST_BATCH = 8
ITERATION = (*PHASES, "ppo")
USED_BY = {
    "logprob_implementation": ("logprobs", "score", "train", "ppo"),
    "expert_implementation": ("generate", "score", "train", "ppo"),
    "kv_cache_dtype": ("decode", "generate", "ppo"),
    "micro_batch": ("score", "train", "ppo"),
    "remat_policy": ("train", "ppo"),
}
"""Options that only these sections make use of."""


@dataclass(frozen=True)
class BenchConfig(Settings):
    """Settings of the measurement."""

    HIDDEN = (frozenset(settings(RunConfig)) - {"remat_policy"}) | {"zero_stage", "generation_slots"}

    sections: tuple[SectionName, ...] = SECTIONS
    """Sections to measure: attention, decode, logprobs, generate, score, train, ppo (a whole iteration)."""
    peers: tuple[PeerName, ...] = ()
    """Peers to measure in turns, on the same weights and prompts: hf (Hugging Face generate and a plain torch PPO
    step), hf-compile (the same with a static cache and torch.compile in generate), trl (TRL's PPO)."""
    actor: str = "opt-1.3b"
    """Shape of actor and reference: a known model's name, or a folder with a config.json."""
    critic: str = "opt-350m"
    """Shape of critic and reward model, likewise."""
    batch: tuple[PositiveInt, ...] = ()
    """Rows of a batch, one or several; default: 8, or one per device where there are more, doubled until it no longer
    fits (CPU: once)."""
    max_batch: PositiveInt = 1024
    """Largest batch of that doubling; it does not limit `batch`."""
    micro_batch: NonNegativeInt = 0
    """Rows that scoring and training work on at a time; 0: all."""
    prompt: PositiveInt = 256
    """Tokens of a prompt."""
    answer: PositiveInt = 256
    """Tokens of a response; none ends early."""
    repeats: PositiveInt = 3
    """Timed runs of each, after one that compiles."""
    seed: Seed = 0
    """Seed of weights, prompts and samples."""
    json: str | None = None
    """File for the result; default: a new one in `results`, named after device, sections and time."""
    results: str = "benchmarks/results"
    """Folder of results."""
    render: bool = False
    """Measure nothing: turn all results into tables and plots in `document`."""
    document: str = "docs/benchmarks.md"
    """File that `render` writes; plots lie beside it."""
    run: RunConfig = RunConfig()
    mesh: MeshConfig = MeshConfig()
    compilation: CompilationConfig = CompilationConfig()
    compute: ComputeConfig = ComputeConfig()
    generation: GenerationConfig = GenerationConfig()

    def check(self) -> None:
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
        if self.compute.attention_implementation in LIBRARIES and not {*ATTENDING, "ppo"} & set(self.sections):
            raise InputError(
                f"attention_implementation={self.compute.attention_implementation} serves training and scoring alone, "
                f"which {', '.join(self.sections)} does not run; take auto, xla or pallas, or add one of "
                f"{', '.join(ATTENDING)}, ppo to the sections"
            )
        for name, users in USED_BY.items():
            if self.value(name) != default_of(BenchConfig, name) and not set(users) & set(self.sections):
                raise InputError(
                    f"{name}={self.value(name)} changes nothing in {', '.join(self.sections)}; leave it out, or add "
                    f"one of {', '.join(users)} to the sections"
                )
        if "decode" in self.sections and self.answer < 2:
            raise InputError(f"answer={self.answer}: decode measures the tokens after the first; give 2 or more")
        if any(rows < 1 for rows in self.batch) or list(self.batch) != sorted(set(self.batch)):
            raise InputError(f"batch={','.join(map(str, self.batch))} must be positive and ascending")

    @property
    def length(self) -> int:
        """Tokens of a prompt and its response."""
        return self.prompt + self.answer

    def parts(self, rows: int) -> int:
        """Micro-batches of a batch of `rows`; InputError when `micro_batch` or the devices do not divide it."""
        devices = batch_devices(self.mesh.make_mesh())
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
            data=DataConfig(max_prompt_seq_len=self.prompt, seed=self.seed),
            run=self.run,
            mesh=self.mesh,
            compute=self.compute,
            generation=self.generation,
            sampling=SamplingConfig(self.answer),
            optimizer=OptimizerConfig(lr_scheduler_type="constant"),
        )

    @property
    def iterates(self) -> bool:
        """True when a section runs an iteration's phases."""
        return bool(set(ITERATION) & set(self.sections))

    def actor_shape(self) -> DecoderConfig:
        """Configuration of the actor; InputError when the text is too long for it."""
        return self._shape("actor")

    def shapes(self) -> tuple[DecoderConfig, DecoderConfig]:
        """Configurations of actor and critic; InputError when they do not go together or the text is too long."""
        shapes = self._shape("actor"), self._shape("critic")
        check_same_rows(*shapes, (f"actor={self.actor}", f"critic={self.critic}"))
        return shapes

    def _shape(self, name: str) -> DecoderConfig:
        return model_config(name, getattr(self, name), self.length, "prompt + answer")
