"""The memory of compiled programs on a device, as the compiler counts it, and that of the device."""

from collections.abc import Callable
from typing import Any, NamedTuple


class ProgramMemory(NamedTuple):
    """Bytes that a program needs on each device.

    Attributes:
        arguments: what it is given: weights, state of the optimizer and batch.
        results: what it returns in memory of its own.
        temporaries: what it holds while it runs.
    """

    arguments: int
    results: int
    temporaries: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)


def memory_of(compiled: Any) -> ProgramMemory | None:
    """Return the memory of a program that JAX has compiled; None if the compiler does not count it."""
    counted = compiled.memory_analysis()
    if counted is None:
        return None
    return ProgramMemory(
        counted.argument_size_in_bytes,
        counted.output_size_in_bytes - counted.alias_size_in_bytes,  # others take the place of arguments
        counted.temp_size_in_bytes,
    )


def device_bytes() -> int | None:
    """Return how much memory programs of JAX may use on a device; None where only the system knows."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def telling(program: Any, on_compiled: Callable[[ProgramMemory], object] | None) -> Callable[..., Any]:
    """Return a program of JAX that tells its memory once, before it runs for the first time.

    Args:
        program: a function that `jax.jit` returns.
        on_compiled: is called with the memory. None: it is not counted.
    """
    if on_compiled is None:
        return program
    is_told = False

    def call(*inputs):
        nonlocal is_told
        if not is_told:
            is_told = True
            # The call takes what is compiled here.
            memory = memory_of(program.lower(*inputs).compile())
            if memory is not None:
                on_compiled(memory)
        return program(*inputs)

    return call
