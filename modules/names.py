"""The grammar of model names: ``<mil>`` takes features, ``e2e_<encoder>_<mil>`` takes pixels.

``<encoder>`` is a registered name (``r18``) or ``timm:<any timm name>``. Both parts may contain underscores:
``e2e_timm:convnext_tiny_clam_sb`` is the encoder ``timm:convnext_tiny`` and the head ``clam_sb``.
"""

from __future__ import annotations

import modules.heads  # noqa: F401  (fills the registry of heads)
from modules.encoders import TIMM_PREFIX
from modules.registry import UnknownNameError, encoders, mils
from utils.errors import did_you_mean

E2E_PREFIX = "e2e_"


def parse_model_name(name: str) -> tuple[str | None, str]:
    """(encoder, MIL head) of a model name; the encoder is None for a head on features.

    >>> parse_model_name("e2e_timm:convnext_tiny_clam_sb")
    ('timm:convnext_tiny', 'clam_sb')

    Raises:
        UnknownNameError: with the names that exist and the nearest ones.
    """
    if not name.startswith(E2E_PREFIX):
        if name in mils:
            return None, name
        raise _unknown(name)
    for encoder, mil in _splits(name.removeprefix(E2E_PREFIX)):
        if mil in mils and (encoder in encoders or _is_timm(encoder)):
            return encoder, mil
    raise _unknown(name)


def _splits(rest: str) -> list[tuple[str, str]]:
    """Every way to cut at an underscore, the shortest encoder first, so that the longest head name wins."""
    cuts = [i for i, letter in enumerate(rest) if letter == "_"]
    return [(rest[:i], rest[i + 1 :]) for i in cuts]


def _is_timm(encoder: str) -> bool:
    return encoder.startswith(TIMM_PREFIX) and len(encoder) > len(TIMM_PREFIX)


def _unknown(name: str) -> UnknownNameError:
    known = mils.names() + [f"{E2E_PREFIX}{e}_{m}" for e in encoders.names() for m in mils.names()]
    return UnknownNameError(
        f"there is no model {name!r}. A model is <mil>, which takes features, or e2e_<encoder>_<mil>, which "
        f"takes pixels. Heads: {', '.join(mils.names())}. Encoders: {', '.join(encoders.names())}, or "
        f"{TIMM_PREFIX}<timm name>.{did_you_mean(name, known)}"
    )
