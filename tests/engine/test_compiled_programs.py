"""What the compiler made of the two programs: where collectives and copies are, read from the optimised HLO."""

import re
from collections import Counter
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf.engine import HybridEngine, Requests, generate
from jaxrlhf.models import init_cache
from jaxrlhf.plan.programs import lower, topology_devices
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import build_system
from jaxrlhf.rl import Experience, PPOHyperparameters, ppo_step
from jaxrlhf.sharding import GENERATE_RULES, generate_mesh, use

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# Few rows and a wide model, so that the smallest weight is larger than the largest activation.
WIDE = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 16}
# With a single key/value head per device XLA's CPU backend does copy caches, unlike that for GPUs: here there are two.
WIDE |= {"num_key_value_heads": 16, "intermediate_size": 192, "max_position_embeddings": 64}
LAYERS, ROWS, PROMPT, ANSWER = 3, 2, 6, 26


class Instruction(NamedTuple):
    computation: str
    opcode: str
    elements: tuple[int, ...]
    """Of each result, per device."""
    shapes: tuple[tuple[int, ...], ...]
    source: str
    """Names of the JAX operations and scopes it came from."""


class Program:
    """Instructions of a compiled program by computation, and which computations call which."""

    def __init__(self, text: str) -> None:
        self.instructions: list[Instruction] = []
        self.calls: dict[str, set[str]] = {}
        self.bodies: list[tuple[str, str]] = []
        computation = ""
        for line in text.splitlines():
            if head := re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
                computation = head[1]
                self.calls[computation] = set()
                continue
            found = re.match(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
            if found is None:
                continue
            name = re.search(r'op_name="([^"]*)"', line)
            source, opcode = name[1] if name else "", found[2].removesuffix("-start")
            shapes = tuple(tuple(map(int, s.split(","))) if s else () for s in re.findall(r"\w+\[([\d,]*)\]", found[1]))
            self.instructions.append(Instruction(computation, opcode, tuple(map(prod, shapes)), shapes, source))
            self.calls[computation].update(re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line))
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                self.calls[computation].update(x.strip().lstrip("%") for x in group.split(","))
            if opcode == "while":
                self.bodies.append((re.search(r"body=%?([\w.\-]+)", line)[1], source))

    def below(self, computation: str) -> set[str]:
        """The computation and all that it calls, directly or not."""
        reached, todo = set(), [computation]
        while todo:
            one = todo.pop()
            if one not in reached:
                reached.add(one)
                todo += self.calls.get(one, ())
        return reached

    def inside(self, computation: str, *opcodes: str) -> list[Instruction]:
        names = self.below(computation)
        return [i for i in self.instructions if i.computation in names and i.opcode in opcodes]


def decode_loop(program: Program) -> str:
    """The body of the one loop that holds the layers' attention."""
    found = {body for body, source in program.bodies if source.endswith("jit(generate)/while")}
    assert len(found) == 1, program.bodies
    return found.pop()


@pytest.fixture(scope="module")
def generate_programs(lab):
    """{tensor-parallel size: (engine, compiled generate program)} on 8 devices that store fully sharded."""
    mesh = lab.mesh_of(1, 8, 1)
    model = lab.tiny_model(WIDE, mesh=mesh)

    def compiled(group: int) -> tuple[HybridEngine, Program]:
        engine = HybridEngine(model, mesh, group)
        rows = ROWS * 8 // group
        shapes = ((rows, PROMPT), jnp.int32), ((rows, PROMPT), bool), ((rows,), jnp.int32)
        requests = Requests(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        sampling = lab.sampling.__class__(ANSWER, eos_token_id=5)
        static = {"module": engine.module, "sampling": sampling, "mesh": engine.generate_mesh}
        lowered = generate.lower(engine.params, requests, jax.random.key(0), **static)
        return engine, Program(lowered.compile().as_text())

    return {group: compiled(group) for group in (8, 2)}


def cache_elements(engine: HybridEngine, rows: int) -> int:
    """Elements per device of the keys of one layer."""
    with use(engine.generate_mesh, GENERATE_RULES):
        cache = jax.jit(lambda: init_cache(engine.module, rows, PROMPT + ANSWER))()
    return cache[0][0].addressable_shards[0].data.size


@pytest.mark.parametrize("group", (8, 2))
def test_the_decode_loop_moves_activations_only(group, generate_programs):
    """No collective of a weight's or a cache's size, and no copy of one: neither as such nor inside a fusion."""
    engine, program = generate_programs[group]
    body = decode_loop(program)
    activation = ROWS * WIDE["hidden_size"]
    smallest = min(WIDE["hidden_size"] ** 2 // group, cache_elements(engine, ROWS * 8 // group))
    assert smallest > activation
    collectives = program.inside(body, *COLLECTIVES)
    assert len([i for i in collectives if "dot_general" in i.source]) == 2 * LAYERS, "attention's and the MLP's sum"
    assert max(max(i.elements) for i in collectives) <= activation
    copies = program.inside(body, "copy", "transpose")
    assert copies
    assert max(max(i.elements) for i in copies) < smallest
    # in place: a cache is written through a dynamic-update-slice, once per layer for keys and for values
    written = [i for i in program.inside(body, "dynamic-update-slice") if len(i.shapes[0]) == 4]
    assert len(written) == 2 * LAYERS


def moved_weights(program: Program) -> list[Instruction]:
    """Collectives of at least a weight's size outside the decode loop."""
    loop = program.below(decode_loop(program))
    smallest = WIDE["hidden_size"] ** 2 // 8
    outside = (i for i in program.instructions if i.opcode in COLLECTIVES and i.computation not in loop)
    return [i for i in outside if max(i.elements) >= smallest and "Decoder" not in i.source and "Block" not in i.source]


def test_the_flip_is_free_where_generation_splits_what_storage_splits(generate_programs):
    assert moved_weights(generate_programs[8][1]) == []


def test_otherwise_the_flip_is_one_gather_per_weight_before_the_loop(generate_programs):
    flips = moved_weights(generate_programs[2][1])
    assert {i.opcode for i in flips} == {"all-gather"}
    assert len(flips) == 7 * LAYERS + 2  # q, k, v, out, gate, up, down; embedding and head


FAMILIES = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96},
    "opt": {"model_type": "opt", "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"ffn_dim": 64, "max_position_embeddings": 96, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
}


@pytest.fixture
def compiler_speaks(capfd):
    """Programs are compiled anew, so that what the compiler has to say is said; returns that."""
    jax.config.update("jax_enable_compilation_cache", False)
    jax.clear_caches()
    yield lambda: capfd.readouterr().err
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize(("family", "shape"), [("gpt2", (1, 8, 1)), ("opt", (2, 2, 2))])
def test_no_array_is_copied_whole_for_want_of_a_better_way(family, shape, lab, compiler_speaks):
    """Four heads on fsdp=8 are stored over `embed` and generated by groups of four; tables are stored by width."""
    setup = lab.Setup(lab.mesh_of(*shape), options=FAMILIES[family])
    experience = setup.experience(setup.rollout(lab.sampling))
    jax.block_until_ready(ppo_step(setup.state(lab.sgd), experience)[0].step)
    assert "Involuntary full rematerialization" not in compiler_speaks()


def test_a_bad_constraint_is_noticed(lab, compiler_speaks):
    """What the test above looks for is what the compiler says of a real one."""
    mesh = lab.mesh_of(1, 8, 1)
    view = generate_mesh(mesh, 4, 4)
    x = jax.ShapeDtypeStruct((64, 4, 8), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    target = NamedSharding(view, P(None, "fsdp"))
    jax.jit(lambda x: jax.lax.with_sharding_constraint(2 * x, target)).lower(x).compile()
    assert "Involuntary full rematerialization" in compiler_speaks()


def train_program(lab, stage: int) -> Program:
    mesh = lab.mesh_of(1, 8, 1)
    hyperparameters = PPOHyperparameters(num_mini_batches=2, micro_batches=2)
    setup = lab.Setup(mesh, stages=(stage, 3, 3, 3), options=WIDE, remat="full")
    state = setup.state(optax.adam(1e-3), hyperparameters)
    shape = (32, PROMPT + ANSWER)
    whole = {name: jax.ShapeDtypeStruct(shape, bool) for name in ("mask", "response_mask")}
    names = ("logprobs", "ref_logprobs", "values", "sampler_logprobs", "entropy")
    whole |= {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in names}
    tokens, scores = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    return Program(ppo_step.lower(state, Experience(tokens=tokens, scores=scores, **whole)).compile().as_text())


def test_fully_sharded_training_gathers_layer_by_layer(lab):
    """Stage 3: what is gathered at a time is one layer's weight, inside the loop over layers; never the stacked one."""
    program = train_program(lab, 3)
    gathers = [i for i in program.instructions if i.opcode == "all-gather" and "hidden_states/while/" in i.source]
    loops = set().union(*(program.below(body) for body, _ in program.bodies))
    found = Counter(i.computation for i in gathers)
    assert len(found) == 4, "forward and backward, actor and critic"
    assert set(found.values()) == {7}, "q, k, v, out, gate, up, down of one layer"
    for one in gathers:
        assert max(one.elements) <= WIDE["hidden_size"] * WIDE["intermediate_size"], f"{one} is more than one matrix"
        assert one.computation in loops


def test_stage_two_gathers_the_model_once_per_update_and_nothing_in_the_layers(lab):
    program = train_program(lab, 2)
    actor = [i for i in program.instructions if i.opcode == "all-gather" and "working_copy" in i.source]
    stacked = LAYERS * WIDE["hidden_size"] * WIDE["intermediate_size"]
    assert stacked in {n for i in actor for n in i.elements}
    assert not [i for i in actor if "checkpoint" in i.source]


# ---- the compilers of real devices, where their packages are installed (extras plan-cuda, plan-tpu)


@pytest.fixture(scope="module", params=[("a100-80g", "jax_cuda12_plugin", ""), ("v5e", "libtpu", "2x2")], ids=str)
def ahead_of_time(request):
    """(device, {"generate", "train": (program, its text)}) of Pythia-70M on four devices in bfloat16."""
    device, package, topology = request.param
    pytest.importorskip(package)
    options = {"actor": "pythia-70m", "reward": "pythia-70m", "device": device, "devices": 4, "dtype": "bfloat16"}
    options |= {"max_prompt_seq_len": 64, "max_answer_seq_len": 64, "per_device_train_batch_size": 16}
    config = PlanConfig.create(**options, generate_tensor_parallel=4, remat_policy="full")
    system = build_system(config, devices=topology_devices(config.accelerator, topology, 4))
    texts = {name: lower(system, name).compile().as_text() for name in ("generate", "train")}
    return device, {name: (Program(text), text) for name, text in texts.items()}


def test_on_real_devices_the_decode_loop_moves_activations_only(ahead_of_time):
    device, programs = ahead_of_time
    program, _ = programs["generate"]
    body = decode_loop(program)
    rows, hidden = 64, 512
    collectives = program.inside(body, *COLLECTIVES)
    # a parallel residual's two sums may come as one of two arrays
    assert max(max(i.elements) for i in collectives) <= 2 * rows * hidden
    # on TPUs a copy is also what prefetches into the core's own memory
    kinds = ("copy", "transpose") if device == "a100-80g" else ("transpose",)
    assert max((max(i.elements) for i in program.inside(body, *kinds)), default=0) <= rows * hidden
    loop = program.below(body)
    outside = [i for i in program.instructions if i.opcode in COLLECTIVES and i.computation not in loop]
    assert not [i for i in outside if i.opcode != "all-reduce" and max(i.elements) > rows * hidden], "the flip"


def test_on_real_devices_layers_are_gathered_in_the_compute_dtype_and_beside_computation(ahead_of_time):
    device, programs = ahead_of_time
    program, text = programs["train"]
    gathers = [i for i in program.instructions if i.opcode == "all-gather" and "hidden_states/while/" in i.source]
    assert gathers
    assert max(max(i.elements) for i in gathers) <= 512 * 2048
    lines = [line for line in text.splitlines() if " all-gather" in line and "hidden_states/while/" in line]
    assert lines
    assert not [line for line in lines if "-done" not in line and re.search(r"= \(?f32\[\d+,\d{3,}", line)]
    if device == "a100-80g":  # the start and the end of a gather stand apart: something runs in between
        assert set(overlapped(text).values()) == {True}


def overlapped(text: str) -> dict[str, bool]:
    """Of each loop over layers: whether a gather runs beside something else in it."""
    found: dict[str, bool] = {}
    computation, started = "", {}
    for number, line in enumerate(text.splitlines()):
        if head := re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation, started = head[1], {}
        elif (start := re.match(r"\s+%([\w.\-]+) = .* all-gather-start\(", line)) and "hidden_states/while/" in line:
            started[start[1]] = number
        elif (end := re.search(r" all-gather-done\(%([\w.\-]+)\)", line)) and end[1] in started:
            found[computation] = found.get(computation, False) or number - started[end[1]] > 1
    return found
