"""The table of MIL heads: every name that ``--model`` accepts after ``e2e_<encoder>_`` or alone.

A head is ``head(x, mask=None, *, pos=None) -> logits``: x (B, N, D) or (N, D), mask (B, N) True where there
is a patch, pos (B, N, 2) grid columns and rows. What a head may have besides:

* ``attention(x, mask=None, pos=None)``: weights (B, heads, N) that sum to 1 over the patches; read it through
  ``attention_weights(head, x, mask, pos)``, which also knows ABMILX.
* ``loss_weights`` (main, auxiliary) and ``forward_with_aux(x, mask, target, criterion) -> (logits, aux)``:
  the training loss is main * criterion(logits, target) + auxiliary * aux.

Builders import their module when they are called, so that one head's fault cannot stop another.
"""

from __future__ import annotations

from torch import Tensor, nn

from modules.layers import StemOptions
from modules.registry import mils, register_mil
from utils.config import ModelConfig
from utils.errors import UserError


def build_mil(name: str, input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    """The head registered under ``name``; raises UnknownNameError, or UserError for an unfit option."""
    if input_dim < 1 or n_classes < 1:
        raise UserError(f"{name}: input_dim {input_dim} and n_classes {n_classes} must both be at least 1")
    if options.inner_dim < 1 or not 0 <= options.dropout < 1:
        raise UserError(
            f"{name}: inner_dim is {options.inner_dim} and dropout {options.dropout}; inner_dim must be at least 1, "
            "and dropout from 0 to below 1"
        )
    head = mils.get(name)
    try:
        return head.build(input_dim, n_classes, options)
    except ValueError as error:  # of heads that other programs use, which know nothing of this one
        raise UserError(f"{name}: {error}") from error


def attention_weights(head: nn.Module, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
    """The attention (B, heads, N) of any head that has one, summing to 1 over the patches.

    ``DAttentionX`` keeps a layer under the name ``attention``, as its published weights do, so it is asked
    through ``return_attn`` instead. Raises UserError for a head without attention.
    """
    method = getattr(head, "attention", None)
    if isinstance(method, nn.Module):
        return head(x, mask, return_attn=True)[1]
    if method is None:
        raise UserError(f"{type(head).__name__} has no attention over patches; choose another head for heat maps")
    return method(x, mask, pos)


def stem_options(options: ModelConfig) -> StemOptions:
    """The input projection that the options describe; ``mil_norm`` 'none' means None."""
    return StemOptions(
        inner_dim=options.inner_dim,
        act=options.act,
        dropout=options.dropout,
        norm=None if options.mil_norm == "none" else options.mil_norm,
        bias=options.mil_bias,
    )


@register_mil("abmil", "attention pooling (Ilse 2018)")
def abmil(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.abmil import ABMIL

    return ABMIL(input_dim, n_classes, stem_options(options))


@register_mil("gabmil", "gated attention pooling, hidden width 384 (Ilse 2018)")
def gabmil(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.abmil import ABMIL

    return ABMIL(input_dim, n_classes, stem_options(options), hidden=384, gated=True)


@register_mil("abmilx", "multi-head attention pooling with attention plus (Tang 2025)")
def abmilx(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.abmilx import DAttentionX

    return DAttentionX(
        input_dim,
        n_classes,
        dropout=options.dropout,
        act=options.act,
        mil_norm=stem_options(options).norm,
        mil_bias=options.mil_bias,
        inner_dim=options.inner_dim,
        n_heads=options.n_heads,
        D=options.abx_D,
        attn_bias=options.abx_attn_bias,
        attn_plus=options.abx_attn_plus,
        ffn=options.ffn,
        sdpa_type=options.sdpa_type,
        attn_plus_embed_new=options.abx_attn_plus_embed_new,
        alpha_init=options.abx_alpha_init,
    )


@register_mil("clam_sb", "gated attention with instance clustering, one branch (CLAM, Lu 2021)")
def clam_sb(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.clam import CLAM

    return CLAM(input_dim, n_classes, stem_options(options), multi_branch=False)


@register_mil("clam_mb", "gated attention with instance clustering, a branch per class (CLAM, Lu 2021)")
def clam_mb(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.clam import CLAM

    return CLAM(input_dim, n_classes, stem_options(options), multi_branch=True)


@register_mil("transmil", "Nystrom attention with convolutional positions (Shao 2021)")
def transmil(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.transmil import TransMIL

    return TransMIL(input_dim, n_classes, stem_options(options), n_heads=options.n_heads)


@register_mil("dsmil", "critical patch and attention by likeness to it (Li 2021)")
def dsmil(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.dsmil import DSMIL

    return DSMIL(input_dim, n_classes, stem_options(options))


@register_mil("dtfd", "two tiers of gated attention over pseudo-bags (Zhang 2022)")
def dtfd(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.dtfd import DTFD

    return DTFD(input_dim, n_classes, stem_options(options))


@register_mil("rrtmil", "regional transformer re-embedding, attention pooling (Tang 2024)")
def rrtmil(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.rrt import RRTMIL, RRTOptions

    sizes = RRTOptions(
        n_heads=options.rrt_n_heads,
        n_layers=options.rrt_n_layers,
        region_num=options.region_num,
        epeg_k=options.epeg_k,
        crmsa_k=options.crmsa_k,
    )
    return RRTMIL(input_dim, n_classes, stem_options(options), sizes)


@register_mil("vitmil", "self-attention layers with a class token (Dosovitskiy 2021)")
def vitmil(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.vitmil import ViTMIL, ViTOptions

    sizes = ViTOptions(
        n_heads=options.n_heads,
        n_layers=options.n_layers,
        pool=options.pool,
        pos=options.pos,
        attn_dropout=options.attn_dropout,
        ffn=options.ffn,
        ffn_ratio=options.ffn_ratio,
        ffn_dropout=options.ffn_dp,
    )
    return ViTMIL(input_dim, n_classes, stem_options(options), sizes)


@register_mil("qamil", "multi-head attention pooling by one learnt query (Lee 2019)")
def qamil(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.qamil import QAMIL

    return QAMIL(
        input_dim,
        n_classes,
        stem_options(options),
        n_heads=options.n_heads,
        attn_dropout=options.attn_dropout,
    )


@register_mil("wikg", "attention over a graph of nearest patches (Li 2024)")
def wikg(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.wikg import WiKG

    return WiKG(input_dim, n_classes, stem_options(options))


@register_mil("chief", "gated attention with a site embedding (Wang 2024)")
def chief(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.chief import CHIEF

    return CHIEF(input_dim, n_classes, stem_options(options))


@register_mil("gigap", "LongNet slide encoder; published size: 12 layers, 16 heads, inner_dim 768 (Xu 2024)")
def gigap(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.gigap import GigaPathMIL, LongNetOptions

    sizes = LongNetOptions(
        n_heads=options.n_heads, n_layers=options.n_layers, ffn_ratio=options.ffn_ratio, pos=options.pos
    )
    return GigaPathMIL(input_dim, n_classes, stem_options(options), sizes)


@register_mil("2dmamba", "state space scan over the patch grid, attention pooling (Zhang 2025)")
def mamba2d(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.mamba2d import Mamba2DMIL

    return Mamba2DMIL(input_dim, n_classes, stem_options(options))


@register_mil("meanmil", "mean of patch logits")
def meanmil(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.pooling import InstancePooling

    return InstancePooling(input_dim, n_classes, stem_options(options), maximum=False)


@register_mil("maxmil", "maximum of patch logits")
def maxmil(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.pooling import InstancePooling

    return InstancePooling(input_dim, n_classes, stem_options(options), maximum=True)


@register_mil("meanP", "mean of features and one linear layer")
def mean_p(input_dim: int, n_classes: int, options: ModelConfig) -> nn.Module:
    from modules.pooling import FeatureMean

    return FeatureMean(input_dim, n_classes, stem_options(options))
