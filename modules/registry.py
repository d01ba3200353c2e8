"""Names of encoders and MIL heads, and their builders.

``@register_encoder("r18")`` and ``@register_mil("abmilx")`` put a builder under its public name. A model name is
either ``e2e_<encoder>_<mil>`` (pixels in) or ``<mil>`` (features in).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class UnknownNameError(ValueError):
    """A name that no registry holds; the message lists the names that exist."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered name: its builder and the line that ``main.py --list`` prints."""

    name: str
    build: Callable[..., T]
    summary: str


class Registry(Generic[T]):
    """A dictionary from public names to builders that refuses duplicates and explains unknown names."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, summary: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Returns a decorator that puts a builder under ``name``."""

        def decorate(build: Callable[..., T]) -> Callable[..., T]:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = Entry(name, build, summary)
            return build

        return decorate

    def get(self, name: str) -> Entry[T]:
        """The entry under ``name``; raises UnknownNameError listing what exists."""
        if name not in self._entries:
            raise UnknownNameError(f"there is no {self.kind} {name!r}; there are: {', '.join(self.names())}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return sorted(self._entries)


encoders: Registry[Any] = Registry("encoder")
mils: Registry[Any] = Registry("MIL head")

register_encoder = encoders.register
register_mil = mils.register
