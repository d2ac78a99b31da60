"""Connections between the processes of a run: they meet, share values, and learn of a loss or a failure.

Process 0 is the hub: it holds one TCP connection to every other process. In each process one thread serves all
connections, with asyncio. Every process sends a sign of life every few seconds. A closed connection or silence means
that a process is gone: every other process then prints which one, and exits with LOST, whatever its main thread waits
for. docs/distributed.md lists what JAX's own service lacks.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from jaxrlhf.distributed.activity import activity
from jaxrlhf.distributed.meeting import MAX_MESSAGE, REPORT_EVERY, Meeting, Peer, attend
from jaxrlhf.errors import InputError, PeerLost

LOST = PeerLost.status
"""Exit status of a process that stops because another one is gone."""
GRACE = 2.0  # seconds in which a process can report its own error when another one fails
LINGER = 3.0  # seconds that a failing hub waits until the others have read why
FLUSH = 0.5  # seconds in which a process that ends hands its last messages to the network
END_LIMIT = 600.0  # seconds between the first and the last process that reaches the end
THE_END = "the end of the program"


def delay_abort() -> None:
    """Delay an abort from C++ by six seconds, so that the lifeline can end the process first.

    JAX's client of the coordination service aborts the process as soon as the connection to process 0 closes, and no
    public call changes that. The lifeline notices the same event, but its thread may have to wait for the interpreter.
    The handler of SIGABRT is therefore C's `sleep`: it needs no interpreter, may run in a signal handler, and takes the
    signal's number, 6, as its seconds. Afterwards the abort goes on, as one with another cause should.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


class Lifeline:
    """Connections of one process, the thread that serves them, and `gather`. `join` makes it.

    Raises:
        InputError: on every process, with who did not come or whose number does not fit.
    """

    def __init__(self, address: str, number: int, process: int, timeout: float, silence: float) -> None:
        self.process, self.number, self.silence = process, number, silence
        self.hosts: list[str] = []
        self.peers: dict[int, Peer] = {}
        self._state = threading.Condition()  # of what the main thread waits for
        self._gathered: dict[int, list] = {}
        self._pending: dict[int, dict[int, tuple[str, object]]] = {}  # hub: values by call and process
        self._calls = 0
        self._ending = self._failing = self._stopping = False
        self._readers: list[asyncio.Task[None]] = []
        self._stops: list[asyncio.Task[None]] = []
        met: Future[asyncio.AbstractEventLoop] = Future()
        serve = self._serve(address, timeout, met)
        threading.Thread(target=asyncio.run, args=(serve,), name="lifeline", daemon=True).start()
        self._loop = met.result()

    def name(self, process: int) -> str:
        """Return the number and the host of a process, for messages."""
        return f"process {process} of {self.number} (host {self.hosts[process]})"

    def gather(self, what: str, value: object, limit: float = 7200.0) -> list:
        """Collect a value of every process on every process. All call it at the same place.

        Args:
            what: name of the wait, for messages.
            value: anything that JSON holds.
            limit: seconds to wait for the slowest process, as long as it is alive.

        Returns:
            The values in the order of the processes.

        Raises:
            InputError: `value` is larger than MAX_MESSAGE.
            PeerLost: a process is alive but does not come within `limit`.
        """
        call, self._calls = self._calls, self._calls + 1
        message = json.dumps({"call": call, "what": what, "value": value}).encode()
        if len(message) > MAX_MESSAGE:
            raise InputError(f"{what}: {len(message)} bytes; processes share at most {MAX_MESSAGE} bytes at a time")
        begin = reported = time.monotonic()
        if self.process == 0:
            self._loop.call_soon_threadsafe(self._arrived, 0, call, what, value)
        else:
            self.post(0, message)
        with self._state:
            while call not in self._gathered:
                self._state.wait(1.0)
                now = time.monotonic()
                missing = [i for i in range(self.number) if i not in self._pending.get(call, ())]
                if self.process == 0 and now - reported > REPORT_EVERY:
                    reported = now
                    print(f"waiting for {self._names(missing)}: {what}", file=sys.stderr, flush=True)
                if now - begin > limit:
                    late = self._names(missing) if self.process == 0 else "the other processes"
                    raise PeerLost(f"waited {limit:.0f} s for {late}: {what}; check what they do, and start again")
            return self._gathered.pop(call)

    def post(self, process: int, message: Mapping[str, object] | bytes) -> None:
        """Send to a process, from any thread."""
        self._loop.call_soon_threadsafe(self.peers[process].send, message)

    def end(self) -> None:
        """Wait until every process has reached its end. After that, a closed connection is no loss."""
        try:
            self.gather(THE_END, None, END_LIMIT)
        except PeerLost as error:
            self.stop(str(error))
        self._ending = True

    def fail(self, text: str) -> None:
        """Report to all others that this process ends with an error, so that they end too."""
        if not self._ending:
            self._failing = True
            message = {"reason": f"{self.name(self.process)} failed: {text}", "grace": GRACE}
            asyncio.run_coroutine_threadsafe(self._farewell(message), self._loop).result()

    def stop(self, reason: str, stacks: bool = False) -> None:
        """End all processes of the run, this one too. With `stacks`, the others print what they do."""
        if not self._ending:
            asyncio.run_coroutine_threadsafe(self._stop(self.process, reason, stacks=stacks), self._loop).result()

    def _names(self, processes: Sequence[int]) -> str:
        shown = ", ".join(self.name(i) for i in processes[:4])
        return shown + (f" and {len(processes) - 4} more" if len(processes) > 4 else "")

    async def _serve(self, address: str, timeout: float, met: Future[asyncio.AbstractEventLoop]) -> None:
        """Meet the others, and then serve their connections until the end."""
        try:
            if self.process == 0:
                self.hosts, self.peers = await Meeting(address, self.number, timeout).hold()
            else:
                self.hosts, self.peers = await attend(address, self.number, self.process, timeout)
        except BaseException as error:  # `join` raises it
            met.set_exception(error)
            return
        self._readers = [asyncio.create_task(self._read(process)) for process in self.peers]
        met.set_result(asyncio.get_running_loop())
        await self._beat()
        await self._flush()

    async def _beat(self) -> None:
        """Send signs of life, and watch for silence."""
        pause = min(2.0, self.silence / 5)
        last = time.monotonic()
        while not self._ending:
            now = time.monotonic()
            for process, peer in self.peers.items():
                peer.send({})
                if now - last > pause + 1:  # this process was stopped itself, and has not read what came meanwhile
                    peer.heard = now
                if now - peer.heard > self.silence:
                    await self._gone(process, f"since {now - peer.heard:.0f} s")
            last = now
            await asyncio.sleep(pause)

    async def _read(self, process: int) -> None:
        """Handle the messages of one process until its connection ends."""
        peer, reason = self.peers[process], "(its connection closed)"
        try:
            while True:
                self._handle(process, await peer.receive())
        except EOFError:
            pass
        except (ValueError, LookupError, TypeError) as error:
            reason = f"({error})" if isinstance(error, ValueError) else "(it sent a message without its fields)"
        peer.writer.close()
        if not self._ending:
            await self._gone(process, reason)

    def _handle(self, process: int, message: dict) -> None:
        if "call" in message:
            self._arrived(process, message["call"], message["what"], message["value"])
        elif "gathered" in message:
            with self._state:
                self._ending |= message["last"]
                self._gathered[message["gathered"]] = message["values"]
                self._state.notify_all()
        elif "reason" in message:
            self._stop_soon(**{"process": process} | message)

    def _arrived(self, process: int, call: int, what: str, value: object) -> None:
        """Keep a value on the hub; the last one of a call sends all to everyone."""
        with self._state:
            arrived = self._pending.setdefault(call, {})
            arrived[process] = (what, value)
            if len(arrived) < self.number:
                return
            del self._pending[call]
            whats = {what for what, _ in arrived.values()}
            if len(whats) > 1:
                reason = f"the processes are at different places of the program: {sorted(whats)}"
                self._stop_soon(0, reason)
                return
            last = whats == {THE_END}
            self._ending |= last
            values = [arrived[i][1] for i in range(self.number)]
            message = json.dumps({"gathered": call, "values": values, "last": last}).encode()
            for peer in self.peers.values():
                peer.send(message)
            self._gathered[call] = values
            self._state.notify_all()

    async def _gone(self, process: int, how: str) -> None:
        role = ", the coordinator," if process == 0 else ""
        await self._stop(process, f"{self.name(process)}{role} is gone {how}")

    def _stop_soon(self, *args: Any, **options: Any) -> None:
        self._stops.append(asyncio.create_task(self._stop(*args, **options)))

    async def _stop(self, process: int, reason: str, grace: float = 0.0, stacks: bool = False) -> None:
        """Tell the others why, print it, and exit without waiting for any thread.

        Args:
            process: the cause. The hub tells all but this one; the cause itself tells the hub.
            reason: what happened.
            grace: seconds in which this process may still report an error of its own.
            stacks: print what this process does, too.
        """
        if self._stopping or self._failing or self._ending:
            return
        self._stopping = True
        for other, peer in self.peers.items() if self.process in (0, process) else ():
            if other != process:
                peer.send({"process": process, "reason": reason, "grace": grace, "stacks": stacks})
        await asyncio.sleep(grace)
        if self._failing:  # this process has meanwhile reported its own error
            return
        await self._flush()
        # The others must read the reason before the connections break, JAX's among them.
        leave(reason, stacks and process != self.process, wait=0.2 if self.process == 0 else 0.0)

    async def _farewell(self, message: dict[str, object]) -> None:
        for peer in self.peers.values():
            peer.send(message)
        await self._flush()
        if self.process == 0 and self._readers:  # they end when the others have read it and ended
            await asyncio.wait(self._readers, timeout=LINGER)

    async def _flush(self) -> None:
        """Wait until the network has taken what was sent."""
        deadline = time.monotonic() + FLUSH
        transports = [peer.writer.transport for peer in self.peers.values()]
        while any(t.get_write_buffer_size() for t in transports) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)


def leave(reason: str, stacks: bool = False, wait: float = 0.0) -> None:
    """Print why this process stops, and exit with LOST, whatever its other threads do.

    Args:
        reason: what happened.
        stacks: print what this process does first.
        wait: seconds between the message and the end.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C++ prints about the same event must not hide the reason
    if stacks:
        activity.print(stderr)
    os.write(
        stderr, f"\njaxrlhf: {reason}; this run stops. Continue with --resume from the newest checkpoint\n".encode()
    )
    time.sleep(wait)
    os._exit(LOST)


def join(address: str, number: int, process: int, timeout: float, silence: float) -> Lifeline:
    """Meet the other processes of the run.

    Args:
        address: HOST:PORT on which process 0 listens.
        number: number of processes.
        process: number of this process.
        timeout: seconds to wait for the others.
        silence: seconds without a sign of life after which a process counts as gone.

    Raises:
        InputError: on every process, with who did not come or whose number does not fit.
    """
    return Lifeline(address, number, process, timeout, silence)
