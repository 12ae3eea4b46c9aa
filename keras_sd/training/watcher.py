"""Watches one of the processes that train together, so that the end of one is the end of all.

A process whose peer is gone waits in its next collective operation: for minutes, or for ever. So each process
that the user starts watches a copy of itself, which trains (`interruption.fork`). The watching processes keep
the TCP connections of their meeting (`rendezvous.meet`): process 0 has one to each of the others, and passes
on what it hears. They tell when their copy ends, and several times in `SILENCE` seconds that they are there.

The copies fail one after the other: where one is killed, the collective operation of another raises an
exception or JAX aborts it. So such an end counts as the cause only if nothing else is heard within
`_SETTLING` seconds. This module imports no backend.
"""

import contextlib
import json
import os
import select
import signal
import socket
import time
from dataclasses import dataclass

SILENCE = 30.0  # seconds after which a process does not answer
_BEATS = 6  # in that time
_POLL = 0.2
_SETTLING = 2.0
_INTERRUPTED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM))
_BAD_INPUT = 2
# How a process ends whose peer is gone: by an exception, or aborted by JAX.
_CONSEQUENCES = (1, -signal.SIGABRT)
# Seconds in which a copy may end by itself after another process: to print its own line for the same bad
# input, or to stop as that one did.
_LENIENCE = {_BAD_INPUT: _SETTLING, **dict.fromkeys(_INTERRUPTED, 15.0)}


@dataclass(frozen=True)
class End:
    """How all processes ended.

    Attributes:
        process: the index of the one that ended first.
        code: its exit code, negative for a signal as in `subprocess`; None if it does not answer.
        own: the exit code of this process' copy; None if it had to be ended.
    """

    process: int
    code: int | None
    own: int | None

    @property
    def exit_code(self) -> int:
        """The exit code of all processes: that of the first to end, as a shell gives it, or 1."""
        if self.code is None:
            return 1
        return self.code if self.code >= 0 else 128 - self.code

    @property
    def has_spoken(self) -> bool:
        """Whether this process' copy has ended by itself with a line of its own, or had nothing to say."""
        return self.own in (0, _BAD_INPUT, *_INTERRUPTED)

    def __str__(self) -> str:
        """The process and how it ended."""
        if self.code is None:
            return f"process {self.process} does not answer"
        if self.code < 0:
            return f"process {self.process} was ended by {signal.Signals(-self.code).name}"
        fault = " (bad input, which it names itself)" if self.code == _BAD_INPUT else ""
        return f"process {self.process} ended with exit code {self.code}{fault}"


def follow(child: int, index: int, peers: dict[int, socket.socket], silence: float = SILENCE) -> End:
    """Wait for the end of a copy and of the other processes; end the copy when another one has ended wrongly.

    Args:
        child: the process id of the copy, which leads a process group.
        index: the index of this process.
        peers: connections to other watching processes by index, which are closed.
        silence: seconds after which a process does not answer.
    """
    watcher = _Watcher(child, index, peers, silence)
    try:
        while True:
            watcher.listen()
            watcher.look_at_child()
            end = watcher.end()
            if end is not None:
                watcher.leave()
                return end
    finally:
        _end_group(child)
        for peer in peers.values():
            peer.close()


def _end_group(child):
    """End a copy and what it has started; wait a moment, but not for a copy that the kernel holds."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    deadline = time.monotonic() + 1
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline and not os.waitpid(child, os.WNOHANG)[0]:
            time.sleep(0.01)


class _Watcher:
    def __init__(self, child, index, peers, silence):
        self._child, self._index, self._peers, self._silence = child, index, dict(peers), silence
        self._received = dict.fromkeys(peers, b"")
        now = time.monotonic()
        self._heard = dict.fromkeys(peers, now)  # when
        self._next_beat = now
        self._ends = {}  # index -> (exit code, time), in the order in which they were heard
        self._is_asked = False  # whether the child has been asked to end
        for peer in peers.values():
            peer.setblocking(False)

    def listen(self):
        """Read what the others have sent, wait for it a moment, and tell them that this process is there."""
        names, poll = {}, select.poll()  # `select.select` takes no descriptor beyond 1023
        for name, peer in self._peers.items():
            names[peer.fileno()] = name
            poll.register(peer, select.POLLIN)
        for descriptor, _ in poll.poll(1000 * _POLL):
            self._read(names[descriptor])
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + self._silence / _BEATS
            self._tell({})
        for name, heard in list(self._heard.items()):
            if now - heard > self._silence:
                self._note(name, None)

    def _read(self, name):
        try:
            part = self._peers[name].recv(2**16)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if not part:
            del self._peers[name]
            if name in self._heard:
                self._note(name, None)
            return
        if name in self._heard:
            self._heard[name] = time.monotonic()
        *lines, self._received[name] = (self._received[name] + part).split(b"\n")
        for words in map(json.loads, lines):
            if words.get("leaves"):
                self._heard.pop(name, None)
            elif words:
                self._note(words["process"], words["code"])

    def leave(self):
        """Tell the others that this process knows the end, so that its silence means nothing."""
        self._tell({"leaves": True})

    def look_at_child(self):
        """Note the end of the copy."""
        if self._index in self._ends:
            return
        ended, status = os.waitpid(self._child, os.WNOHANG)
        if ended:
            self._note(self._index, os.waitstatus_to_exitcode(status))

    def _note(self, name, code):
        """Note the end of a process once, and tell the others: those of process 0 hear it from there."""
        self._heard.pop(name, None)
        if name not in self._ends:
            self._ends[name] = code, time.monotonic()
            if self._index in (0, name):
                self._tell({"process": name, "code": code})

    def _tell(self, words):
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(json.dumps(words).encode() + b"\n")

    def end(self):
        """Return the `End` when this process has nothing left to wait for; otherwise None."""
        wrong = {name: end for name, end in self._ends.items() if end[0] != 0}
        own = self._ends.get(self._index)
        if not wrong:
            # Process 0 waits for all, as it passes on what it hears.
            is_done = own is not None and (self._index or not self._heard)
            return End(self._index, 0, 0) if is_done else None
        now = time.monotonic()
        causes = [name for name, (code, _) in wrong.items() if code not in _CONSEQUENCES]
        name = (causes or list(wrong))[0]
        code, since = wrong[name]
        if not causes and now - since < _SETTLING:
            return None
        if own is None and now - since < _LENIENCE.get(code, 0):
            if code in _INTERRUPTED and not self._is_asked:
                self._is_asked = True
                os.kill(self._child, signal.SIGTERM)
            return None
        return End(name, code, None if own is None else own[0])
