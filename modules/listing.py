"""The table behind ``main.py --list``: every encoder and MIL head with its size and one line."""

from __future__ import annotations

import torch
from torch import nn

from modules.heads import build_mil
from modules.registry import encoders, mils
from utils.config import ModelConfig


def listing() -> str:
    """Encoders with parameters and feature width, MIL heads with parameters for 1024-wide features and two classes."""
    import modules.encoders  # noqa: F401  (registers the encoders)

    lines = ["encoders (e2e_<encoder>_<mil>)"]
    for name in encoders.names():
        with torch.device("meta"):
            encoder = encoders.get(name).build(pretrained=False)
        lines.append(f"  {name:10} {millions(encoder):>9}  {encoder.width:5d} features  {encoders.get(name).summary}")
    lines.append("  timm:<name>   any timm model, for example e2e_timm:convnext_tiny_abmilx")
    lines.append("MIL heads (parameters for 1024 features, 2 classes, default options)")
    for name in mils.names():
        lines.append(f"  {name:10} {millions(build_mil(name, 1024, 2, ModelConfig())):>9}  {mils.get(name).summary}")
    return "\n".join(lines)


def millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
