"""Lines by which a process tells `tools/bench_start.py` how far it is. Imports are timed: there are none."""

PROMPT = "red heart"


def mark(name):
    """Print a line; the time is that of its arrival."""
    print(f"mark: {name}", flush=True)
