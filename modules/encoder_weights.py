"""Weights of an encoder: from a file or a folder of folds, and when the model hub cannot be reached."""

from __future__ import annotations

import logging
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError

log = logging.getLogger(__name__)

CONTAINERS = ("state_dict", "model", "teacher")
"""Keys under which a checkpoint keeps its weights."""
DEEPEST = 3
"""Containers inside containers that are opened."""
PREFIXES = ("module.", "_orig_mod.", "encoder.", "resnet.", "backbone.", "model.")
"""What wrappers and training programs put in front of a timm name."""
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class LoadReport:
    """Names of weights, without prefixes: loaded; missing in the file; in the file but not in the encoder."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({_some(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} not used ({_some(self.unexpected)})")
        return ", ".join(parts)


def load_encoder_weights(encoder: nn.Module, path: str | Path, fold: int | None = None) -> LoadReport:
    """Loads weights into ``encoder.model`` and says what was loaded.

    Takes a state dict or a checkpoint that holds one, of the bare model, of an encoder or of a whole
    end-to-end model (whose other parts are left alone), with or without the prefixes of DDP and compilation.

    Args:
        encoder: has the timm model as ``.model``.
        path: .pt, .pth or .safetensors; or a folder, which means ``<folder>/fold_<fold>_model_best.pt``.
        fold: needed for a folder.

    Raises:
        UserError: no such file, unreadable without running code, nothing of this encoder, or other shapes.
    """
    file = _resolve(Path(path), fold)
    model = encoder.model
    assert isinstance(model, nn.Module)
    own = model.state_dict()
    given = _names_of(_read(file), own)
    _refuse_mismatch(file, given, own)
    model.load_state_dict(given, strict=False)
    counted = {name for name in own if not name.endswith("num_batches_tracked")}
    report = LoadReport(
        loaded=tuple(sorted(given.keys() & own.keys())),
        missing=tuple(sorted(counted - given.keys())),
        unexpected=tuple(sorted(given.keys() - own.keys())),
    )
    log.log(logging.WARNING if report.missing else logging.INFO, "%s: %s", file, report)
    return report


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Inside, an unreachable model hub means: only files that are already on this machine, at once.

    Without this, every file costs the hub client six attempts with growing pauses, a minute or more.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(url: str) -> bool:
    """Whether the host answers; behind a proxy it is left to the client to find out."""
    parts = urllib.parse.urlsplit(url)
    if urllib.request.getproxies() or parts.hostname is None:
        return True
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname, port), timeout=HUB_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _resolve(path: Path, fold: int | None) -> Path:
    if path.is_dir():
        if fold is None:
            raise UserError(f"{path} is a folder of folds, and no fold is given; name one of its files")
        path = path / f"fold_{fold}_model_best.pt"
    if not path.is_file():
        raise UserError(f"{path}: there is no such file with encoder weights; correct --enc_init")
    return path


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, prefixes and all."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    # A broken byte leads torch's reader to a dozen types, from AssertionError to struct.error.
    except Exception as error:  # noqa: BLE001
        raise _unreadable(file, error) from error
    for _ in range(DEEPEST):
        if isinstance(content, Mapping):
            content = next((content[k] for k in CONTAINERS if isinstance(content.get(k), Mapping)), content)
    if not isinstance(content, Mapping):
        raise UserError(f"{file}: holds a {type(content).__name__} where a mapping of names to tensors is needed")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file}: cannot be read as tensors alone ({type(error).__name__}). Weights are never unpickled "
        f"freely, as that runs code; save the state dict alone, with torch.save or as .safetensors."
    )


def _names_of(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors under timm's names; of an end-to-end model only the encoder's."""
    bare = {_strip(name, PREFIXES[:2]): value for name, value in tensors.items()}
    if any(name.startswith("encoder.") for name in bare):
        bare = {name: value for name, value in bare.items() if name.startswith("encoder.")}
    named = {(name if name in own else _strip(name, PREFIXES)): value for name, value in bare.items()}
    return _modern_swin(named)


def _strip(name: str, prefixes: tuple[str, ...]) -> str:
    """``name`` without any leading prefixes, however many."""
    while hit := next((p for p in prefixes if name.startswith(p)), None):
        name = name.removeprefix(hit)
    return name


def _modern_swin(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Swin weights of older timm releases: a stage ended with its downsampling, now it starts with it."""
    if "layers.0.downsample.reduction.weight" not in named:
        return named
    later = re.compile(r"^layers\.(\d+)\.downsample\.")
    buffers = ("relative_position_index", "attn_mask")
    return {
        later.sub(lambda match: f"layers.{int(match[1]) + 1}.downsample.", name): value
        for name, value in named.items()
        if not name.endswith(buffers)
    }


def _refuse_mismatch(file: Path, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    shared = given.keys() & own.keys()
    if not shared:
        raise UserError(
            f"{file}: none of its {len(given)} tensors ({_some(tuple(given))}) belongs to the encoder "
            f"({_some(tuple(own))}); choose the file of this encoder or the encoder of this file"
        )
    wrong = [name for name in own if name in shared and given[name].shape != own[name].shape]
    if wrong:
        shapes = (f"{n} {tuple(given[n].shape)} instead of {tuple(own[n].shape)}" for n in wrong[:20])
        raise UserError(
            f"{file}: {len(wrong)} of {len(shared)} tensors have other shapes than the encoder's: "
            f"{'; '.join(shapes)}. Choose the encoder that these weights were trained with."
        )


def _some(names: tuple[str, ...], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
