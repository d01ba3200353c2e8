"""Attention sampling (``--sel_type=ema``): the EMA model looks at all patches, and its attention heads choose.

Each head votes for the k patches with its largest attention; the k patches with most votes are kept. Among equal votes
the larger mean attention decides, so that the choice is a function of the weights alone.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from datasets.bags import Bags
from datasets.sampling import bag_limit
from modules.heads import attention_weights
from utils.config import DataConfig
from utils.errors import UserError

if TYPE_CHECKING:
    from datasets.views import Renderer
    from engine.precision import Precision
    from modules.model import SlideModel


def check_attention_sampling(data: DataConfig, mil: nn.Module) -> None:
    """Refuses what attention sampling cannot go with.

    Raises:
        UserError: naming every option that does not fit.
    """
    reasons = [
        "it keeps --same_psize patches of a bag, and that is 0" if not bag_limit(data) else "",
        "bags of two magnifications are drawn per magnification: give --no_mul_scale_input" * data.mul_scale_input,
        "duplicates would be voted for twice: give --no_pad_enc_bs" * data.pad_enc_bs,
        "regions choose by themselves: give --num_group_1d=none --num_group_2d=none"
        if data.num_group_1d or data.num_group_2d
        else "",
        f"the head {type(mil).__name__} has no attention" * (not hasattr(mil, "attention")),
    ]
    if any(reasons):
        raise UserError(f"sel_type is ema, but {'; '.join(r for r in reasons if r)}. Or give --sel_type=random.")


@torch.no_grad()
def favourites(
    model: SlideModel, bags: Bags, keep: int, renderer: Renderer | None, precision: Precision
) -> list[Tensor]:
    """The patches of each bag that the attention heads of ``model`` vote for.

    Args:
        model: the EMA model; it looks at the same views as the training step.
        bags: bags with all their patches, on the model's device.
        keep: patches per bag.
        renderer: patches to encoder input; None for features.
        precision: of the forward pass.

    Returns:
        Ascending positions in each bag, at most ``keep`` of them, in host memory.
    """
    model.eval()
    with precision.autocast():
        inputs = bags.instances if renderer is None else renderer(bags.instances, bags.draws)
        features = model.encode(inputs).split(bags.sizes)
        places = [None] * len(bags.sizes) if bags.pos is None else [p.unsqueeze(0) for p in bags.pos.split(bags.sizes)]
        return [
            elect(attention_weights(model.mil, x.unsqueeze(0), None, p)[0].float(), keep).cpu()
            for x, p in zip(features, places, strict=True)
        ]


def elect(attention: Tensor, keep: int) -> Tensor:
    """The ``keep`` patches with most votes of the heads.

    >>> elect(torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.0, 0.5, 0.1, 0.4]]), 2)
    tensor([0, 1])

    Args:
        attention: (heads, N), each row summing to 1.
        keep: patches that each head votes for, and that are kept.

    Returns:
        Ascending positions, at most ``keep``.
    """
    heads, count = attention.shape
    keep = min(keep, count)
    votes = torch.zeros(count, dtype=torch.float64, device=attention.device)
    votes.scatter_add_(0, attention.topk(keep, dim=1).indices.flatten(), votes.new_ones(heads * keep))
    mean = attention.double().mean(dim=0)
    return (votes + mean / (mean.max() + 1) / 2).topk(keep).indices.sort().values


def reduced(bags: Bags, chosen: list[Tensor]) -> Bags:
    """``bags`` with the positions ``chosen`` of each bag only."""
    begins = torch.tensor([0, *bags.sizes[:-1]]).cumsum(0).tolist()
    rows = torch.cat([own + begin for own, begin in zip(chosen, begins, strict=True)])
    on_device = rows.to(bags.instances.device)
    return dataclasses.replace(
        bags,
        instances=bags.instances[on_device],
        sizes=[len(own) for own in chosen],
        draws=None if bags.draws is None else bags.draws[rows],
        keep=None if bags.keep is None else bags.keep[rows],
        pos=None if bags.pos is None else bags.pos[on_device],
    )
