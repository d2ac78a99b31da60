"""Measuring generate, score, train and whole PPO iterations, ours and the peers' in turns."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxrlhf.bench.ours import Iteration, decode_kernel
from jaxrlhf.bench.record import Record, Records, Times, peak_memory, reset_peak_memory, say, summary
from jaxrlhf.bench.settings import PHASES, BenchConfig
from jaxrlhf.errors import InputError
from jaxrlhf.plan import roofline
from jaxrlhf.plan.roofline import Peaks, Stages
from jaxrlhf.rl import Experience

if TYPE_CHECKING:
    from jaxrlhf.bench.peers import Tensors, TorchPeer
    from jaxrlhf.bench.trl_peer import TrlPeer

# Largest gaps between ours and the peer that rounding explains: of log-probs, values and scores; of losses and gradient
# norms, relative; of the former after one optimizer step, whose first update is little more than the gradient's sign.
TOLERANCE = {"float32": (1e-4, 1e-4, 1e-3), "bfloat16": (0.15, 0.15, 0.3)}
TORCH_PEERS = ("hf", "hf-compile")


def rates(stages: Stages, seconds: list[float], rows: int, tokens: int, peaks: Peaks) -> Record:
    """Metrics of a measurement: rates by the median, and the share of the roofline.

    Args:
        stages: Least cost of what was measured.
        seconds: Time of each round.
        rows: Sequences of the batch.
        tokens: Tokens per row that rates count.
        peaks: Measured peaks of the devices.
    """
    spread, cost = summary(seconds), roofline.total(stages)
    median, least = spread["median"], roofline.roofline_seconds(stages, peaks)
    return {
        "batch": rows,
        "seconds": spread,
        "tokens_per_second": rows * tokens / median,
        "sequences_per_second": rows / median,
        "tflops": cost.flops / median / 1e12,
        "gb_per_second": cost.bytes / median / 1e9,
        "roofline_seconds": least,
        "roofline_fraction": least / median,
    }


def ratios(peer: list[float], ours: list[float]) -> Record:
    """Peer over ours, by minima and by medians: above 1, ours is faster."""
    theirs, own = summary(peer), summary(ours)
    return {"ratio": theirs["min"] / own["min"], "ratio_median": theirs["median"] / own["median"], "seconds": theirs}


def phase_stages(config: BenchConfig, iteration: Iteration, rows: int) -> dict[str, tuple[Stages, int]]:
    """Stages of each phase, and the tokens per row that its rate counts."""
    actor, critic = iteration.engine.state.actor, iteration.engine.state.critic
    assert critic is not None
    lengths = (rows, config.prompt, config.answer)
    return {
        "generate": (roofline.generate(actor, *lengths), config.answer),
        "score": (roofline.score(actor, critic, *lengths), config.length),
        "train": (roofline.train(actor, critic, *lengths), config.length),
    }


def gaps(
    ours: Experience,
    peer: "Tensors",
    prompt: int,
    metrics: Mapping[str, float] | None = None,
    peer_metrics: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Largest absolute gaps of the experience, and relative gaps of losses and gradient norms where given."""
    result = {}
    for name in ("logprobs", "ref_logprobs", "values", "scores"):
        own = np.asarray(getattr(ours, name), np.float32)
        own = own if own.ndim == 1 else own[:, prompt:]
        result[name] = float(np.abs(own - peer[name].float().cpu().numpy()).max())
    for name, b in (peer_metrics or {}).items():
        a = (metrics or {})[name]
        # The first policy loss is the mean of whitened advantages, so 0 up to rounding.
        result[name] = abs(a - b) / max(abs(a), abs(b), 1.0 if name == "loss/policy_avg" else 1e-6)
    return result


def judged(first: Mapping[str, float], after_a_step: Mapping[str, float], dtype: str) -> Record:
    """The tolerances of a compute dtype, and under `wrong` the gaps above them."""
    near, relative, after = TOLERANCE[dtype]
    limits = {name: near if name in after_a_step else relative for name in first}
    wrong = [f"{name} {gap:.2g}" for name, gap in first.items() if not gap <= limits[name]]
    wrong += [f"{name} {gap:.2g} after a step" for name, gap in after_a_step.items() if not gap <= after]
    return {"tolerance": {"experience": near, "losses": relative, "after_a_step": after}, "wrong": wrong}


class Peers:
    """The peers of one run, and the seconds that they took."""

    def __init__(self, config: BenchConfig, iteration: Iteration, folder: Path) -> None:
        from jaxrlhf.bench.peers import torch_device

        self.config, self.iteration, self.names = config, iteration, config.peers
        self.folders = iteration.save(folder)
        self.dtype = np.dtype(config.mesh.compute_dtype).name
        self.torch: TorchPeer | None = None
        self.trl: TrlPeer | None = None
        self.check: Record = {}
        self.device = torch_device(jax.default_backend())
        self.lost: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.times: dict[str, list[dict[str, float]]] = {}

    @property
    def compares(self) -> bool:
        """True while results of a torch peer are still to be compared with ours."""
        return bool(set(self.names) & set(TORCH_PEERS)) and not self.check

    def prepare(self, rows: int, whole: bool) -> None:
        """Load, compare and warm up for a batch whose experience ours has; forget the times of another batch.

        `whole`: whole iterations are measured. TRL has nothing else.
        """
        from jaxrlhf.bench.peers import memory_permitting

        with memory_permitting(self._give_up_torch):
            self._load_torch()
            if self.torch is not None and self.compares:
                self._compare(self.torch)
        if not whole:
            self.names = tuple(name for name in self.names if name != "trl")
        self.times = {name: [] for name in self.names}
        self.skipped = dict(self.lost)
        if self.torch is not None:
            self.torch.micro_batches = self.config.parts(rows)
            for name in set(TORCH_PEERS) & set(self.names):
                with self._memory_permitting(name):
                    self.torch.generate(self.torch.tokens(self.iteration.prompts), compiled=name == "hf-compile")
        if "trl" in self.names:
            self._load_trl(rows)

    def _load_torch(self) -> None:
        """Give torch its models, only now: the peak of our memory is measured without them."""
        if self.torch is None and set(self.names) & set(TORCH_PEERS):
            from jaxrlhf.bench.peers import TorchPeer

            self.torch = TorchPeer(*self.folders, self.config.ppo(), self.device, self.dtype)

    def _give_up_torch(self) -> None:
        """Its models alone, or one update of all rows, do not fit beside ours."""
        self.lost = {name: "out of memory" for name in self.names if name in TORCH_PEERS}
        self.names = tuple(name for name in self.names if name not in self.lost)
        self.torch, self.check = None, {}

    def _load_trl(self, rows: int) -> None:
        from jaxrlhf.bench.trl_peer import TrlPeer

        parts, prompts = self.config.parts(rows), self.iteration.prompts
        self.trl = None  # the models of the batch before
        with self._memory_permitting("trl"):
            self.trl = TrlPeer(self.folders, self.config.ppo(), prompts, self.device, self.dtype, parts)
            self.trl.iteration()

    def _memory_permitting(self, *names: str) -> AbstractContextManager:
        from jaxrlhf.bench.peers import memory_permitting

        return memory_permitting(lambda: self.skipped.update(dict.fromkeys(names, "out of memory")))

    def _compare(self, torch: "TorchPeer") -> None:
        """Score and train on our rollout, before either side's second step; then score the next one.

        The second gaps show that the optimizer steps were the same.
        """
        ours, prompt = self.iteration, self.config.prompt
        scored = torch.score(torch.tokens(ours.rollout.tokens))
        first = gaps(ours.experience, scored, prompt, ours.metrics, torch.train(scored))
        ours.run(("generate", "score"))
        after = gaps(ours.experience, torch.score(torch.tokens(ours.rollout.tokens)), prompt)
        self.check = {"first": first, "after_a_step": after} | judged(first, after, self.dtype)

    def run(self, phases: Sequence[str]) -> None:
        """One round of the peers; what hf and hf-compile share runs once."""
        if self.trl is not None and "trl" in self.names and "trl" not in self.skipped:
            with self._memory_permitting("trl"):
                self.times["trl"].append({"iteration": self.trl.iteration()})
        if self.torch is None:
            return
        torch, prompts = self.torch, self.torch.tokens(self.iteration.prompts)
        names = [name for name in self.names if name in TORCH_PEERS and name not in self.skipped]
        took: dict[str, dict[str, float]] = {name: {} for name in names}
        tokens = None
        for name in names:
            if "generate" in phases or tokens is None:
                with self._memory_permitting(name):
                    took[name]["generate"], tokens = torch.timed(torch.generate, prompts, name == "hf-compile")
        if tokens is not None and {"score", "train"} & set(phases):
            with self._memory_permitting(*names):
                shared = {}
                shared["score"], experience = torch.timed(torch.score, tokens)
                if "train" in phases:
                    shared["train"], _ = torch.timed(torch.train, experience)
                for name in names:
                    took[name] |= shared
        for name in names:
            if name not in self.skipped:
                self.times[name].append({phase: took[name][phase] for phase in phases})

    def results(self, ours: Times) -> dict[str, Records]:
        """Metrics of each peer by section: ratios to the seconds of `ours` there, and how both compare."""
        return {name: self._results(name, ours) for name in (*self.lost, *self.names)}

    def _results(self, name: str, ours: Times) -> Records:
        if name == "trl":
            skipped = {"skipped": self.skipped[name]} if name in self.skipped else None
            return {"ppo": skipped or ratios([run["iteration"] for run in self.times[name]], ours["ppo"])}
        if name in self.skipped:
            skipped = {"skipped": self.skipped[name]} | ({"check": self.check} if self.check else {})
            return {section: skipped for section in ours}
        phases = {phase: [run[phase] for run in self.times[name]] for phase in ours if phase in PHASES}
        found = {phase: ratios(seconds, ours[phase]) for phase, seconds in phases.items()}
        if "ppo" in ours:
            whole = [float(sum(parts)) for parts in zip(*phases.values(), strict=True)]
            found["ppo"] = ratios(whole, ours["ppo"]) | {"phases": dict(found)}
        return {section: record | {"check": self.check} for section, record in found.items()}


def measure_iteration(
    config: BenchConfig, wanted: Sequence[str], iteration: Iteration, peers: Peers | None, peaks: Peaks, rows: int
) -> Records:
    """Records of the sections `wanted` among generate, score, train and ppo, at a batch of `rows`."""
    phases = tuple(name for name in PHASES if name in wanted or "ppo" in wanted)
    iteration.use_batch(rows)
    reset_peak_memory()
    # Later phases need what earlier ones make, and the comparison with peers needs all of them.
    compared = peers is not None and peers.compares
    first = iteration.run(PHASES if compared else PHASES[: 1 + PHASES.index(phases[-1])])
    memory = peak_memory()
    if peers is not None:
        peers.prepare(rows, whole="ppo" in wanted)
    times: Times = {phase: [] for phase in phases}
    for turn in range(config.repeats):
        for phase, seconds in iteration.run(phases).items():
            times[phase].append(seconds)
        if peers is not None:
            peers.run(phases)
        say(f"  batch {rows}, round {turn + 1} of {config.repeats}: " + _round(times, peers))
    records = _records(config, iteration, times, first, peaks)
    if "ppo" in wanted:
        times["ppo"] = records["ppo"]["seconds"]["runs"]
    for name in wanted:
        records[name] |= {"peak_memory": memory, "peers": {}}
    for name, found in peers.results(times).items() if peers else ():
        for section in set(wanted) & found.keys():
            records[section]["peers"][name] = found[section]
    return {name: records[name] for name in wanted}


def _records(
    config: BenchConfig, iteration: Iteration, times: Times, first: Mapping[str, float], peaks: Peaks
) -> Records:
    """A record for each phase in `times`, and under `ppo` one for all of them together."""
    rows, stages = iteration.rows, phase_stages(config, iteration, iteration.rows)
    records: Records = {}
    for phase, seconds in times.items():
        record = records[phase] = rates(stages[phase][0], seconds, rows, stages[phase][1], peaks)
        record["compile_seconds"] = max(0.0, first[phase] - record["seconds"]["median"])
    if "generate" in times:
        records["generate"]["decode_attention"] = decode_kernel(iteration.engine.state.actor)
    together = [float(sum(parts)) for parts in zip(*times.values(), strict=True)]
    whole = rates(tuple(s for phase in times for s in stages[phase][0]), together, rows, config.length, peaks)
    whole["compile_seconds"] = sum(record["compile_seconds"] for record in records.values())
    return records | {"ppo": whole | {"phases": {phase: dict(record) for phase, record in records.items()}}}


def _round(times: dict[str, list[float]], peers: Peers | None) -> str:
    parts = [f"ours {' + '.join(f'{seconds[-1]:.2f}' for seconds in times.values())} s"]
    for name, runs in (peers.times if peers else {}).items():
        if runs:
            parts.append(f"{name} {' + '.join(f'{s:.2f}' for s in runs[-1].values())} s")
    return ", ".join(parts)


@contextmanager
def iteration_with_peers(config: BenchConfig) -> Iterator[tuple[Iteration, Peers | None]]:
    """The models, and the peers with the same weights. InputError for a text or mesh that does not fit."""
    iteration = Iteration(config)
    if not config.peers:
        yield iteration, None
        return
    if iteration.engine.mesh.size > 1 and jax.default_backend() != "cpu":  # simulated devices share their cores
        raise InputError("peers: they run on one device; compare on a mesh of one, or leave them out")
    with tempfile.TemporaryDirectory() as folder:
        yield iteration, Peers(config, iteration, Path(folder))
