"""Encoders: patches to features, one vector each.

The ResNets of the paper (section 3.2: last stage removed, global average pool), three pathology foundation
models, and any timm model as ``timm:<name>``. Names of an encoder's weights start with ``model.``, so that
those of a whole end-to-end model read ``encoder.model.<timm name>``. Normalisation constants come from the
encoder's own configuration.

Shapes: P patches, D = ``Encoder.width``.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from modules.encoder_weights import LoadReport, hub_or_cache, load_encoder_weights
from modules.registry import UnknownNameError, encoders, register_encoder
from modules.stem import has_standard_stem, run_with_stem
from utils.errors import UserError, did_you_mean

__all__ = ["Encoder", "LoadReport", "build_encoder", "load_encoder_weights"]

TIMM_PREFIX = "timm:"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Channels = tuple[float, float, float]


class Encoder(nn.Module):
    """A timm model that gives one vector per patch.

    Args:
        model: a timm feature extractor with one output (P, D, h, w), which is averaged over its positions,
            or a timm model without classifier, (P, D).
        width: D.
        mean: per channel, on the scale 0 to 1.
        std: per channel, on the scale 0 to 1.

    Attributes:
        fused_stem: run the first layers of a ResNet as one operator where that can be done; False where the model
            does not begin like one.
    """

    def __init__(self, model: nn.Module, width: int, mean: Channels, std: Channels) -> None:
        super().__init__()
        self.model = model
        self.width, self.mean, self.std = width, mean, std
        self.fused_stem = has_standard_stem(model)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised patches (P, 3, H, W) to features (P, D)."""
        out = run_with_stem(self.model, x) if self.fused_stem else self.model(x)
        return out[0].mean(dim=(-2, -1)) if isinstance(out, (list, tuple)) else out


def build_encoder(name: str, *, pretrained: bool = True, **overrides: Any) -> Encoder:
    """The encoder registered as ``name``, or any timm model as ``timm:<name>``.

    Args:
        name: a name in ``registry.encoders``, or ``timm:`` and a timm name with or without its tag.
        pretrained: with the weights that belong to the name; else random ones.
        overrides: keywords for ``timm.create_model``, for instance ``depth=2``.

    Raises:
        UnknownNameError: nothing has this name.
        UserError: the weights cannot be had.
    """
    if name.startswith(TIMM_PREFIX):
        return _whole(name.removeprefix(TIMM_PREFIX), pretrained, overrides)
    encoder: Encoder = encoders.get(name).build(pretrained=pretrained, **overrides)
    return encoder


@register_encoder("r18", "ResNet-18 up to layer3 (ImageNet)")
def r18(pretrained: bool, **overrides: Any) -> Encoder:
    return _trunk("resnet18.tv_in1k", 3, pretrained, overrides)


@register_encoder("r18a", "ResNet-18 with layer4 (ImageNet)")
def r18a(pretrained: bool, **overrides: Any) -> Encoder:
    return _trunk("resnet18.tv_in1k", 4, pretrained, overrides)


@register_encoder("r50", "ResNet-50 up to layer3 (ImageNet)")
def r50(pretrained: bool, **overrides: Any) -> Encoder:
    return _trunk("resnet50.tv_in1k", 3, pretrained, overrides)


@register_encoder("r50v2", "ResNet-50 up to layer3 (ImageNet, second recipe of torchvision)")
def r50v2(pretrained: bool, **overrides: Any) -> Encoder:
    return _trunk("resnet50.tv2_in1k", 3, pretrained, overrides)


@register_encoder("uni", "UNI, ViT-L/16 (weights: UNI_CKPT_PATH or --enc_init)")
def uni(pretrained: bool, **overrides: Any) -> Encoder:
    """Chen et al., "Towards a general-purpose foundation model for computational pathology", 2024."""
    options = {"init_values": 1e-5, "dynamic_img_size": True} | overrides
    encoder = _pathology("vit_large_patch16_224", options)
    if pretrained:
        path = os.environ.get("UNI_CKPT_PATH")
        if not path:
            raise _no_weights("uni", "the environment variable UNI_CKPT_PATH, which says where they are, is not set")
        load_encoder_weights(encoder, path)
    return encoder


@register_encoder("chief", "CHIEF, Swin-T with a convolutional stem (weights: --enc_init)")
def chief(pretrained: bool, **overrides: Any) -> Encoder:
    """Wang et al., "A pathology foundation model for cancer diagnosis", 2024; the CTransPath architecture."""
    if pretrained:
        raise _no_weights("chief", "they are not published for download by programs")
    return _pathology("swin_tiny_patch4_window7_224", {"embed_layer": ConvStem} | overrides)


@register_encoder("gigap", "GigaPath, ViT-g/16 (weights: timm hub or --enc_init)")
def gigap(pretrained: bool, **overrides: Any) -> Encoder:
    """Xu et al., "A whole-slide foundation model for digital pathology from real-world data", 2024."""
    if pretrained:
        return _whole("hf-hub:prov-gigapath/prov-gigapath", True, {"dynamic_img_size": True} | overrides)
    giant = {"patch_size": 16, "img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.33334, "embed_dim": 1536}
    giant |= {"depth": 40, "num_heads": 24, "dynamic_img_size": True}
    return _pathology("vit_giant_patch14_dinov2", giant | overrides)


class ConvStem(nn.Module):
    """Patch embedding by three convolutions: (P, 3, H, W) -> (P, H / 4, W / 4, embed_dim).

    Args:
        img_size: H = W in px, or (H, W).
        patch_size: 4.
        in_chans: input channels.
        embed_dim: channels that come out; the convolutions have an eighth and a quarter of them.
        options: ``norm_layer`` is the norm on the channels that come out; what else timm says does not apply.

    Source: Wang et al., "Transformer-based unsupervised contrastive learning for histopathological image
    classification" (CTransPath), 2022.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        **options: Any,
    ) -> None:
        super().__init__()
        if patch_size != 4:
            raise UserError(f"the convolutional stem reduces by 4, not by patch_size {patch_size}")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size, self.patch_size = (height, width), (patch_size, patch_size)
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        for channels in (embed_dim // 8, embed_dim // 4):
            conv = nn.Conv2d(in_chans, channels, kernel_size=3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            in_chans = channels
        self.proj = nn.Sequential(*layers, nn.Conv2d(in_chans, embed_dim, kernel_size=1))
        norm_layer = options.get("norm_layer")
        self.norm = norm_layer(embed_dim) if norm_layer is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def _trunk(timm_name: str, stage: int, pretrained: bool, overrides: dict[str, Any]) -> Encoder:
    """A ResNet up to ``stage``, with global average pooling."""
    options = {"features_only": True, "out_indices": (stage,)} | overrides
    model = _create(timm_name, pretrained, options)
    return Encoder(model, model.feature_info.channels()[-1], *_normalisation(model))


def _whole(timm_name: str, pretrained: bool, overrides: dict[str, Any]) -> Encoder:
    """A timm model without its classifier."""
    model = _create(timm_name, pretrained, {"num_classes": 0} | overrides)
    return Encoder(model, getattr(model, "head_hidden_size", model.num_features), *_normalisation(model))


def _pathology(timm_name: str, options: dict[str, Any]) -> Encoder:
    """A timm architecture, random, whose weights were trained with ImageNet's normalisation constants."""
    model = _create(timm_name, False, {"num_classes": 0} | options)
    return Encoder(model, model.num_features, IMAGENET_MEAN, IMAGENET_STD)


def _normalisation(model: Any) -> tuple[Channels, Channels]:
    config = model.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"])


def _create(timm_name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    """``timm.create_model``; what goes wrong on the way to pretrained weights becomes a UserError."""
    import timm

    if not timm.is_model(timm_name) and not timm_name.startswith("hf-hub:"):
        known = timm.list_models()
        raise UnknownNameError(
            f"timm has no model {timm_name!r} among its {len(known)}; timm.list_models() prints them."
            + did_you_mean(timm_name, known)
        )
    if not pretrained:
        return timm.create_model(timm_name, pretrained=False, **options)
    # timm, its hub client and torch.hub raise a dozen unrelated types on the way to a file.
    try:
        with hub_or_cache():
            return timm.create_model(timm_name, pretrained=True, **options)
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}, {str(error).strip().splitlines()[0]}"
        raise _no_weights(timm_name, reason) from error


def _no_weights(name: str, reason: str) -> UserError:
    return UserError(
        f"encoder {name!r}: its pretrained weights cannot be had ({reason}). "
        f"Pass --enc_init=FILE to load them from a file, or --no_enc_pt to start from random weights."
    )
