"""Where processes meet: addresses that are none, hosts that are not there, and many that are absent."""

import contextlib
import socket
import time

import pytest

from keras_sd.errors import UserError
from keras_sd.training import rendezvous


def free_port():
    with contextlib.closing(socket.create_server(("", 0))) as server:
        return server.getsockname()[1]


ODD = ["localhost:²", "localhost:٢٩", "a..b:29500", "ü" * 60 + ":29500", "x" * 64 + ":29500", "[::1:29500"]
ODD += ["::1:29500", "[]:29500", f"localhost:{'9' * 5000}"]


@pytest.mark.parametrize("text", ODD)
def test_odd_addresses_are_refused_in_one_line(text):
    with pytest.raises(UserError, match=r"^coordinator .*: not an address; give HOST:PORT"):
        rendezvous.check_processes("auto", text, 2, 1)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[::1]:29500", ("::1", 29500)),
        ("node-1.pods.:80", ("node-1.pods.", 80)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("rechner-für-bilder:29500", ("rechner-für-bilder", 29500)),
    ],
)
def test_addresses(text, expected):
    assert rendezvous.check_processes("auto", text, 2, 1) == expected


@pytest.mark.parametrize("index", [0, 1])
def test_a_host_that_is_not_there_is_told_at_once(index):
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"^coordinator nowhere.invalid:29500: no such host; give process 0's"
    ):
        rendezvous.meet(("nowhere.invalid", 29500), 2, index, timeout=30)
    assert time.monotonic() - began < 15


def test_of_many_absent_processes_the_first_are_named():
    address = ("localhost", free_port())
    with pytest.raises(UserError) as raised:
        rendezvous.meet(address, 10**18, 0, timeout=0.1)
    assert f"process 1, 2, 3, 4, 5, 6, 7, 8 and {10**18 - 9} more did not connect" in str(raised.value)


def test_a_port_that_is_taken():
    with contextlib.closing(socket.create_server(("", 0))) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError) as raised:
            rendezvous.meet(("localhost", port), 2, 0, timeout=5)
    assert str(raised.value) == (
        f"coordinator localhost:{port}: cannot listen there: Address already in use; use another port, and "
        "start process 0 once"
    )
