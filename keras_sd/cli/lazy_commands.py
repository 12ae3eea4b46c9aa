"""Commands of a group that are imported when they are first used: one command waits for no other."""

import importlib
from collections.abc import Callable, Iterator, MutableMapping

import click


class LazyCommands(MutableMapping[str, click.Command]):
    """The commands of a `click.Group` by name.

    Args:
        places: name -> "module" or "module:attribute", the attribute being by default the name with
            underscores.
        prepare: called with each command once it is imported.
    """

    def __init__(
        self, places: dict[str, str], prepare: Callable[[click.Command], object] | None = None
    ) -> None:
        self._places, self._prepare = places, prepare
        self._commands: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._commands:
            module, _, attribute = self._places[name].partition(":")
            command = getattr(importlib.import_module(module), attribute or name.replace("-", "_"))
            if self._prepare is not None:
                self._prepare(command)
            self._commands[name] = command
        return self._commands[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._places.setdefault(name, "")
        self._commands[name] = command

    def __delitem__(self, name: str) -> None:
        del self._places[name]
        self._commands.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
