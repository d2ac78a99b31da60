"""Connections between the processes of a run: they meet, share values, and learn of a loss or a failure.

Process 0 is the hub: it holds one TCP connection to every other process. The hub listens on the coordinator's port
until all processes have come, and closes the port then. A message is JSON in a frame of `multiprocessing.connection`,
which also checks the token (HMAC, both ways) and the size. Every process sends a sign of life every few seconds. A
closed connection or silence means that a process is gone: every other process then prints which one, and exits with
LOST, whatever its main thread waits for. docs/distributed.md lists what JAX's own service lacks.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import TypedDict

from jaxrlhf.errors import InputError, PeerLost

LOST = PeerLost.status
"""Exit status of a process that stops because another one is gone."""
TOKEN = "JAXRLHF_TOKEN"
"""Environment variable with the secret that the processes of a run share."""
MAX_MESSAGE = 64 << 20  # bytes of one message
MAX_GREETING = 1 << 20  # bytes of a greeting
GREETING_TIMEOUT = 10  # seconds in which a new connection must say the next thing
GRACE = 2.0  # seconds in which a process can report its own error when another one fails
LINGER = 3.0  # seconds that a failing hub waits until the others have read why
END_LIMIT = 600.0  # seconds between the first and the last process that reaches the end
REPORT_EVERY = 10.0  # seconds between lines that name who is missing
POLL = 0.1  # seconds between two looks for a new connection
RETRY = 0.2  # seconds between attempts to connect
THE_END = "the end of the program"

Facts = Mapping[str, object]
Compare = Callable[[Sequence[Facts]], str | None]


class Greeting(TypedDict):
    """Introduction of a process: its number, the number of processes, its host name, and the facts to compare."""

    process: int
    number: int
    host: str
    facts: Facts


class ProtocolError(Exception):
    """The other side sends what no process of ours sends."""


class WrongToken(ProtocolError):
    """The other side has another token."""


def _token() -> bytes:
    """Secret of the run. Without one, the token only tells processes of jaxrlhf from other programs."""
    return os.environ.get(TOKEN, "").encode() or b"jaxrlhf"


class _Peer:
    """A connection to one process. `heard` is the time of its last message (monotonic seconds)."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self.lock, self.heard = Connection(sock.detach()), threading.Lock(), time.monotonic()

    def limit_waits(self, seconds: int) -> None:
        """Let a read or a write fail after `seconds`; 0: never."""
        limit = struct.pack("ll", seconds, 0)
        with socket.socket(fileno=os.dup(self.connection.fileno())) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def authenticate(self, as_hub: bool) -> None:
        """Check that both sides have the token. Raises ProtocolError."""
        steps = (deliver_challenge, answer_challenge) if as_hub else (answer_challenge, deliver_challenge)
        try:
            for step in steps:
                step(self.connection, _token())
        except AuthenticationError as error:
            raise WrongToken(f"has another ${TOKEN}, or is no process of jaxrlhf") from error
        except (EOFError, OSError, AssertionError) as error:  # closed, silent or too long, not a challenge
            raise ProtocolError("does not speak the protocol of jaxrlhf") from error

    def send(self, message: Mapping[str, object] | bytes) -> None:
        """Send, or do nothing when the other side is gone: its reader thread notices that."""
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        with self.lock, contextlib.suppress(OSError):
            self.connection.send_bytes(data)

    def receive(self, limit: int = MAX_MESSAGE) -> dict:
        """Return the next message of at most `limit` bytes. Raises EOFError at the end, or ProtocolError."""
        try:
            message = json.loads(self.connection.recv_bytes(limit))
        except ConnectionError as error:
            raise EOFError from error
        except BlockingIOError as error:
            raise ProtocolError("is silent") from error
        except OSError as error:
            raise ProtocolError(f"sent a message of more than {limit} bytes, or a part of one") from error
        except ValueError as error:
            raise ProtocolError("sent a message that is not JSON") from error
        if not isinstance(message, dict):
            raise ProtocolError("sent a message that is no JSON object")
        self.heard = time.monotonic()
        return message

    def close(self) -> None:
        self.connection.close()


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port` into host and port. Raises InputError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"coordinator_address {address!r}: must be HOST:PORT, as in 10.0.0.1:8476")
    return host.strip("[]"), int(port)


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
    """Connections of one process, the threads that watch them, and `gather`. `join` makes it."""

    def __init__(self, process: int, hosts: Sequence[str], peers: dict[int, _Peer], silence: float) -> None:
        self.process, self.number, self.hosts, self.peers, self.silence = process, len(hosts), hosts, peers, silence
        self._state = threading.Condition()
        self._gathered: dict[int, list] = {}
        self._pending: dict[int, dict[int, tuple[str, object]]] = {}  # hub: values by call and process
        self._calls = 0
        self._failure_known = False  # all processes end after a failure, so none counts as lost
        self._ending = self._failing = self._stopping = False
        self._readers = [threading.Thread(target=self._read, args=(process,), daemon=True) for process in peers]
        for thread in (*self._readers, threading.Thread(target=self._beat, daemon=True)):
            thread.start()

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
            self._arrived(0, call, what, value)
        else:
            self.peers[0].send(message)
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

    def end(self) -> None:
        """Wait until every process has reached its end. After that, a closed connection is no loss."""
        try:
            self.gather(THE_END, None, END_LIMIT)
        except PeerLost as error:
            self._stop(str(error), self.process)
        self._ending = True

    def fail(self, text: str) -> None:
        """Report to all others that this process ends with an error, so that they end too."""
        self._failing = True
        for peer in self.peers.values():
            peer.send({"failed": self.process, "text": text})
        deadline = time.monotonic() + LINGER
        for reader in self._readers if self.process == 0 else ():  # they end when the others have read it and ended
            reader.join(max(0.0, deadline - time.monotonic()))

    def _names(self, processes: Sequence[int]) -> str:
        shown = ", ".join(self.name(i) for i in processes[:4])
        return shown + (f" and {len(processes) - 4} more" if len(processes) > 4 else "")

    def _beat(self) -> None:
        """Send signs of life, and watch for silence."""
        while not self._ending:
            now = time.monotonic()
            for process, peer in self.peers.items():
                peer.send({})
                if now - peer.heard > self.silence:
                    self._gone(process, f"since {now - peer.heard:.0f} s")
            time.sleep(min(2.0, self.silence / 5))

    def _read(self, process: int) -> None:
        """Handle the messages of one process until its connection ends."""
        peer, reason = self.peers[process], "(its connection closed)"
        try:
            while True:
                self._handle(process, peer.receive())
        except EOFError:
            pass
        except ProtocolError as error:
            reason = f"(it {error})"
            peer.close()
        if not self._ending:
            self._gone(process, reason)

    def _handle(self, process: int, message: dict) -> None:
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
                self._stop(f"the processes are at different places of the program: {sorted(whats)}", 0)
            last = whats == {THE_END}
            self._ending |= last
            values = [arrived[i][1] for i in range(self.number)]
            message = json.dumps({"gathered": call, "values": values, "last": last}).encode()
            if len(message) > MAX_MESSAGE:
                self._stop(f"{what}: the values of all processes have {len(message)} bytes, over {MAX_MESSAGE}", 0)
            for peer in self.peers.values():
                peer.send(message)
            self._gathered[call] = values
            self._state.notify_all()

    def _tell(self, message: Mapping[str, object], process: int) -> None:
        """Pass on to all others what the hub knows of `process`."""
        for other, peer in self.peers.items() if self.process == 0 else ():
            if other != process:
                peer.send(message)

    def _gone(self, process: int, reason: str) -> None:
        if not self._failure_known:
            role = ", the coordinator," if process == 0 else ""
            self._stop(f"{self.name(process)}{role} is gone {reason}", process)

    def _failed(self, process: int, text: str) -> None:
        self._failure_known = True
        self._tell({"failed": process, "text": text}, process)
        time.sleep(GRACE)
        self._stop(f"{self.name(process)} failed: {text}", process)

    def _stop(self, reason: str, process: int) -> None:
        """Print why, tell the others (the hub), and exit without waiting for any thread."""
        with self._state:
            if self._stopping or self._failing or self._ending:
                return
            self._stopping = True
        self._tell({"gone": reason, "process": process}, process)
        text = f"{reason}; this run stops. Continue with --resume from the newest checkpoint"
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C++ prints about the same event must not hide the reason
        os.write(stderr, f"\njaxrlhf: {text}\n".encode())
        time.sleep(0.2 if self.process == 0 else 0.0)  # the others read it before the connections break
        os._exit(LOST)


def join(
    address: str, number: int, process: int, facts: Facts, compare: Compare, timeout: float, silence: float
) -> Lifeline:
    """Meet the other processes of the run.

    Args:
        address: HOST:PORT on which process 0 listens.
        number: number of processes.
        process: number of this process.
        facts: JSON values of this process to compare.
        compare: takes the facts of all processes in order; returns why they cannot work together, or None.
        timeout: seconds to wait for the others.
        silence: seconds without a sign of life after which a process counts as gone.

    Raises:
        InputError: on every process, with who did not come or what differs.
    """
    own = Greeting(process=process, number=number, host=socket.gethostname(), facts=facts)
    if process == 0:
        hosts, peers = _Meeting(address, own, timeout).hold(compare)
    else:
        hosts, peers = _attend(address, own, timeout)
    return Lifeline(process, hosts, peers, silence)


class _Meeting:
    """The hub's side of `join`. A thread per connection, so that a stranger keeps no process waiting."""

    def __init__(self, address: str, own: Greeting, timeout: float) -> None:
        self.address, self.number, self.timeout = address, own["number"], timeout
        self.lock = threading.Lock()
        self.greetings: dict[int, Greeting] = {0: own}
        self.peers: dict[int, _Peer] = {}
        self.surplus: list[_Peer] = []  # their number is taken or does not exist
        self.strangers: list[str] = []
        self.problem: str | None = None
        self.closed = False

    def hold(self, compare: Compare) -> tuple[list[str], dict[int, _Peer]]:
        """Wait for all processes; returns their hosts and connections. Raises InputError."""
        self._accept()
        with self.lock:
            self.closed = True
        ordered = [self.greetings[i] for i in range(self.number) if i in self.greetings]
        problem = self.problem or compare([greeting["facts"] for greeting in ordered])
        hosts = [greeting["host"] for greeting in ordered]
        for peer in (*self.peers.values(), *self.surplus):
            peer.send({"refused": problem} if problem else {"hosts": hosts})
        if problem:
            raise InputError(problem)
        return hosts, self.peers

    def _accept(self) -> None:
        """Take connections until all processes have come, or there is a problem."""
        begin = reported = time.monotonic()
        with self._listen() as server:
            server.settimeout(POLL)
            while self.problem is None and (missing := self._missing()):
                now = time.monotonic()
                if now - begin > self.timeout:
                    self.problem = (
                        f"{missing} did not come to the coordinator {self.address} within {self.timeout:.0f} s; check "
                        "that every process was started with its own process_id, that they reach this address and "
                        f"port, or raise --initialization_timeout{self._refusals()}"
                    )
                if now - reported > REPORT_EVERY:
                    reported = now
                    print(f"waiting for {missing} at {self.address}{self._refusals()}", file=sys.stderr, flush=True)
                with contextlib.suppress(TimeoutError):
                    sock, (host, *_) = server.accept()
                    threading.Thread(target=self._admit, args=(sock, host), daemon=True).start()

    def _listen(self) -> socket.socket:
        _, port = split_address(self.address)
        v6 = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if v6 else socket.AF_INET
        try:
            return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=v6)
        except OSError as error:
            raise InputError(
                f"coordinator_address {self.address}: process 0 cannot listen on port {port} ({error.strerror}); "
                "choose a port that is free on this machine"
            ) from error

    def _missing(self) -> str:
        with self.lock:
            missing = [str(i) for i in range(self.number) if i not in self.greetings]
        return f"process {', '.join(missing)} of {self.number}" if missing else ""

    def _refusals(self) -> str:
        count = len(self.strangers)
        return f" ({count} connections refused, the last one from {self.strangers[-1]})" if count else ""

    def _admit(self, sock: socket.socket, host: str) -> None:
        """Check the token and the greeting of one connection."""
        peer = _Peer(sock)
        peer.limit_waits(GREETING_TIMEOUT)
        try:
            peer.authenticate(as_hub=True)
            greeting = peer.receive(MAX_GREETING)
        except (EOFError, ProtocolError) as error:
            peer.close()
            with self.lock:
                self.strangers.append(f"{host}, which {error or 'closed it'}")
            return
        peer.limit_waits(0)
        with self.lock:
            self._enter(Greeting(**greeting), peer)

    def _enter(self, greeting: Greeting, peer: _Peer) -> None:
        who = greeting["process"]
        if who in self.peers and self.peers[who].connection.poll(0):  # closed: the process was started again
            self.peers.pop(who).close()
            del self.greetings[who]
        if self.closed:
            peer.close()
        elif greeting["number"] != self.number:
            self.problem = f"num_processes is {self.number} on process 0 and {greeting['number']} on process {who}"
            self.surplus.append(peer)
        elif who in self.greetings or not 0 < who < self.number:
            self.problem = (
                f"process_id {who} was given to two processes; each needs its own, from 0 to {self.number - 1}"
            )
            self.surplus.append(peer)
        else:
            self.greetings[who], self.peers[who] = greeting, peer


def _attend(address: str, own: Greeting, timeout: float) -> tuple[list[str], dict[int, _Peer]]:
    """Greet the hub; returns the hosts of all processes and the hub's connection. Raises InputError."""
    deadline, reason = time.monotonic() + timeout, "no reply"
    while (left := deadline - time.monotonic()) > 0:
        try:
            peer = _Peer(socket.create_connection(split_address(address), timeout=left))
            peer.limit_waits(GREETING_TIMEOUT)
            peer.authenticate(as_hub=False)
            peer.limit_waits(0)
            peer.send(own)
            if not peer.connection.poll(max(0.0, deadline - time.monotonic())):
                continue
            reply = peer.receive()  # the hub sends it when all are there
        except WrongToken as error:
            raise InputError(f"the process that listens at {address} {error}; all need the same ${TOKEN}") from error
        except (OSError, EOFError, ProtocolError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
            time.sleep(RETRY)
            continue
        if "refused" in reply:
            raise InputError(reply["refused"])
        return reply["hosts"], {0: peer}
    raise InputError(
        f"process {own['process']} of {own['number']} cannot reach the coordinator at {address} (waited "
        f"{timeout:.0f} s; {reason}). Check that process 0 runs, that the address is its host's and the port is open "
        "between the machines, or raise --initialization_timeout"
    )
