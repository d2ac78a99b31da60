"""The connections that hold the processes of a run together: who takes part, what they agree on, and who is gone.

Process 0 (the hub) holds one TCP connection to every other process, opened on the coordinator's port before JAX's own
service takes that port over. Over it go, as lines of JSON: the greeting, a sign of life every few seconds, values that
are gathered from all processes, and the news that one has failed. A closed connection, or silence, means that a process
is gone: every other one then says so and exits with LOST, whatever its main thread is waiting for. JAX alone would hang
in a collective or abort from C++.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxrlhf.errors import InputError

LOST = 75
"""Exit status of a process that stops because another one is gone (EX_TEMPFAIL: try again)."""
GRACE = 2.0  # seconds that a process has to tell of its own error when another one fails
LINGER = 3.0  # seconds that a failing hub waits for the others to read why
END_LIMIT = 600.0  # seconds between the first and the last process that reaches its end
SAY_EVERY = 10.0  # seconds between lines on what a process waits for
RETRY = 0.2  # seconds between attempts to connect
THE_END = "the end of the program"

Facts = dict[str, Any]


class _Connection:
    """One line of JSON after the other, both ways; `heard` is when the last one came in (monotonic seconds)."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.reader, self.lock, self.heard = sock, sock.makefile("rb"), threading.Lock(), time.monotonic()

    def send(self, message: dict) -> None:
        """Send, or do nothing when the other side is gone: its reader thread tells of that."""
        with self.lock, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict | None:
        """The next message; None when the other side closed the connection or does not speak as we do."""
        try:
            message = json.loads(self.reader.readline())
        except (OSError, ValueError):
            return None
        self.heard = time.monotonic()
        return message if isinstance(message, dict) else None

    def is_closed(self) -> bool:
        """Whether the other side has closed the connection (before anything else was read from it)."""
        try:
            return self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close_sending(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` as a pair. Raises InputError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"coordinator_address {address!r}: must be HOST:PORT, as in 10.0.0.1:8476")
    return host.strip("[]"), int(port)


def _listen(address: str) -> socket.socket:
    _, port = split_address(address)
    v6 = socket.has_dualstack_ipv6()
    family, options = (socket.AF_INET6, {"dualstack_ipv6": True}) if v6 else (socket.AF_INET, {})
    try:  # SO_REUSEADDR is set by create_server: JAX's service can take the port over while connections live on
        return socket.create_server(("", port), family=family, backlog=1024, **options)
    except OSError as error:
        raise InputError(
            f"coordinator_address {address}: process 0 cannot listen on port {port} ({error.strerror}); choose a port "
            "that is free on this machine"
        ) from error


class Lifeline:
    """Of one process: its connections, the watchdog behind them, and `gather`. Made by `join`."""

    def __init__(self, process: int, number: int, hosts: list[str], peers: dict[int, _Connection], silence: float):
        self.process, self.number, self.hosts, self.peers, self.silence = process, number, hosts, peers, silence
        self._state = threading.Condition()
        self._gathered: dict[int, list[Any]] = {}
        self._pending: dict[int, dict[int, tuple[str, Any]]] = {}  # hub: what arrived, by call and process
        self._calls = 0
        self._told = False  # that a process has failed: all end then, and none is missed
        self._ending = self._failing = self._stopping = False
        self._readers = [threading.Thread(target=self._listen_to, args=(peer,), daemon=True) for peer in peers]
        for thread in (*self._readers, threading.Thread(target=self._beat, daemon=True)):
            thread.start()

    def name(self, process: int) -> str:
        return f"process {process} of {self.number} (host {self.hosts[process]})"

    def gather(self, what: str, value: Any, limit: float = 7200.0) -> list[Any]:
        """`value` (JSON) of every process, in their order, on every process; all must call it at the same place.

        Waits for the slowest for at most `limit` seconds, as long as it is alive. `what` is said to who waits long.
        """
        call, self._calls = self._calls, self._calls + 1
        begin = said = time.monotonic()
        if self.process == 0:
            self._arrived(0, call, what, value)
        else:
            self.peers[0].send({"call": call, "what": what, "value": value})
        with self._state:
            while call not in self._gathered:
                self._state.wait(1.0)
                now = time.monotonic()
                missing = [i for i in range(self.number) if i not in self._pending.get(call, ())]
                if self.process == 0 and now - said > SAY_EVERY:
                    said = now
                    print(f"waiting for {self._names(missing)}: {what}", file=sys.stderr, flush=True)
                if now - begin > limit:
                    late = self._names(missing) if self.process == 0 else "the other processes"
                    raise InputError(
                        f"waited {limit:.0f} s for {late}: {what}; see what they are doing, and start again"
                    )
            return self._gathered.pop(call)

    def end(self) -> None:
        """Wait until every process has reached its end; from then on none is missed."""
        try:
            self.gather(THE_END, None, END_LIMIT)
        except InputError as error:
            self._stop(str(error), self.process)
        self._ending = True

    def fail(self, text: str) -> None:
        """Tell all others that this process ends with an error, so that they end too."""
        self._failing = True
        for peer in self.peers.values():
            peer.send({"failed": self.process, "text": text})
            peer.close_sending()
        deadline = time.monotonic() + LINGER
        for reader in self._readers if self.process == 0 else ():  # they end when the others have read it and ended
            reader.join(max(0.0, deadline - time.monotonic()))

    def _names(self, processes: list[int]) -> str:
        shown = ", ".join(self.name(i) for i in processes[:4])
        return shown + (f" and {len(processes) - 4} more" if len(processes) > 4 else "")

    def _beat(self) -> None:
        while not self._ending:
            now = time.monotonic()
            for process, peer in self.peers.items():
                peer.send({})
                if now - peer.heard > self.silence:
                    self._gone(process, now - peer.heard)
            time.sleep(min(2.0, self.silence / 5))

    def _listen_to(self, process: int) -> None:
        peer = self.peers[process]
        while (message := peer.receive()) is not None:
            if "call" in message:
                self._arrived(process, message["call"], message["what"], message["value"])
            elif "gathered" in message:
                with self._state:
                    self._ending |= message["last"]
                    self._gathered[message["gathered"]] = message["values"]
                    self._state.notify_all()
            elif "failed" in message:
                self._failed(message["failed"], message["text"])
            elif "gone" in message:
                self._stop(message["gone"], message["process"])
        if not self._ending:
            self._gone(process, 0.0)

    def _arrived(self, process: int, call: int, what: str, value: Any) -> None:
        with self._state:
            arrived = self._pending.setdefault(call, {})
            arrived[process] = (what, value)
            if len(arrived) < self.number:
                return
            del self._pending[call]
            whats = {what for what, _ in arrived.values()}
            if len(whats) > 1:
                self._stop(f"the processes are at different places of the program: {sorted(whats)}", 0)
            last = whats == {THE_END}
            self._ending |= last
            values = [arrived[i][1] for i in range(self.number)]
            for peer in self.peers.values():
                peer.send({"gathered": call, "values": values, "last": last})
            self._gathered[call] = values
            self._state.notify_all()

    def _tell(self, message: dict, process: int) -> None:
        """The hub passes on what it knows of `process` to all others."""
        for other, peer in self.peers.items() if self.process == 0 else ():
            if other != process:
                peer.send(message)

    def _gone(self, process: int, silent: float) -> None:
        if self._told:
            return
        role = ", the coordinator," if process == 0 else ""
        since = f"since {silent:.0f} s" if silent else "(its connection closed)"
        self._stop(f"{self.name(process)}{role} is gone {since}", process)

    def _failed(self, process: int, text: str) -> None:
        self._told = True
        self._tell({"failed": process, "text": text}, process)
        time.sleep(GRACE)
        self._stop(f"{self.name(process)} failed: {text}", process)

    def _stop(self, reason: str, process: int) -> None:
        """Say why, tell the others (the hub), and leave without waiting for any thread."""
        with self._state:
            if self._stopping or self._failing or self._ending:
                return
            self._stopping = True
        self._tell({"gone": reason, "process": process}, process)
        text = f"{reason}; this run stops. Continue with --resume from the newest checkpoint"
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os.write(2, f"\njaxrlhf: {text}\n".encode())
        time.sleep(0.2 if self.process == 0 else 0.0)  # the others read it before the connections break
        os._exit(LOST)


def join(
    address: str,
    number: int,
    process: int,
    facts: Facts,
    compare: Callable[[list[Facts]], str | None],
    timeout: float,
    silence: float,
) -> Lifeline:
    """Meet the other processes at `address` within `timeout` seconds; returns the lifeline of this one.

    `facts` are this process's (JSON); `compare` gets those of all, in order, and returns why they cannot work together,
    or None. `silence`: seconds without a sign of life after which a process counts as gone. Raises InputError, on every
    process, naming who did not come or what differs.
    """
    greeting = {"process": process, "number": number, "host": socket.gethostname(), "facts": facts}
    meet = _meet_as_hub if process == 0 else _meet
    hosts, peers = meet(address, greeting, compare, timeout)
    return Lifeline(process, number, hosts, peers, silence)


def _meet_as_hub(
    address: str, own: dict, compare: Callable[[list[Facts]], str | None], timeout: float
) -> tuple[list[str], dict[int, _Connection]]:
    deadline, number = time.monotonic() + timeout, own["number"]
    greetings: dict[int, dict] = {0: own}
    peers: dict[int, _Connection] = {}
    problem, said = None, time.monotonic()
    with _listen(address) as server:
        while len(greetings) < number and problem is None:
            left = deadline - time.monotonic()
            missing = [str(i) for i in range(number) if i not in greetings]
            if left <= 0:
                problem = (
                    f"process {', '.join(missing)} of {number} did not come to the coordinator {address} within "
                    f"{timeout:.0f} s; check that every process was started with its own process_id, that they reach "
                    "this address and port, or raise --initialization_timeout"
                )
                break
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                print(f"waiting for process {', '.join(missing)} of {number} at {address}", file=sys.stderr, flush=True)
            server.settimeout(min(left, SAY_EVERY))
            try:
                sock, _ = server.accept()
            except TimeoutError:
                continue
            sock.settimeout(10)  # whatever else found this port says nothing that we understand
            peer = _Connection(sock)
            greeting = peer.receive() or {}
            if not isinstance(greeting.get("process"), int):
                sock.close()
                continue
            sock.settimeout(None)
            who = greeting["process"]
            if who in peers and peers[who].is_closed():  # it was started anew meanwhile
                del peers[who], greetings[who]
            if greeting["number"] != number:
                problem = f"num_processes is {number} on process 0 and {greeting['number']} on process {who}"
            elif who in greetings or not 0 < who < number:
                problem = f"process_id {who} was given to two processes; each needs its own, from 0 to {number - 1}"
                peer.send({"refused": problem})
            greetings.setdefault(who, greeting)
            peers.setdefault(who, peer)
    ordered = [greetings[i] for i in range(number) if i in greetings]
    problem = problem or compare([greeting["facts"] for greeting in ordered])
    hosts = [greeting["host"] for greeting in ordered]
    for peer in peers.values():
        peer.send({"refused": problem} if problem else {"hosts": hosts})
    if problem:
        raise InputError(problem)
    return hosts, peers


def _meet(address: str, own: dict, _compare: Any, timeout: float) -> tuple[list[str], dict[int, _Connection]]:
    deadline, reason = time.monotonic() + timeout, "no answer"
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise InputError(
                f"process {own['process']} of {own['number']} cannot reach the coordinator at {address} (waited "
                f"{timeout:.0f} s; {reason}). Check that process 0 runs, that the address is its host's and the port "
                "is open between the machines, or raise --initialization_timeout"
            )
        try:
            sock = socket.create_connection(split_address(address), timeout=max(left, 0.1))
            peer = _Connection(sock)
            peer.send(own)
            answer = peer.receive()  # comes when all are there
        except OSError as error:
            answer, reason = None, error.strerror or str(error) or type(error).__name__
        if answer is not None:
            break
        time.sleep(RETRY)
    if "refused" in answer:
        raise InputError(answer["refused"])
    sock.settimeout(None)
    return answer["hosts"], {0: peer}


class Relay:
    """A door to `address` on this host, for JAX's client of the coordination service.

    When the service's host goes away, that client aborts the process from C++ before Python can say a word. Behind
    the relay it sees a connection that merely falls silent, and the lifeline does the talking.
    """

    def __init__(self, address: str, timeout: float) -> None:
        self.target, self.timeout = split_address(address), timeout
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True, name="relay").start()

    def _accept(self) -> None:
        while True:
            near, _ = self.server.accept()
            threading.Thread(target=self._connect, args=(near,), daemon=True, name="relay").start()

    def _connect(self, near: socket.socket) -> None:
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                far = socket.create_connection(self.target, timeout=self.timeout)
                break
            except OSError:  # the service starts after the greeting
                if time.monotonic() > deadline:
                    near.close()
                    return
                time.sleep(RETRY)
        far.settimeout(None)
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._pump, args=(far, near, False), daemon=True, name="relay").start()
        self._pump(near, far, True)

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, ends: bool) -> None:
        """Pass bytes on until the source ends; only the near side's end is passed on."""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        if ends:
            for sock in (source, target):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
