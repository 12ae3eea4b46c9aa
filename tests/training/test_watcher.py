"""A watching process ends its copy when another process has ended, and says which one and how."""

import os
import signal
import socket
import threading
import time

import pytest

from keras_sd.training import watcher
from keras_sd.training.watcher import End


def copy(code=None):
    """Forks a process of its own group that ends with this exit code, or sleeps; returns its id."""
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        if code is None:
            time.sleep(100)
        os._exit(code or 0)
    return child


def follow_all(copies, silent=(), silence=30.0):
    """How several processes end, whose copies are given; the silent ones have no watching process."""
    pairs = {index: socket.socketpair() for index in range(1, len(copies))}
    peers = [{index: pair[0] for index, pair in pairs.items()}]
    peers += [{0: pair[1]} for pair in pairs.values()]
    ends = [None] * len(copies)

    def follow(index):
        ends[index] = watcher.follow(copies[index], index, peers[index], silence)

    threads = [
        threading.Thread(target=follow, args=(one,)) for one in range(len(copies)) if one not in silent
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in silent:
        os.kill(copies[index], signal.SIGKILL)
        os.waitpid(copies[index], 0)
        for peer in peers[index].values():
            peer.close()
    return ends


def test_copies_that_end_well():
    assert follow_all([copy(0), copy(0), copy(0)]) == [End(index, 0, 0) for index in range(3)]


@pytest.mark.parametrize("process", [0, 1])
def test_a_killed_copy_ends_the_others(process):
    copies = [copy(), copy(), copy()]
    os.kill(copies[process], signal.SIGKILL)
    began = time.monotonic()
    ends = follow_all(copies)
    assert time.monotonic() - began < 5
    for index, end in enumerate(ends):
        assert end == End(process, -9, -9 if index == process else None)
        assert str(end) == f"process {process} was ended by SIGKILL"
        assert end.exit_code == 137 and not end.has_spoken
    for one in copies:
        with pytest.raises(ProcessLookupError):
            os.kill(one, 0)


def test_what_follows_from_an_end_is_not_its_cause():
    """JAX aborts or raises an exception in the other processes, which may come first."""
    copies = [copy(1), copy(), copy(1)]

    def kill_later():
        time.sleep(0.7)
        os.kill(copies[1], signal.SIGKILL)

    thread = threading.Thread(target=kill_later)
    thread.start()
    ends = follow_all(copies)
    thread.join()
    assert {(end.process, end.code, end.exit_code) for end in ends} == {(1, -9, 137)}
    assert [end.own for end in ends] == [1, -9, 1]


def test_a_bug_of_one_process_is_named_if_nothing_else_is_heard():
    ends = follow_all([copy(), copy(), copy(1)])
    assert {(end.process, end.code, end.exit_code) for end in ends} == {(2, 1, 1)}
    assert str(ends[0]) == "process 2 ended with exit code 1"


def test_bad_input_of_all_leaves_each_its_own_line():
    ends = follow_all([copy(2), copy(2)])
    assert all(end.exit_code == 2 and end.has_spoken for end in ends)
    ends = follow_all([copy(2), copy()])
    assert [end.has_spoken for end in ends] == [True, False]
    assert (
        str(ends[1]) == "process 0 ended with exit code 2 (bad input, which it names itself)"
        and ends[1].exit_code == 2
    )


@pytest.mark.parametrize("silent", [0, 2])
def test_a_host_that_says_nothing_more(silent):
    copies = [copy(), copy(), copy()]
    ends = follow_all(copies, silent=(silent,), silence=1.0)
    ends = [end for index, end in enumerate(ends) if index != silent]
    assert {(end.process, end.code, end.exit_code) for end in ends} == {(silent, None, 1)}
    assert str(ends[0]) == f"process {silent} does not answer"


def test_more_processes_than_select_can_wait_for():
    """Of a descriptor beyond 1023, as process 0 of a large pod has them."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        high = socket.socket(fileno=os.dup2(ours.fileno(), 1500))
        theirs.sendall(b'{"process": 1, "code": 3}\n')
        end = watcher.follow(copy(), 0, {1: high})
    assert end == End(1, 3, None)
