"""Waits until all processes of a run are present, before JAX connects them.

JAX aborts a process whose peers do not connect in time. Here each process announces itself to process 0 over
TCP first, and a fault becomes a one-line error. In a command the processes that watch (`training.watcher`)
meet first, compare their options and versions, and keep their connections.
"""

import contextlib
import itertools
import json
import os
import socket
import time

from keras_sd.arguments import shown, whole_number
from keras_sd.errors import UserError
from keras_sd.files.json_files import parse_json

_READY = "ready"
_PAUSE = 0.2  # seconds between two attempts
_LONGEST_LINE = 2**18
_MOST_DIFFERENCES = 3  # that are named
_MOST_MISSING = 8  # likewise


def parse_address(text):
    """Parse `HOST:PORT` into `(host, port)`; an IPv6 address is in brackets."""
    address = address_in(text)
    if address is None:
        raise UserError(f"coordinator {text}: not an address; give HOST:PORT, such as 10.0.0.1:29500")
    return address


def address_in(text):
    """Return the `(host, port)` of `HOST:PORT`, or None if it is no address that can be looked up."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif set(host) & set("[]:/"):
        return None
    is_port = port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 2**16
    return (host, int(port)) if is_port and _may_be_a_host(host) else None


def _may_be_a_host(name):
    """Return whether a name can be looked up: its parts have 1 to 63 letters (RFC 1035)."""
    try:
        return bool(name.encode("idna"))
    except UnicodeError:
        return False


def check_processes(kind, coordinator=None, num_processes=None, process_id=None):
    """Return the address of process 0, or None for a single process; arguments as of `distribution.start`.

    Raises:
        UserError: one of them is missing, has no effect or is out of range.
    """
    processes = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    given = [name for name, value in processes.items() if value is not None]
    if not given:
        return None
    if kind is None:
        raise UserError(f"{given[0]}: belongs to several processes; add `distribution='auto'`")
    missing = [name for name in processes if name not in given]
    if missing:
        together = ", ".join(f"`{name}`" for name in processes)
        raise UserError(f"{given[0]}: `{missing[0]}` is missing; give {together} together")
    count = whole_number("num_processes", num_processes, 1)
    whole_number("process_id", process_id, 0, count - 1)
    return parse_address(coordinator)


def meet(address, process_count, process_index, timeout, facts=None):
    """Wait until all processes of a run have arrived.

    Args:
        address: `(host, port)` at which all others can reach process 0.
        process_count, process_index: the number of processes, and the index of this one.
        timeout: seconds to wait.
        facts: what has to be the same in all processes, as JSON: name -> value, and under "versions" package
            -> version.

    Returns:
        The open connections, by index: in process 0 those to all others, in another one that to process 0.

    Raises:
        UserError: there is no such host; or a process does not connect, connects twice, expects another
            number of processes, or differs in a fact, which ends all processes.
    """
    deadline = time.monotonic() + timeout
    _check_host(address)
    facts = {} if facts is None else facts
    if process_index == 0:
        return _receive_all(address, process_count, deadline, timeout, facts)
    announcement = f"{process_index} of {process_count} {json.dumps(facts)}"
    return {0: _announce(address, announcement, deadline, timeout)}


def _receive_all(address, process_count, deadline, timeout, facts):
    """Run process 0's part: receive the announcements, and answer when all processes are present."""
    place = "{}:{}".format(*address)
    with contextlib.ExitStack() as stack:
        present, differences = {}, []
        with _server(address) as server:
            while len(present) < process_count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection = stack.enter_context(server.accept()[0])
                except TimeoutError:
                    raise UserError(
                        f"coordinator {place}: process {_missing(process_count, present)} did not connect "
                        f"within {timeout:g} s; start all {process_count} processes with this address"
                    ) from None
                index, theirs, fault = _read_announcement(connection, process_count, present)
                if fault:
                    _send(connection, fault)
                elif index is not None:
                    present[index] = connection
                    differences += [f"process {index}: {words}" for words in _differences(theirs, facts)]
        # Nobody listens any more when the others go on, to meet again at this address.
        answer = "; ".join(sorted(differences)[:_MOST_DIFFERENCES]) or _READY
        for connection in present.values():
            _send(connection, answer)
        if answer != _READY:
            raise UserError(answer)
        stack.pop_all()
        return present


def _check_host(address):
    """Raise UserError if there is no such host; process 0, which only listens, would wait for the others."""
    try:
        socket.getaddrinfo(*address)
    except socket.gaierror:
        place = "{}:{}".format(*address)
        raise UserError(f"coordinator {place}: no such host; give process 0's address") from None


def _missing(process_count, present):
    """Return the first of the processes that are not present, as words."""
    absent = (index for index in range(1, process_count) if index not in present)
    named = list(itertools.islice(absent, _MOST_MISSING))
    more = process_count - 1 - len(present) - len(named)
    return ", ".join(map(str, named)) + (f" and {more} more" if more else "")


def _server(address):
    """Return a listening socket; like JAX, it listens on all interfaces."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(("", address[1]), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        place = "{}:{}".format(*address)
        raise UserError(
            f"coordinator {place}: cannot listen there: {os.strerror(error.errno)}; use another port, and "
            "start process 0 once"
        ) from None


def _differences(theirs, ours):
    """Yield what another process has to change, a few words for each fact that differs."""
    versions = theirs.pop("versions", {}), ours.get("versions", {})
    for name in sorted(versions[0].keys() | versions[1].keys()):
        there, here = (side.get(name) or "missing" for side in versions)
        if there != here:
            yield f"{name} is {there} there and {here} in process 0; install the same version"
    for name in sorted(theirs.keys() | ours.keys() - {"versions"}):
        there, here = theirs.get(name), ours.get(name)
        if there != here:
            yield f"`{name}` is {shown(there)} there and {shown(here)} in process 0; give both the same"


def _read_announcement(connection, process_count, present):
    """Return the index of the announced process, or None, its facts and its fault, or None."""
    # A short timeout, so that other programs that connect cannot block the run.
    connection.settimeout(5)
    try:
        index, _, count, facts = _read_line(connection).split(" ", 3)
        index, count, facts = int(index), int(count), parse_json(facts, "announcement")
        facts["versions"] = dict(facts.get("versions", {}))
    except (OSError, ValueError, TypeError, UserError):
        return None, None, None
    if count != process_count:
        fault = f"num_processes {count}: process 0 was started with {process_count}; give all the same"
        return None, None, fault
    if index in present:
        return None, None, f"process_id {index}: taken by another process; give each its own"
    return index, facts, None


def _announce(address, announcement, deadline, timeout):
    """Run the part of all other processes: announce this one, wait for the answer, return the connection."""
    place = "{}:{}".format(*address)
    absent = UserError(
        f"coordinator {place}: process 0 cannot be reached within {timeout:g} s; start it there, and see "
        "that the port is open"
    )
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise absent
        try:
            connection = socket.create_connection(address, timeout=remaining)
            break
        except OSError:
            time.sleep(min(_PAUSE, remaining))
    with contextlib.ExitStack() as stack:
        stack.enter_context(connection)
        _send(connection, announcement)
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            answer = _read_line(connection)
        except TimeoutError:
            answer = ""
        except OSError:
            raise absent from None
        if not answer:
            raise UserError(
                f"coordinator {place}: not all processes connected within {timeout:g} s; start them all, "
                "with the same `num_processes`"
            )
        if answer != _READY:
            raise UserError(answer)
        stack.pop_all()
        return connection


def _send(connection, line):
    with contextlib.suppress(OSError):  # the peer may have disconnected
        connection.sendall(f"{line}\n".encode())


def _read_line(connection):
    """Return one line without its line ending, or what was received before the connection closed."""
    received = b""
    while not received.endswith(b"\n") and len(received) < _LONGEST_LINE:
        part = connection.recv(_LONGEST_LINE)
        if not part:
            break
        received += part
    return received.decode("utf-8", "replace").rstrip("\n")
