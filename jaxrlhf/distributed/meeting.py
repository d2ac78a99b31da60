"""The meeting of the processes of a run: connections, the token, and who has come.

The hub, process 0, listens on the coordinator's port until all processes have come, and closes the port then. A message
is JSON behind its length.
"""

import asyncio
import contextlib
import hmac
import json
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping

from jaxrlhf.errors import InputError

TOKEN = "JAXRLHF_TOKEN"
"""Environment variable with the secret that the processes of a run share."""
MAX_MESSAGE = 64 << 20  # bytes of one message
MAX_GREETING = 1 << 12  # bytes of a greeting
PROOF = 32  # bytes of a random number, and of the proof that its reader has the token
GREETING_TIMEOUT = 10  # seconds in which a new connection must say the next thing
REPORT_EVERY = 10.0  # seconds between lines that name who is missing
RETRY = 0.2  # seconds between attempts to connect

NOT_OURS = (EOFError, OSError, ValueError, TypeError)
"""Errors of a connection to a stranger: closed, silent or too long, no greeting."""


class OtherToken(Exception):
    """The other side does not have the token of this run."""


def _token() -> bytes:
    """Secret of the run. Without one, the token only tells processes of jaxrlhf from other programs."""
    return os.environ.get(TOKEN, "").encode() or b"jaxrlhf"


class Peer:
    """A connection to one process. Only the lifeline's thread uses it.

    Attributes:
        heard: time of its last message (monotonic seconds).
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.heard = reader, writer, time.monotonic()

    @property
    def closed(self) -> bool:
        """True when the other side has closed the connection."""
        return self.reader.at_eof() or self.reader.exception() is not None

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Close the connection when the body raises."""
        try:
            yield
        except BaseException:
            self.writer.close()
            raise

    def send(self, message: Mapping[str, object] | bytes) -> None:
        """Send, without waiting. It does nothing when the other side is gone: the reader notices that."""
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        if not self.writer.is_closing():
            self.writer.write(struct.pack("!I", len(data)) + data)

    async def receive_bytes(self, limit: int) -> bytes:
        """Return the next frame. Raises EOFError at the end, or ValueError for a longer frame."""
        try:
            (size,) = struct.unpack("!I", await self.reader.readexactly(4))
            if size > limit:
                raise ValueError(f"it sent {size} bytes, and a message has at most {limit} bytes")
            return await self.reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise EOFError("it closed the connection") from error

    async def receive(self, limit: int = MAX_MESSAGE) -> dict:
        """Return the next message. Raises EOFError at the end, or ValueError for what is no message of ours."""
        data = await self.receive_bytes(limit)
        self.heard = time.monotonic()
        try:
            message = json.loads(data)
        except ValueError as error:
            raise ValueError("it sent what is not a JSON message") from error
        if not isinstance(message, dict):
            raise ValueError("it sent what is not a JSON message")
        return message

    async def authenticate(self, own: bytes, other: bytes) -> None:
        """Both sides prove to each other that they have the token.

        Each sends a random number, and then an HMAC of its role and both numbers, so that neither a recorded nor a
        reflected proof passes.

        Args:
            own: role of this side.
            other: role of the other side.

        Raises:
            OtherToken: the other side has another token.
        """
        mine = secrets.token_bytes(PROOF)
        self.send(mine)
        theirs = await self.receive_bytes(PROOF)
        self.send(hmac.digest(_token(), own + theirs + mine, "sha256"))
        proof = await self.receive_bytes(PROOF)
        if len(theirs) != PROOF or not hmac.compare_digest(
            proof, hmac.digest(_token(), other + mine + theirs, "sha256")
        ):
            raise OtherToken


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port` into host and port. Raises InputError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"coordinator_address {address!r}: must be HOST:PORT, as in 10.0.0.1:8476")
    return host.strip("[]"), int(port)


class Meeting:
    """The hub's side of `join`. Each connection has a task, so that a stranger keeps no process waiting."""

    def __init__(self, address: str, number: int, timeout: float) -> None:
        self.address, self.number, self.timeout = address, number, timeout
        self.hosts = {0: socket.gethostname()}
        self.peers: dict[int, Peer] = {}
        self.strangers: list[str] = []  # their hosts
        self.problem: str | None = None
        self.over = False
        self.changed = asyncio.Event()

    async def hold(self) -> tuple[list[str], dict[int, Peer]]:
        """Wait for all processes; returns their hosts and connections. Raises InputError."""
        await self._accept()
        self.over = True
        hosts = [self.hosts[i] for i in sorted(self.hosts)]
        for peer in self.peers.values():
            peer.send({"refused": self.problem} if self.problem else {"hosts": hosts})
        if self.problem:
            await asyncio.gather(*(peer.writer.drain() for peer in self.peers.values()), return_exceptions=True)
            raise InputError(self.problem)
        return hosts, self.peers

    async def _accept(self) -> None:
        """Take connections until all processes have come, or there is a problem."""
        begin = reported = time.monotonic()
        server = await asyncio.start_server(self._admit, sock=self._listen())
        while self.problem is None and len(self.hosts) < self.number:
            now = time.monotonic()
            missing = ", ".join(str(i) for i in range(self.number) if i not in self.hosts)
            refused = f" ({len(self.strangers)} connections without this run's ${TOKEN} were refused, the last "
            refused = refused + f"one from {self.strangers[-1]})" if self.strangers else ""
            if now - begin > self.timeout:
                self.problem = (
                    f"process {missing} of {self.number} did not come to the coordinator {self.address} within "
                    f"{self.timeout:.0f} s{refused}; check that every process was started with its own process_id, "
                    "that they reach this address and port, or raise --initialization_timeout"
                )
            elif now - reported > REPORT_EVERY:
                reported = now
                text = f"waiting for process {missing} of {self.number} at {self.address}{refused}"
                print(text, file=sys.stderr, flush=True)
            else:
                with contextlib.suppress(TimeoutError):
                    left = min(begin + self.timeout, reported + REPORT_EVERY) - now
                    await asyncio.wait_for(self.changed.wait(), left + 0.01)
                self.changed.clear()
        server.close()

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

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Check the token and the greeting of one connection."""
        peer = Peer(reader, writer)
        try:
            with peer.closed_on_error():
                async with asyncio.timeout(GREETING_TIMEOUT):
                    await peer.authenticate(b"hub", b"process")
                    greeting = await peer.receive(MAX_GREETING)
                self._enter(peer, **greeting)
        except (*NOT_OURS, OtherToken):
            self.strangers.append(str((writer.get_extra_info("peername") or ("unknown",))[0]))
        self.changed.set()

    def _enter(self, peer: Peer, process: int, number: int, host: str) -> None:
        """Take in a process, unless its number does not fit."""
        earlier = self.peers.get(process)
        if self.over:
            peer.writer.close()
        elif number != self.number:
            self.problem = f"num_processes is {self.number} on process 0 and {number} on process {process}"
            peer.send({"refused": self.problem})
        elif (process in self.hosts and not (earlier and earlier.closed)) or not 0 < process < number:
            self.problem = f"process_id {process} was given to two processes; each needs its own, 0 to {number - 1}"
            peer.send({"refused": self.problem})
        else:  # a process whose earlier connection is closed was started again
            self.hosts[process], self.peers[process] = host, peer


async def attend(address: str, number: int, process: int, timeout: float) -> tuple[list[str], dict[int, Peer]]:
    """Greet the hub; returns the hosts of all processes and the hub's connection. Raises InputError."""
    deadline, reason = time.monotonic() + timeout, "no reply"
    greeting = {"process": process, "number": number, "host": socket.gethostname()}
    while (left := deadline - time.monotonic()) > 0:
        try:
            sock = socket.create_connection(split_address(address), timeout=left)  # nothing else runs in this thread
            peer = Peer(*await asyncio.open_connection(sock=sock))
            with peer.closed_on_error():
                async with asyncio.timeout(GREETING_TIMEOUT):
                    await peer.authenticate(b"process", b"hub")
                peer.send(greeting)
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    reply = await peer.receive()  # the hub sends it when all are there
                if "refused" in reply:
                    raise InputError(reply["refused"])
            return reply["hosts"], {0: peer}
        except OtherToken as error:
            raise InputError(f"what listens at {address} has not the ${TOKEN} of process {process}") from error
        except InputError:
            raise
        except NOT_OURS as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
            await asyncio.sleep(RETRY)
    raise InputError(
        f"process {process} of {number} cannot reach the coordinator at {address} (waited {timeout:.0f} s; {reason}). "
        "Check that process 0 runs, that the address is its host's and the port is open between the machines, or raise "
        "--initialization_timeout"
    )
