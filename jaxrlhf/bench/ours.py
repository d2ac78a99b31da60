"""What is measured of ours: the programs of a PPO iteration as the trainer runs them, and the kernels below."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.bench.record import timed
from jaxrlhf.bench.settings import BenchConfig
from jaxrlhf.bench.work import Peaks, Work, attention_work, logprobs_work, visible
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
from jaxrlhf.models.attend import AttentionOptions, attend_to_sequence
from jaxrlhf.models.decoder import LayerOptions, alibi_slopes, layer_options, positions_from_mask
from jaxrlhf.models.head import head_logprobs
from jaxrlhf.models.model import make_module
from jaxrlhf.rl import Experience
from jaxrlhf.rl.run import PPOTrainer, RLHFEngine
from jaxrlhf.sharding import GENERATE_RULES, TRAIN_RULES, default_tensor_parallel, generate_mesh, place_batch, use

DECODE_STEPS = 32
PEAK_SIZES = {"cpu": (2048, 2**28), "accelerator": (8192, 2**30)}  # side of the matrices, bytes of the copied array
Runs = dict[str, tuple[Callable[[], Any], Work]]
"""What is timed, by name, and the work it is."""


def random_prompts(config: BenchConfig, vocab_size: int, rows: int) -> np.ndarray:
    """`[rows, P]` int32; row i is the same in every batch: numbers are drawn one row after the other."""
    return np.random.default_rng(config.seed).integers(0, vocab_size, (rows, config.prompt)).astype(np.int32)


def measure_peaks(config: BenchConfig) -> tuple[Peaks, dict[str, Any]]:
    """The fastest large matrix product and copy of one device, for all devices of the mesh."""
    devices = 1 if jax.default_backend() == "cpu" else config.make_mesh().size  # simulated ones share their cores
    side, size = PEAK_SIZES["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    a = jax.random.normal(jax.random.key(0), (side, side), config.compute_dtype)
    x = jnp.zeros(size // 4, jnp.float32)
    multiply, copy = jax.jit(lambda a: a @ a), jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds = {"matmul": min(timed(partial(multiply, a))[0] for _ in range(8)), "copy": math.inf}
    for _ in range(8):  # into memory that is there already: a CPU would otherwise be measured at getting pages
        took, x = timed(partial(copy, x))
        seconds["copy"] = min(seconds["copy"], took)
    peaks = Peaks(devices * 2.0 * side**3 / seconds["matmul"], devices * 2.0 * size / seconds["copy"])
    how = {"matmul": f"{side}³ {np.dtype(config.compute_dtype).name}", "copy": f"{size / 2**20:.0f} MiB"}
    return peaks, {"tflops": peaks.flops / 1e12, "gb_per_second": peaks.bandwidth / 1e9, "devices": devices} | how


class Iteration:
    """The four models with random weights on the mesh, and the three phases as PPOTrainer runs them."""

    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        self.rows = 0
        self.renew()

    def renew(self) -> None:
        """Make the models, in place of those that are there."""
        self.engine = self.trainer = None
        config = self.config
        shapes = config.shapes()
        ppo = config.ppo()
        mesh, dtype = ppo.make_mesh(), ppo.compute_dtype
        keys = jax.random.split(jax.random.key(config.seed))
        options = {"mesh": mesh, "dtype": dtype, "remat": ppo.remat, "zero_stage": ppo.zero_stage}
        models = (
            create_model(shapes[0], key=keys[0], **options),
            create_model(shapes[1], head="scalar", key=keys[1], **options),
        )
        ids = {name: getattr(shapes[0], name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        ids["eos_token_id"] = ids["eos_token_id"] or 0
        self.engine = RLHFEngine(*models, SimpleNamespace(**ids), num_total_iters=1, config=ppo)
        self.trainer = PPOTrainer(self.engine)
        self.trainer.sampling = ppo.sampling(None, 0)  # no EOS: answers have a fixed length

    def use_batch(self, rows: int) -> None:
        self.rows = rows
        self.prompts = random_prompts(self.config, self.engine.actor.config.vocab_size, rows)
        h = self.engine.config.hyperparameters(self.config.seed)
        parts = self.config.parts(rows)
        self.engine.state = self.engine.state.replace(hyperparameters=dataclasses.replace(h, micro_batches=parts))

    def generate(self) -> Rollout:
        batch = {"prompt_ids": self.prompts, "prompt_mask": np.ones_like(self.prompts)}
        key = jax.random.fold_in(self.trainer.key, int(self.engine.state.step))
        return self.trainer.rollout(batch, key)

    def score(self, rollout: Rollout) -> Experience:
        return self.trainer.score(rollout, self.engine.state.hyperparameters)

    def train(self, experience: Experience) -> dict[str, float]:
        self.trainer.train_rlhf(experience)
        return self.trainer.metrics

    def save(self, folder: Path) -> tuple[Path, Path]:
        """The current actor and critic as Hugging Face folders; before the first step the critic is the reward."""
        save_pretrained(self.engine.actor_model(), folder / "actor")
        save_pretrained(self.engine.critic_model(), folder / "reward")
        return folder / "actor", folder / "reward"


def attention_runs(config: BenchConfig, rows: int) -> Runs:
    """One layer's attention of the actor over prompt and answer as in training: `forward`, `train` with gradients.

    It is the first layer's; where others have another window, runs of one of them follow, whose names say it.
    """
    module, mesh = actor_module(config), config.make_mesh()
    shape, length = module.config, config.length
    keys = jax.random.split(jax.random.key(config.seed), 4)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    arrays = [
        jax.random.normal(k, (rows, h, length, shape.head_dim), config.compute_dtype)
        for k, h in zip(keys, heads, strict=True)
    ]
    *inputs, weights = place_batch(tuple(arrays), mesh, TRAIN_RULES)
    layers = layer_options(shape)
    # As the decoder passes them: arrays, as all layers share a program, but plain numbers to kernels that want them.
    plain = config.attention_implementation in LIBRARIES and all(options == layers[0] for options in layers)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, scale: Any, window: Any) -> jax.Array:
        mask = jnp.ones((rows, length), bool)
        slopes = alibi_slopes(shape.num_heads) if shape.position == "alibi" else None
        options = AttentionOptions(scale, window, slopes, config.attention_implementation)
        with use(mesh, TRAIN_RULES):
            return attend_to_sequence(q, k, v, mask, positions_from_mask(mask), options)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, scale: Any, window: Any) -> jax.Array:
        return jnp.sum(forward(q, k, v, scale, window).astype(jnp.float32) * weights)

    static = (3, 4) if plain else ()
    programs = {"forward": jax.jit(forward, static_argnums=static)}
    programs["train"] = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=static)
    kinds: dict[int, LayerOptions] = {}
    for options in layers:
        kinds.setdefault(visible(length, options.window), options)
    runs: Runs = {}
    for i, options in enumerate(kinds.values()):
        numbers = (options.scale, options.window)
        given = numbers if plain else (jnp.asarray(options.scale, jnp.float32), jnp.asarray(options.window))
        for part, program in programs.items():
            name = f"{part} (window {options.window or 'none'})" if i else part
            done = attention_work(module, rows, length, options.window, part == "train")
            runs[name] = (partial(program, *inputs, *given), done)
    return runs


def logprobs_runs(config: BenchConfig, rows: int) -> Runs:
    """Token log-probs of the actor's head, which is float32 as in training: `forward`, `train` with gradients."""
    module, mesh, dtype = actor_module(config), config.make_mesh(), config.compute_dtype
    shape = module.config
    keys = jax.random.split(jax.random.key(config.seed), 3)
    hidden = jax.random.normal(keys[0], (rows, config.length, shape.embedding_size), dtype)
    weight = 0.02 * jax.random.normal(keys[1], (shape.padded_vocab_size, shape.embedding_size))
    labels = jax.random.randint(keys[2], (rows, config.length), 0, shape.vocab_size)
    hidden, labels = place_batch((hidden, labels), mesh, TRAIN_RULES)

    def forward(hidden: jax.Array, weight: jax.Array) -> jax.Array:
        with use(mesh, TRAIN_RULES):
            options = {"vocab_size": shape.vocab_size, "implementation": config.logprob_implementation}
            return head_logprobs(hidden, weight, None, labels, zero_stage=0, **options)[0]

    gradients = jax.jit(jax.value_and_grad(lambda h, w: forward(h, w).sum(), argnums=(0, 1)))
    programs = {"forward": jax.jit(forward), "train": gradients}
    return {
        part: (partial(program, hidden, weight), logprobs_work(module, rows, config.length, part == "train"))
        for part, program in programs.items()
    }


def decode_actor(config: BenchConfig) -> tuple[Decoder, Any, Mesh]:
    """The actor's module, its weights as decoding wants them, and the mesh of generation."""
    shape, mesh = config.actor_shape(), config.make_mesh()
    flipped = generate_mesh(mesh, default_tensor_parallel(mesh, shape.num_heads))
    model = create_model(shape, key=jax.random.key(config.seed), mesh=mesh, dtype=config.compute_dtype)
    model = with_kernels(
        model, attention_implementation=config.attention_implementation, kv_cache_dtype=config.kv_cache_dtype
    )
    return model.module, decode_view(model.module, model.params, flipped), flipped


def decode_view(module: Decoder, params: Any, mesh: Mesh) -> Any:
    """Weights as decoding wants them, on the mesh of generation."""
    with use(mesh, GENERATE_RULES):
        return jax.jit(partial(generation_view, module=module))(params)


def decode_runs(
    module: Decoder, view: Any, mesh: Mesh, rows: int, length: int, many: int
) -> dict[str, Callable[[], Any]]:
    """Steps at the end of a cache of `length` columns: `one`, and `many` of them in one program."""

    @partial(jax.jit, static_argnames="count")
    def decode(view: Any, *, count: int) -> jax.Array:
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
    """Which implementation attends to the cache: what "auto" means here, and those of training alone."""
    c, asked = module.config, module.attention_implementation
    asked = "auto" if asked in LIBRARIES else asked
    return choose("decode_attention", asked, dtype=module.dtype, head_dim=c.head_dim, alibi=c.position == "alibi")


def actor_module(config: BenchConfig) -> Decoder:
    """Without weights."""
    return make_module(config.actor_shape(), "lm", config.compute_dtype)
