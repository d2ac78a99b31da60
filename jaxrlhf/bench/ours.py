"""Our side of the benchmark: the programs of a PPO iteration as the trainer runs them, and the kernels below."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.bench.record import Record, timed
from jaxrlhf.bench.settings import BenchConfig
from jaxrlhf.engine import Rollout
from jaxrlhf.kernels import LIBRARIES, choose
from jaxrlhf.models import (
    Decoder,
    create_model,
    decode_step,
    generation_view,
    init_cache,
    save_pretrained,
    with_kernels,
)
from jaxrlhf.models.attend import attend_to_sequence
from jaxrlhf.models.head import head_logprobs
from jaxrlhf.models.layer_options import LayerOptions, attends_alike, attention_options, layer_options
from jaxrlhf.models.model import make_module
from jaxrlhf.models.sequences import SequenceContext, positions_from_mask
from jaxrlhf.plan.roofline import Peaks, Stages, attention_layer, logprobs, visible
from jaxrlhf.rl import Experience
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.samples import Prompts
from jaxrlhf.rl.trainer import PPOTrainer
from jaxrlhf.sharding import GENERATE_RULES, TRAIN_RULES, generate_mesh, place_batch, use

DECODE_STEPS = 32
PEAK_SIZES = {"cpu": (2048, 2**28), "accelerator": (8192, 2**30)}  # side of the matrices, bytes of the copied array
PyTree = Any
Runs = dict[str, tuple[Callable[[], object], Stages]]
"""Timed calls by name, and the least cost of each."""


def random_prompts(config: BenchConfig, vocab_size: int, rows: int) -> np.ndarray:
    """Prompts `[rows, P]` int32. Row i is the same in every batch: ids are sampled one row after the other."""
    return np.random.default_rng(config.seed).integers(0, vocab_size, (rows, config.prompt)).astype(np.int32)


def measure_peaks(config: BenchConfig) -> tuple[Peaks, Record]:
    """Fastest large matrix product and copy on one device, scaled to all devices of the mesh."""
    on_cpu = jax.default_backend() == "cpu"
    devices = 1 if on_cpu else config.mesh.make_mesh().size  # simulated devices share their cores
    side, size = PEAK_SIZES["cpu" if on_cpu else "accelerator"]
    a = jax.random.normal(jax.random.key(0), (side, side), config.mesh.compute_dtype)
    x = jnp.zeros(size // 4, jnp.float32)
    multiply, copy = jax.jit(lambda a: a @ a), jax.jit(lambda x: x + 1, donate_argnums=0)
    matmul, copying = min(timed(partial(multiply, a))[0] for _ in range(8)), math.inf
    for _ in range(8):  # into memory that is there already: a CPU would otherwise be measured at getting pages
        took, x = timed(partial(copy, x))
        copying = min(copying, took)
    peaks = Peaks(devices * 2.0 * side**3 / matmul, devices * 2.0 * size / copying)
    return peaks, {
        "tflops": peaks.flops / 1e12,
        "gb_per_second": peaks.bandwidth / 1e9,
        "devices": devices,
        "matmul": f"{side}³ {np.dtype(config.mesh.compute_dtype).name}",
        "copy": f"{size / 2**20:.0f} MiB",
    }


class Iteration:
    """The four models with random weights on the mesh, and the three phases as PPOTrainer runs them."""

    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        actor, critic = config.shapes()
        ppo = config.ppo()
        make = partial(
            create_model,
            mesh=ppo.mesh.make_mesh(),
            dtype=ppo.mesh.compute_dtype,
            remat=ppo.run.remat,
            zero_stage=ppo.compute.zero_stage,
        )
        keys = jax.random.split(jax.random.key(config.seed))
        models = make(actor, key=keys[0]), make(critic, head="scalar", key=keys[1])
        ids = {name: getattr(actor, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        eos = ids["eos_token_id"]
        ids["eos_token_id"] = eos[0] if isinstance(eos, tuple) else eos or 0
        tokenizer: Any = SimpleNamespace(**ids)
        self.engine = RLHFEngine(*models, tokenizer, num_total_iters=1, config=ppo)
        self.trainer = PPOTrainer(self.engine)
        self.trainer.sampling = ppo.sampling  # no EOS: responses have a fixed length

    def renew(self) -> None:
        """Free the models, then make them anew."""
        config = self.config
        vars(self).clear()
        self.__init__(config)

    def use_batch(self, rows: int) -> None:
        """Make prompts and set the micro-batches for a batch of `rows`."""
        self.rows = rows
        self.prompts = random_prompts(self.config, self.engine.actor.config.vocab_size, rows)
        h = self.engine.config.hyperparameters()
        parts = self.config.parts(rows)
        h = dataclasses.replace(h, micro_batches=parts)
        self.engine.state = dataclasses.replace(self.engine.state, hyperparameters=h)

    def generate(self) -> Rollout:
        """Generate the rollout that `score` takes."""
        state = self.engine.state
        prompts = Prompts.of({"prompt_ids": self.prompts, "prompt_mask": np.ones_like(self.prompts)})
        self.rollout = self.trainer.rollout(
            self.engine.generating(state), prompts, self.trainer.rollout_plan(int(state.step))
        )
        return self.rollout

    def score(self) -> Experience:
        """Score the rollout; `train` takes the experience."""
        state = self.engine.state
        self.experience = self.trainer.score(state, self.rollout, state.hyperparameters)
        return self.experience

    def train(self) -> dict[str, float]:
        """Update actor and critic on the experience."""
        self.trainer.train_rlhf(self.experience)
        self.metrics = self.trainer.metrics
        return self.metrics

    def run(self, phases: Iterable[str]) -> dict[str, float]:
        """Run these phases, in this order, on what earlier ones made; returns the seconds of each."""
        return {phase: timed(getattr(self, phase))[0] for phase in phases}

    def save(self, folder: Path) -> tuple[Path, Path]:
        """The current actor and critic as Hugging Face folders; before the first step the critic is the reward."""
        save_pretrained(self.engine.actor_model(), folder / "actor")
        save_pretrained(self.engine.critic_model(), folder / "reward")
        return folder / "actor", folder / "reward"


def attention_runs(config: BenchConfig, rows: int) -> Runs:
    """One layer's attention of the actor over prompt and response: `forward`, and `train` with gradients.

    It is the first layer. A run with the window in its name follows for each other window that layers have.
    """
    module, mesh, length = actor_module(config), config.mesh.make_mesh(), config.length
    shape = module.config
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    keys = jax.random.split(jax.random.key(config.seed), len(heads))
    arrays = [
        jax.random.normal(key, (rows, h, length, shape.head_dim), config.mesh.compute_dtype)
        for key, h in zip(keys, heads, strict=True)
    ]
    *inputs, weights = place_batch(tuple(arrays), mesh, TRAIN_RULES)
    layers = layer_options(shape)
    # As the decoder passes them: arrays, as all layers share a program, but plain numbers to kernels that want them.
    plain = config.compute.attention_implementation in LIBRARIES and attends_alike(shape)

    def forward(
        q: jax.Array, k: jax.Array, v: jax.Array, scale: float | jax.Array, window: int | jax.Array
    ) -> jax.Array:
        mask = jnp.ones((rows, length), bool)
        layer = LayerOptions(scale=scale, window=window)
        options = attention_options(shape, layer, config.compute.attention_implementation)
        with use(mesh, TRAIN_RULES):
            return attend_to_sequence(q, k, v, SequenceContext(mask, positions_from_mask(mask)), options)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, scale: float | jax.Array, window: int | jax.Array) -> jax.Array:
        return jnp.sum(forward(q, k, v, scale, window).astype(jnp.float32) * weights)

    static = (3, 4) if plain else ()
    programs = {
        "forward": jax.jit(forward, static_argnums=static),
        "train": jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=static),
    }
    kinds: dict[int, LayerOptions] = {}
    for options in layers:
        kinds.setdefault(visible(length, int(options.window)), options)
    runs: Runs = {}
    for i, options in enumerate(kinds.values()):
        numbers = (options.scale, options.window)
        given = numbers if plain else (jnp.asarray(options.scale, jnp.float32), jnp.asarray(options.window))
        for part, program in programs.items():
            name = f"{part} (window {options.window or 'none'})" if i else part
            cost = attention_layer(module, rows, length, int(options.window), part == "train")
            runs[name] = (partial(program, *inputs, *given), cost)
    return runs


def logprobs_runs(config: BenchConfig, rows: int) -> Runs:
    """Token log-probs of the actor's head, float32 as in training: `forward`, and `train` with gradients."""
    module, mesh = actor_module(config), config.mesh.make_mesh()
    shape = module.config
    keys = jax.random.split(jax.random.key(config.seed), 3)
    hidden = jax.random.normal(keys[0], (rows, config.length, shape.embedding_size), config.mesh.compute_dtype)
    weight = 0.02 * jax.random.normal(keys[1], (shape.padded_vocab_size, shape.embedding_size))
    labels = jax.random.randint(keys[2], (rows, config.length), 0, shape.vocab_size)
    hidden, labels = place_batch((hidden, labels), mesh, TRAIN_RULES)
    implementation = config.compute.logprob_implementation

    def forward(hidden: jax.Array, weight: jax.Array) -> jax.Array:
        with use(mesh, TRAIN_RULES):
            return head_logprobs(
                hidden,
                weight,
                None,
                labels,
                zero_stage=0,
                config=shape,
                implementation=implementation,
            )[0]

    gradients = jax.value_and_grad(lambda h, w: forward(h, w).sum(), argnums=(0, 1))
    return {
        part: (partial(jax.jit(program), hidden, weight), logprobs(module, rows, config.length, part == "train"))
        for part, program in (("forward", forward), ("train", gradients))
    }


class DecodeActor(NamedTuple):
    """The actor as decoding reads it."""

    module: Decoder
    view: PyTree
    """Weights as `decode_step` takes them, by the rules of generation."""
    mesh: Mesh
    """The mesh of generation."""


def decode_actor(config: BenchConfig) -> DecodeActor:
    """The actor with random weights, ready to decode."""
    shape, mesh = config.actor_shape(), config.mesh.make_mesh()
    generating = generate_mesh(mesh, shape.num_heads)
    model = create_model(shape, key=jax.random.key(config.seed), mesh=mesh, dtype=config.mesh.compute_dtype)
    model = with_kernels(
        model,
        attention_implementation=config.compute.attention_implementation,
        kv_cache_dtype=config.generation.kv_cache_dtype,
    )
    return DecodeActor(model.module, decode_view(model.module, model.params, generating), generating)


def decode_view(module: Decoder, params: PyTree, mesh: Mesh) -> PyTree:
    """Weights as decoding reads them, on the mesh of generation."""
    with use(mesh, GENERATE_RULES):
        return jax.jit(partial(generation_view, module=module))(params)


def decode_runs(
    module: Decoder, view: PyTree, mesh: Mesh, rows: int, length: int, many: int
) -> dict[str, Callable[[], jax.Array]]:
    """Steps at the end of a cache of `length` columns: `one`, and `many` of them in one program."""

    @partial(jax.jit, static_argnames="count")
    def decode(view: PyTree, *, count: int) -> jax.Array:
        def body(i: jax.Array, carry: tuple) -> tuple:
            token, caches = carry
            column = length - many + i
            logits, caches = decode_step(module, view, token, column, jnp.zeros(rows, jnp.int32), caches)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), caches

        with use(mesh, GENERATE_RULES):
            start = (jnp.zeros(rows, jnp.int32), init_cache(module, rows, length))
            return jax.lax.fori_loop(0, count, body, start)[0]

    return {"one": partial(decode, view, count=1), "many": partial(decode, view, count=many)}


def decode_kernel(module: Decoder) -> str:
    """Name of the implementation that attends to the cache; generation takes "auto" for those of training alone."""
    c, asked = module.config, module.attention_implementation
    asked = "auto" if asked in LIBRARIES else asked
    return choose("decode_attention", asked, dtype=module.dtype, head_dim=c.head_dim, alibi=c.position == "alibi")


def actor_module(config: BenchConfig) -> Decoder:
    """The actor without weights."""
    return make_module(config.actor_shape(), "lm", config.mesh.compute_dtype)
