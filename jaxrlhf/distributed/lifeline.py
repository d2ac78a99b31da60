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
from collections.abc import Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from jaxrlhf.errors import InputError, PeerLost

LOST = PeerLost.status
"""Exit status of a process that stops because another one is gone."""
TOKEN = "JAXRLHF_TOKEN"
"""Environment variable with the secret that the processes of a run share."""
MAX_MESSAGE = 64 << 20  # bytes of one message
MAX_GREETING = 1 << 12  # bytes of a greeting
GREETING_TIMEOUT = 10  # seconds in which a new connection must say the next thing
GRACE = 2.0  # seconds in which a process can report its own error when another one fails
LINGER = 3.0  # seconds that a failing hub waits until the others have read why
END_LIMIT = 600.0  # seconds between the first and the last process that reaches the end
REPORT_EVERY = 10.0  # seconds between lines that name who is missing
POLL = 0.1  # seconds between two looks for a new connection
RETRY = 0.2  # seconds between attempts to connect
THE_END = "the end of the program"

NOT_OURS = (AuthenticationError, AssertionError, EOFError, OSError, ValueError, TypeError)
"""Errors of a connection to a stranger: another token, no challenge, closed, silent or too long, no greeting."""


def _token() -> bytes:
    """Secret of the run. Without one, the token only tells processes of jaxrlhf from other programs."""
    return os.environ.get(TOKEN, "").encode() or b"jaxrlhf"


class _Peer:
    """A connection to one process. `heard` is the time of its last message (monotonic seconds)."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self.lock, self.heard = Connection(sock.detach()), threading.Lock(), time.monotonic()

    def limit_waits(self, option: int, seconds: float) -> None:
        """Let a read (SO_RCVTIMEO) or a write (SO_SNDTIMEO) fail after `seconds`; 0: never."""
        with socket.socket(fileno=os.dup(self.connection.fileno())) as sock:
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), 0))

    def send(self, message: Mapping[str, object] | bytes) -> None:
        """Send, or do nothing when the other side is gone: its reader thread notices that."""
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        with self.lock, contextlib.suppress(OSError):
            self.connection.send_bytes(data)

    def receive(self, limit: int = MAX_MESSAGE) -> dict:
        """Return the next message. Raises EOFError at the end, or ValueError for what is no message of ours."""
        try:
            message = json.loads(self.connection.recv_bytes(limit))
            if not isinstance(message, dict):
                raise ValueError(message)
        except ConnectionError as error:
            raise EOFError from error
        except (OSError, ValueError) as error:
            raise ValueError(f"it sent what is not a JSON message of at most {limit} bytes") from error
        self.heard = time.monotonic()
        return message


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
        self._ending = self._failing = self._stopping = False
        self._readers = [threading.Thread(target=self._read, args=(process,), daemon=True) for process in peers]
        for peer in peers.values():
            peer.limit_waits(socket.SO_SNDTIMEO, silence)  # a stopped process must not block the watch
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
            self._stop(self.process, str(error))
        self._ending = True

    def fail(self, text: str) -> None:
        """Report to all others that this process ends with an error, so that they end too."""
        self._failing = True
        for peer in self.peers.values():
            peer.send({"process": self.process, "reason": f"{self.name(self.process)} failed: {text}", "grace": GRACE})
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
        except (ValueError, LookupError, TypeError) as error:
            reason = f"({error})" if isinstance(error, ValueError) else "(it sent a message without its fields)"
            peer.connection.close()
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
        elif "reason" in message:
            self._stop(**message)

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
                self._stop(0, f"the processes are at different places of the program: {sorted(whats)}")
            last = whats == {THE_END}
            self._ending |= last
            values = [arrived[i][1] for i in range(self.number)]
            message = json.dumps({"gathered": call, "values": values, "last": last}).encode()
            for peer in self.peers.values():
                peer.send(message)
            self._gathered[call] = values
            self._state.notify_all()

    def _gone(self, process: int, how: str) -> None:
        role = ", the coordinator," if process == 0 else ""
        self._stop(process, f"{self.name(process)}{role} is gone {how}")

    def _stop(self, process: int, reason: str, grace: float = 0.0) -> None:
        """Tell all but `process` why (the hub), print it, and exit without waiting for any thread."""
        with self._state:
            if self._stopping or self._failing or self._ending:
                return
            self._stopping = True
        for other, peer in self.peers.items() if self.process == 0 else ():
            if other != process:
                peer.send({"process": process, "reason": reason, "grace": grace})
        time.sleep(grace)
        if self._failing:  # this process has meanwhile reported its own error
            return
        text = f"{reason}; this run stops. Continue with --resume from the newest checkpoint"
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C++ prints about the same event must not hide the reason
        os.write(stderr, f"\njaxrlhf: {text}\n".encode())
        time.sleep(0.2 if self.process == 0 else 0.0)  # the others read it before the connections break
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
    meet = _Meeting(address, number, timeout).hold() if process == 0 else _attend(address, number, process, timeout)
    return Lifeline(process, *meet, silence)


class _Meeting:
    """The hub's side of `join`. Each connection has a thread, so that a stranger keeps no process waiting."""

    def __init__(self, address: str, number: int, timeout: float) -> None:
        self.address, self.number, self.timeout = address, number, timeout
        self.lock = threading.Lock()
        self.hosts = {0: socket.gethostname()}
        self.peers: dict[int, _Peer] = {}
        self.strangers: list[str] = []  # their hosts
        self.problem: str | None = None
        self.over = False

    def hold(self) -> tuple[list[str], dict[int, _Peer]]:
        """Wait for all processes; returns their hosts and connections. Raises InputError."""
        self._accept()
        with self.lock:
            self.over = True
        hosts = [self.hosts[i] for i in sorted(self.hosts)]
        for peer in self.peers.values():
            peer.send({"refused": self.problem} if self.problem else {"hosts": hosts})
        if self.problem:
            raise InputError(self.problem)
        return hosts, self.peers

    def _accept(self) -> None:
        """Take connections until all processes have come, or there is a problem."""
        begin = reported = time.monotonic()
        with self._listen() as server:
            server.settimeout(POLL)
            while self.problem is None and len(self.hosts) < self.number:
                now = time.monotonic()
                with self.lock:
                    missing = ", ".join(str(i) for i in range(self.number) if i not in self.hosts)
                    refused = f" ({len(self.strangers)} connections without this run's ${TOKEN} were refused, the last "
                    refused = refused + f"one from {self.strangers[-1]})" if self.strangers else ""
                if now - begin > self.timeout:
                    self.problem = (
                        f"process {missing} of {self.number} did not come to the coordinator {self.address} within "
                        f"{self.timeout:.0f} s{refused}; check that every process was started with its own process_id, "
                        "that they reach this address and port, or raise --initialization_timeout"
                    )
                if now - reported > REPORT_EVERY:
                    reported = now
                    text = f"waiting for process {missing} of {self.number} at {self.address}{refused}"
                    print(text, file=sys.stderr, flush=True)
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

    def _admit(self, sock: socket.socket, host: str) -> None:
        """Check the token and the greeting of one connection."""
        peer = _Peer(sock)
        peer.limit_waits(socket.SO_RCVTIMEO, GREETING_TIMEOUT)
        try:
            deliver_challenge(peer.connection, _token())
            answer_challenge(peer.connection, _token())
            greeting = peer.receive(MAX_GREETING)
            peer.limit_waits(socket.SO_RCVTIMEO, 0)
            with self.lock:
                self._enter(peer, **greeting)
        except NOT_OURS:
            peer.connection.close()
            with self.lock:
                self.strangers.append(host)

    def _enter(self, peer: _Peer, process: int, number: int, host: str) -> None:
        """Take in a process, unless its number does not fit."""
        earlier = self.peers.get(process)
        if self.over:
            peer.connection.close()
        elif number != self.number:
            self.problem = f"num_processes is {self.number} on process 0 and {number} on process {process}"
            peer.send({"refused": self.problem})
        elif (process in self.hosts and not (earlier and earlier.connection.poll(0))) or not 0 < process < number:
            self.problem = f"process_id {process} was given to two processes; each needs its own, 0 to {number - 1}"
            peer.send({"refused": self.problem})
        else:  # a process whose earlier connection is closed was started again
            self.hosts[process], self.peers[process] = host, peer


def _attend(address: str, number: int, process: int, timeout: float) -> tuple[list[str], dict[int, _Peer]]:
    """Greet the hub; returns the hosts of all processes and the hub's connection. Raises InputError."""
    deadline, reason = time.monotonic() + timeout, "no reply"
    while (left := deadline - time.monotonic()) > 0:
        try:
            peer = _Peer(socket.create_connection(split_address(address), timeout=left))
            peer.limit_waits(socket.SO_RCVTIMEO, GREETING_TIMEOUT)
            answer_challenge(peer.connection, _token())
            deliver_challenge(peer.connection, _token())
            peer.limit_waits(socket.SO_RCVTIMEO, 0)
            peer.send({"process": process, "number": number, "host": socket.gethostname()})
            if not peer.connection.poll(max(0.0, deadline - time.monotonic())):
                continue
            reply = peer.receive()  # the hub sends it when all are there
        except AuthenticationError as error:
            raise InputError(f"what listens at {address} has not the ${TOKEN} of process {process}") from error
        except NOT_OURS as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
            time.sleep(RETRY)
            continue
        if "refused" in reply:
            raise InputError(reply["refused"])
        return reply["hosts"], {0: peer}
    raise InputError(
        f"process {process} of {number} cannot reach the coordinator at {address} (waited {timeout:.0f} s; {reason}). "
        "Check that process 0 runs, that the address is its host's and the port is open between the machines, or raise "
        "--initialization_timeout"
    )
