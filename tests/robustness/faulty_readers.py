"""Readers with the faults that the campaign looks for, by which it is tested itself."""

import os
import time

from tests.robustness.reader import Reader


def _raise(folder, file):
    raise KeyError("a fault of the program")


def _recurse(folder, file):
    return _recurse(folder, file)


def _hang(folder, file):
    time.sleep(60)


def _end(folder, file):
    os._exit(7)


def _take_memory(folder, file):
    return len(bytearray(600 * 2**20))


def _take_all_memory(folder, file):
    return len(bytearray(10**12))


def _answer_at_length(folder, file):
    from keras_sd.errors import UserError

    raise UserError("a line\nand another")


FAULTY = {
    read.__name__.removeprefix("_"): Reader(lambda: {"a.txt": b"a\nb"}, read, False, tuple, None, 1.0)
    for read in (_raise, _recurse, _hang, _end, _take_memory, _take_all_memory, _answer_at_length)
}
