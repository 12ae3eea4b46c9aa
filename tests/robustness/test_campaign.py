"""Damaged and odd files end in one line: 300 of each reader, or as many as ROBUSTNESS_INPUTS says.

An input fails with an exception other than UserError, with more than 10 s, and with more than 500 MiB.
"""

import os

import pytest

from tests.robustness.campaign import Worker, fault_of, run
from tests.robustness.faulty_readers import FAULTY
from tests.robustness.readers import READERS

COUNT = int(os.environ.get("ROBUSTNESS_INPUTS", 300))
_SHOWN = 5


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """A worker for readers that load Keras, and one for those that do not."""
    found = {loads_keras: Worker(tmp_path_factory.mktemp("worker")) for loads_keras in (False, True)}
    yield found
    for worker in found.values():
        worker.close()


@pytest.mark.parametrize("name", sorted(READERS, key=lambda name: READERS[name].loads_keras))
def test_damaged_files_end_in_one_line(name, workers, tmp_path):
    counts = run(name, workers[READERS[name].loads_keras], tmp_path, COUNT)
    failures = counts.pop("failures")
    print(name, counts, len(failures))
    shown = "\n\n".join(
        f"{file}: {repr(content)[:300]}\n{fault}" for file, content, fault in failures[:_SHOWN]
    )
    assert not failures, f"{name}: {len(failures)} of {counts['inputs']} inputs failed\n" + "\n\n".join(shown)
    assert counts["inputs"] >= 0.9 * COUNT * READERS[name].share  # there may be fewer that differ


def test_every_kind_of_fault_is_found(tmp_path):
    worker, faults = Worker(tmp_path), {}
    try:
        for name in FAULTY:
            if not worker.is_alive:
                worker.read("configs", tmp_path)  # there are none, which loads what readers need
            worker.longest = 2.0 if name == "hang" else 60.0
            faults[name] = fault_of(worker.read(name, tmp_path, "a.txt"))
    finally:
        worker.close()
    assert "KeyError" in faults["raise"] and "RecursionError" in faults["recurse"]
    assert "took more than 2 s" in faults["hang"] and "ended the process (7)" in faults["end"]
    assert "MiB" in faults["take_memory"] and "MemoryError" in faults["take_all_memory"]
    assert "no line" in faults["answer_at_length"]
