"""Tiny models, rollouts and PPO states on any mesh, made without compiling; and demo data with models on disk."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.engine import HybridEngine, SamplingConfig
from jaxrlhf.models import Decoder, Model, config_from_dict, param_shapes, param_shardings, save_pretrained
from jaxrlhf.rl import PPOHyperparameters, PPOState, RLModels, score_rollout
from jaxrlhf.sharding import make_mesh, offloaded, optimizer_shardings, place

LLAMA = {"model_type": "llama", "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8}
LLAMA |= {"num_key_value_heads": 8, "intermediate_size": 64, "max_position_embeddings": 64}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 16}
GPT2 = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
GPT2 |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}

ROWS, PROMPT, ANSWER = 16, 6, 10
EOS = (5, 17, 33, 70)
SAMPLING = SamplingConfig(ANSWER, eos_token_id=EOS, pad_token_id=0)
DEFAULTS = PPOHyperparameters()


def few(cases, kept):
    """Parameters of a test: those of `kept`, and the other cases for `make test-long`."""
    return [case if case in kept else pytest.param(case, marks=pytest.mark.long) for case in cases]


def tiny_model(options=LLAMA, head="lm", seed=0, mesh=None, scale=0.3, dtype=jnp.float32, **layout) -> Model:
    """A model with normal random weights drawn by numpy: the same on every mesh, and nothing to compile."""
    config = config_from_dict(options)
    module = Decoder(config, head=head, dtype=dtype, **layout)
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        name = path[-1].key
        return rng.normal(float(name == "scale"), 0.1 if name in ("scale", "bias") else scale, x.shape).astype("f4")

    params = jax.tree.map_with_path(leaf, param_shapes(module))
    device = jax.devices()[0]
    shardings = jax.tree.map(lambda _: device, params) if mesh is None else param_shardings(module, mesh)
    return Model(module=module, params=place(params, shardings), config=config)


def mesh_of(data=1, fsdp=1, tensor=1, expert=1, context=1):
    sizes = data, fsdp, tensor, expert, context
    return make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


def prompts(rows=ROWS, width=PROMPT, seed=0, vocab=101):
    """Left-padded random prompts `[rows, width]`, each of at least two tokens, and their mask."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, vocab, (rows, width))
    mask = np.arange(width)[None] >= rng.integers(0, width - 1, rows)[:, None]
    return ids, mask


def on_host(model: Model) -> Model:
    return model.replace(params=place(model.params, offloaded(jax.tree.map(lambda x: x.sharding, model.params))))


class Setup:
    """The four models of a PPO run on one mesh; the reference and the reward model differ from actor and critic.

    `stages`: ZeRO stage of actor, critic, reference and reward. `offload`: reference, reward and moments lie in host
    memory.
    """

    def __init__(self, mesh, tensor_parallel=None, stages=(3, 3, 3, 3), offload=False, **options) -> None:
        self.mesh, self.offload = mesh, offload
        actor, critic, reference, reward = stages
        self.actor = tiny_model(mesh=mesh, zero_stage=actor, **options)
        self.reference = tiny_model(mesh=mesh, seed=5, zero_stage=reference, **options)
        self.critic = tiny_model(mesh=mesh, head="scalar", seed=1, zero_stage=critic, **options)
        self.reward = tiny_model(mesh=mesh, head="scalar", seed=2, zero_stage=reward, **options)
        if offload:
            self.reference, self.reward = map(on_host, (self.reference, self.reward))
        self.engine = HybridEngine(self.actor, mesh, tensor_parallel)

    def rollout(self, sampling, seed=3, **options):
        ids, mask = prompts()
        return self.engine.generate(ids, mask, jax.random.key(seed), sampling, **options)

    def experience(self, rollout, hyperparameters=DEFAULTS):
        models = RLModels(self.actor, self.reference, self.critic, self.reward)
        return score_rollout(rollout, models, hyperparameters=hyperparameters, mesh=self.mesh, sampling=SAMPLING)

    def state(self, optimizer, hyperparameters=DEFAULTS, kl_coef=0.1, critic_optimizer=None, seed=0):
        """A state of its own: donating it leaves the models alone."""
        critic_optimizer = critic_optimizer or optimizer

        def copy(model):
            return jax.tree.map(jnp.copy, model.params)

        def moments(optimizer, model):
            shardings = param_shardings(model.module, self.mesh)
            shardings = optimizer_shardings(optimizer, model.params, shardings, self.mesh, offload=self.offload)
            return jax.jit(optimizer.init, out_shardings=shardings)(model.params)

        return PPOState(
            step=jnp.int32(0),
            actor_params=copy(self.actor),
            critic_params=copy(self.critic),
            actor_opt_state=moments(optimizer, self.actor),
            critic_opt_state=moments(critic_optimizer, self.critic),
            ema_params=copy(self.actor),
            kl_coef=jnp.float32(kl_coef),
            seed=jnp.uint32(seed),
            actor=self.actor.module,
            critic=self.critic.module,
            actor_optimizer=optimizer,
            critic_optimizer=critic_optimizer,
            hyperparameters=hyperparameters,
            mesh=self.mesh,
        )


def without_critic(state):
    """A PPO state as algorithms without a critic have it."""
    return state.replace(critic=None, critic_params=None, critic_opt_state=None, critic_optimizer=None)


@pytest.fixture
def no_report(monkeypatch):
    """Runs draw no report, which has tests of its own."""
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)


@pytest.fixture(scope="session")
def lab():
    """What the tests of engine and PPO are made of. One optimizer object each, so that equal programs compile once."""
    return SimpleNamespace(
        tiny_model=tiny_model,
        mesh_of=mesh_of,
        prompts=prompts,
        Setup=Setup,
        LLAMA=LLAMA,
        MIXTRAL=MIXTRAL,
        GPT2=GPT2,
        ROWS=ROWS,
        PROMPT=PROMPT,
        ANSWER=ANSWER,
        EOS=EOS,
        sampling=SAMPLING,
        sgd=optax.sgd(0.1),
        still=optax.sgd(0.0),
    )


@pytest.fixture(scope="session")
def setup(lab):
    """The PPO models on one device."""
    return lab.Setup(lab.mesh_of())


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A small demo data set, its tokenizer, and GPT-2 models (dropout 0.1) on disk: `lm`, `reward`."""
    pytest.importorskip("transformers")
    from jaxrlhf.data import load_tokenizer
    from jaxrlhf.data.demo import write_demo

    folder = tmp_path_factory.mktemp("demo")
    paths = write_demo(folder / "data", size=400)
    tokenizer = load_tokenizer(str(paths.tokenizer))
    options = GPT2 | {"vocab_size": len(tokenizer)}
    for name, head, seed in (("lm", "lm", 0), ("reward", "scalar", 1)):
        save_pretrained(tiny_model(options, head, seed, scale=0.2), folder / name, tokenizer)
    return SimpleNamespace(
        folder=folder,
        train=str(paths.train),
        eval=str(paths.eval),
        tokenizer=tokenizer,
        lm=str(folder / "lm"),
        reward=str(folder / "reward"),
        cache=str(folder / "cache"),
        options=options,
    )
