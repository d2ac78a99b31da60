"""Measuring generate, score, train and whole PPO iterations, ours and the peers' in turns."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf.bench import work
from jaxrlhf.bench.ours import Iteration, decode_kernel
from jaxrlhf.bench.record import peak_memory, reset_peak_memory, summary, timed
from jaxrlhf.bench.settings import PHASES, BenchConfig
from jaxrlhf.errors import InputError

# Largest gap between ours and the peer that rounding explains: of log-probs, values and scores; of losses and gradient
# norms, relative; of the former after one optimizer step, whose first update is little more than the gradient's sign.
TOLERANCE = {"float32": (1e-4, 1e-4, 1e-3), "bfloat16": (0.15, 0.15, 0.3)}
TORCH_PEERS = ("hf", "hf-compile")


def figures(done: work.Work, seconds: list[float], rows: int, tokens: int, peaks: work.Peaks) -> dict[str, Any]:
    """What a measurement says: rates by the median, and the share of the roofline."""
    spread = summary(seconds)
    median, least = spread["median"], done.seconds(peaks)
    return {
        "batch": rows,
        "seconds": spread,
        "tokens_per_second": rows * tokens / median,
        "sequences_per_second": rows / median,
        "tflops": done.flops / median / 1e12,
        "gb_per_second": done.bytes / median / 1e9,
        "roofline_seconds": least,
        "roofline_fraction": least / median,
    }


def ratios(peer: list[float], ours: list[float]) -> dict[str, Any]:
    """Peer over ours, by minima and by medians: above 1, ours is faster."""
    theirs, own = summary(peer), summary(ours)
    return {"ratio": theirs["min"] / own["min"], "ratio_median": theirs["median"] / own["median"], "seconds": theirs}


def phase_work(config: BenchConfig, iteration: Iteration, rows: int) -> dict[str, tuple[work.Work, int]]:
    """The work of each phase, and how many tokens per row its rate counts."""
    actor, critic = iteration.engine.state.actor, iteration.engine.state.critic
    lengths = (rows, config.prompt, config.answer)
    return {
        "generate": (work.generate_work(actor, *lengths), config.answer),
        "score": (work.score_work(actor, critic, *lengths), config.length),
        "train": (work.train_work(actor, critic, *lengths), config.length),
    }


def gaps(ours: Any, ours_metrics: dict | None, peer: dict, peer_metrics: dict | None, prompt: int) -> dict[str, float]:
    """Largest absolute gaps of the experience, and relative ones of losses and gradient norms."""
    result = {}
    for name in ("logprobs", "ref_logprobs", "values", "scores"):
        own = np.asarray(getattr(ours, name), np.float32)
        own = own if own.ndim == 1 else own[:, prompt:]
        result[name] = float(np.abs(own - peer[name].float().cpu().numpy()).max())
    for name in peer_metrics or {}:
        a, b = ours_metrics[name], peer_metrics[name]
        # The first policy loss is the mean of whitened advantages, so 0 up to rounding.
        result[name] = abs(a - b) / max(abs(a), abs(b), 1.0 if name == "loss/policy_avg" else 1e-6)
    return result


def judged(first: dict[str, float], after_a_step: dict[str, float], dtype: str) -> dict[str, Any]:
    """The tolerances for a compute dtype, and under `wrong` what lies above them."""
    near, relative, after = TOLERANCE[dtype]
    limits = {name: near if name in after_a_step else relative for name in first}
    wrong = [f"{name} {gap:.2g}" for name, gap in first.items() if not gap <= limits[name]]
    wrong += [f"{name} {gap:.2g} after a step" for name, gap in after_a_step.items() if not gap <= after]
    return {"tolerance": {"experience": near, "losses": relative, "after_a_step": after}, "wrong": wrong}


class Peers:
    """The peers of one run, and what they took."""

    def __init__(self, config: BenchConfig, iteration: Iteration, folder: Path) -> None:
        from jaxrlhf.bench.peers import torch_device

        self.config, self.iteration, self.names = config, iteration, config.peers
        self.folders = iteration.save(folder)
        self.dtype = np.dtype(config.compute_dtype).name
        self.torch: Any = None
        self.trl: Any = None
        self.check: dict[str, Any] = {}
        self.device = torch_device(jax.default_backend())
        self.lost: dict[str, str] = {}
        self.skipped: dict[str, str] = {}

    def load(self) -> None:
        """Give torch its models, of which ours measures its peak of memory without."""
        if self.torch is None and set(self.names) & set(TORCH_PEERS):
            from jaxrlhf.bench.peers import TorchPeer

            self.torch = TorchPeer(*self.folders, self.config.ppo(), self.device, self.dtype, 1)

    def give_up_torch(self) -> None:
        """When even its models, or one update of all rows, do not fit beside ours."""
        self.lost = {name: "out of memory" for name in self.names if name in TORCH_PEERS}
        self.names = tuple(name for name in self.names if name not in self.lost)
        self.torch, self.check = None, {}

    @property
    def compares(self) -> bool:
        """Whether what a torch peer computes is still to be compared with ours."""
        return bool(set(self.names) & set(TORCH_PEERS)) and not self.check

    def use_batch(self, rows: int, whole: bool) -> None:
        """Warm up, and forget the times of another batch; whether `whole` iterations are wanted, all that TRL has."""
        if not whole:
            self.names = tuple(name for name in self.names if name != "trl")
        self.times: dict[str, list[dict[str, float]]] = {name: [] for name in self.names}
        self.skipped = dict(self.lost)
        if self.torch is not None:
            self.torch.micro_batches = self.config.parts(rows)
            self.prompts = self.torch.tensor(self.iteration.prompts).long()
            for name in TORCH_PEERS:
                if name in self.names:
                    with self._memory_permitting(name):
                        self.torch.generate(self.prompts, compiled=name == "hf-compile")
        if "trl" in self.names:
            from jaxrlhf.bench.trl_peer import TrlPeer

            parts, prompts = self.config.parts(rows), self.iteration.prompts
            self.trl = None  # the models of the batch before
            with self._memory_permitting("trl"):
                self.trl = TrlPeer(self.folders, self.config.ppo(), prompts, self.device, self.dtype, parts)
                self.trl.iteration()

    def _memory_permitting(self, *names: str) -> AbstractContextManager:
        from jaxrlhf.bench.peers import memory_permitting

        return memory_permitting(lambda: self.skipped.update(dict.fromkeys(names, "out of memory")))

    def compare(self, rollout: Any, experience: Any, metrics: dict[str, float]) -> None:
        """Score and train on our rollout, and keep the gaps. Before either side has taken a step."""
        tokens = self.torch.tensor(rollout.tokens).long()
        peer = self.torch.score(tokens)
        self.check["first"] = gaps(experience, metrics, peer, self.torch.train(peer), self.config.prompt)

    def compare_updated(self, rollout: Any, experience: Any) -> None:
        """Score our next rollout, to see that the optimizer steps were the same."""
        peer = self.torch.score(self.torch.tensor(rollout.tokens).long())
        self.check["after_a_step"] = gaps(experience, None, peer, None, self.config.prompt)
        self.check |= judged(self.check["first"], self.check["after_a_step"], self.dtype)

    def run(self, phases: tuple[str, ...]) -> None:
        """One round of the peers; what hf and hf-compile share is run once."""
        if "trl" in self.names and "trl" not in self.skipped:
            with self._memory_permitting("trl"):
                self.times["trl"].append({"iteration": self.trl.iteration()})
        if self.torch is None:
            return
        names = [name for name in self.names if name in TORCH_PEERS and name not in self.skipped]
        took: dict[str, dict[str, float]] = {name: {} for name in names}
        tokens = None
        for name in names:
            if "generate" in phases or tokens is None:
                with self._memory_permitting(name):
                    compiled = name == "hf-compile"
                    seconds, tokens = self.torch.timed(lambda c=compiled: self.torch.generate(self.prompts, c))
                    took[name]["generate"] = seconds
        if tokens is not None and {"score", "train"} & set(phases):
            with self._memory_permitting(*names):
                score, experience = self.torch.timed(lambda: self.torch.score(tokens))
                train, _ = self.torch.timed(lambda: self.torch.train(experience)) if "train" in phases else (0.0, None)
                for name in names:
                    took[name] |= {"score": score, "train": train}
        for name in names:
            if name not in self.skipped:
                self.times[name].append({phase: took[name][phase] for phase in phases})

    def results(self, name: str, ours: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
        """What is said of a peer by section: ratios to the seconds of `ours` there, and how both compare."""
        if name == "trl":
            skipped = {"skipped": self.skipped[name]} if name in self.skipped else None
            return {"ppo": skipped or ratios([run["iteration"] for run in self.times[name]], ours["ppo"])}
        if name in self.skipped:
            skipped = {"skipped": self.skipped[name]} | ({"check": self.check} if self.check else {})
            return {section: skipped for section in ours}
        phases = {phase: [run[phase] for run in self.times[name]] for phase in ours if phase in PHASES}
        found = {phase: ratios(seconds, ours[phase]) for phase, seconds in phases.items()}
        if "ppo" in ours:
            whole = [sum(parts) for parts in zip(*phases.values(), strict=True)]
            found["ppo"] = ratios(whole, ours["ppo"]) | {"phases": dict(found)}
        return {section: figures | {"check": self.check} for section, figures in found.items()}


def measure_iteration(
    config: BenchConfig,
    wanted: list[str],
    iteration: Iteration,
    peers: Peers | None,
    peaks: work.Peaks,
    say: Callable,
    rows: int,
) -> dict[str, dict[str, Any]]:
    """Records of the sections `wanted` among generate, score, train and ppo, at a batch of `rows`."""
    phases = tuple(name for name in PHASES if name in wanted or "ppo" in wanted)
    iteration.use_batch(rows)
    reset_peak_memory()
    first: dict[str, float] = {}
    first["generate"], rollout = timed(iteration.generate)
    # What a batch goes through once only makes inputs for what is measured, or compared with peers.
    compared = peers is not None and peers.compares
    if {"score", "train"} & set(phases) or compared:
        first["score"], experience = timed(lambda: iteration.score(rollout))
    if "train" in phases or compared:
        first["train"], metrics = timed(lambda: iteration.train(experience))
    memory = peak_memory()
    if peers is not None:
        from jaxrlhf.bench.peers import memory_permitting

        with memory_permitting(peers.give_up_torch):
            peers.load()
            if compared:
                peers.compare(rollout, experience, metrics)
                rollout = iteration.generate()
                experience = iteration.score(rollout)
                peers.compare_updated(rollout, experience)
        peers.use_batch(rows, whole="ppo" in wanted)
    times: dict[str, list[float]] = {phase: [] for phase in phases}
    for turn in range(config.repeats):
        if "generate" in phases:
            seconds, rollout = timed(iteration.generate)
            times["generate"].append(seconds)
        if "score" in phases:
            seconds, experience = timed(lambda: iteration.score(rollout))  # noqa: B023
            times["score"].append(seconds)
        if "train" in phases:
            times["train"].append(timed(lambda: iteration.train(experience))[0])  # noqa: B023
        if peers is not None:
            peers.run(phases)
        say(f"  batch {rows}, round {turn + 1} of {config.repeats}: " + _round(times, peers))
    counted = phase_work(config, iteration, rows)
    records = {phase: figures(counted[phase][0], times[phase], rows, counted[phase][1], peaks) for phase in phases}
    for phase in phases:
        records[phase]["compile_seconds"] = max(0.0, first[phase] - records[phase]["seconds"]["median"])
    if "generate" in phases:
        records["generate"]["decode_attention"] = decode_kernel(iteration.engine.state.actor)
    if "ppo" in wanted:
        times["ppo"] = [sum(parts) for parts in zip(*times.values(), strict=True)]
        whole = figures(sum((counted[p][0] for p in phases), work.Work(())), times["ppo"], rows, config.length, peaks)
        whole["compile_seconds"] = sum(records[phase]["compile_seconds"] for phase in phases)
        records["ppo"] = whole | {"phases": {phase: dict(records[phase]) for phase in phases}}
    for name in wanted:
        records[name]["peak_memory"] = memory
        records[name]["peers"] = {}
    for name in (*peers.lost, *peers.names) if peers else ():
        for section, found in peers.results(name, times).items():
            if section in wanted:
                records[section]["peers"][name] = found
    return {name: records[name] for name in wanted}


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
