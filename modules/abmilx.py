"""ABMILX: multi-head attention pooling of a bag, its scores refined by attention plus (A+).

Paper: Tang et al., "Revisiting End-to-End Learning with Slide-level Supervision in Computational Pathology",
NeurIPS 2025, https://arxiv.org/abs/2506.02408, Equations 3 and 4. Needs torch and the standard library alone.

With heads j = 1..m, the contiguous slices H^j of the projected features, and raw scores A^j = MLP(H^j):

    U^j    = softmax_rows(Q^j K^jT * scale)             Q^j, K^j linear in LayerNorm(H^j)
    G(A^j) = A^j + alpha U^j A^j                         attention plus, Equation 4
    Z      = concat_j(softmax(G(A^j))^T H^j)             Equation 3
    logits = classifier(norm(ffn(proj(Z))))

U^j A^j is attention whose V has one channel, so fused kernels compute it without the N x N matrix U^j: memory
grows linearly with N in training and in evaluation.

Shapes: B bags, N instances, C input width, E = ``inner_dim``, m heads of width d = E // m, K classes.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ALPHA_INIT = 1.0
"""Start of alpha: the value of the paper's fixed-alpha row (docs/decisions/abmilx-alpha-init.md)."""

ACTIVATIONS: dict[str, Callable[[], nn.Module] | None] = {"gelu": nn.GELU, "relu": nn.ReLU, "none": None}
KERNELS = ("torch", "flash", "memo_effi", "math", "torch_math")

_FUSED_ALIGNMENT = 8  # fused CUDA kernels read head widths in multiples of eight numbers
_FLASH_WIDEST = 256  # the widest head of the flash kernel
_HALF = (torch.float16, torch.bfloat16)
_BACKENDS = {
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
    "memo_effi": [SDPBackend.EFFICIENT_ATTENTION],
}


def propagate(qk: Tensor, v: Tensor, mask: Tensor | None, scale: float, kernel: str = "torch") -> Tensor:
    """``softmax_rows(q k^T * scale) v`` with one number v per instance: the product U A of Equation 4.

    Args:
        qk: (B, N, m, 2, d), Q at index 0 and K at index 1.
        v: (B, m, N).
        mask: (B, N), True where there is an instance, or None: all are there. Absent instances get no weight.
        scale: factor on q k^T, positive.
        kernel: one of ``KERNELS``; "math" and "torch_math" build the N x N matrix, the others do not.

    Returns:
        (B, m, N), in float32 or wider.
    """
    if kernel == "torch" and qk.is_cuda and qk.dtype in _HALF and (widest := _own_kernel_width()):
        width = max(16, 1 << (qk.shape[-1] - 1).bit_length())
        if width <= widest:
            mask = None if mask is None else mask.contiguous()
            return torch.ops.abmilx.attention_plus(_widen(qk, width), v.float().contiguous(), mask, scale)[0]
    q, k = (t.transpose(1, 2) for t in qk.unbind(3))
    keys = None if mask is None else mask[:, None, None, :]
    attend = _plain if kernel in ("math", "torch_math") else _fused
    out = attend((q, k, v.unsqueeze(-1).to(q.dtype)), keys, scale, kernel)
    return out[..., 0].to(torch.promote_types(out.dtype, torch.float32))


@torch.compiler.assume_constant_result
def _own_kernel_width() -> int:
    """The widest head that the Triton kernels for a V of one channel take; 0 where they cannot run."""
    return _import_own_kernel()


@functools.cache
def _import_own_kernel() -> int:
    """Registers the operator ``abmilx::attention_plus`` by importing its file."""
    devices = range(torch.cuda.device_count())
    if torch.version.cuda is None or any(torch.cuda.get_device_capability(i) < (8, 0) for i in devices):
        return 0
    try:
        module = importlib.import_module(f"{__package__ or 'modules'}.attention_plus_triton")
    except ImportError:  # this file was copied alone, or Triton is not installed
        return 0
    return max(module.PLANS)


def _plain(qkv: tuple[Tensor, Tensor, Tensor], keys: Tensor | None, scale: float, kernel: str) -> Tensor:
    """The published form, with the (B, m, N, N) matrix in memory."""
    q, k, v = qkv
    logits = (q @ k.transpose(-2, -1)) * scale
    if keys is not None:
        logits = logits.masked_fill(~keys, float("-inf"))
    return logits.softmax(dim=-1).to(v.dtype) @ v


def _fused(qkv: tuple[Tensor, Tensor, Tensor], keys: Tensor | None, scale: float, kernel: str) -> Tensor:
    """Torch's fused attention, on heads widened with zeros (no value changes) to what its kernels take."""
    q, k, v = qkv
    width = q.shape[-1]
    if q.is_cuda:
        width = -(-width // _FUSED_ALIGNMENT) * _FUSED_ALIGNMENT
        q, k = _widen(q, width), _widen(k, width)
        # Flash wants V as wide as Q, half precision and no mask; the memory-efficient kernel does not.
        flash = q.dtype in _HALF and keys is None and width <= _FLASH_WIDEST and kernel != "memo_effi"
        width = width if flash else _FUSED_ALIGNMENT
    v = _widen(v, width)
    if kernel == "torch" or not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=scale)
    with sdpa_kernel(_BACKENDS[kernel]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=scale)


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


class MLP(nn.Module):
    """Linear -> GELU -> Linear, (..., width) -> (..., outputs): raw scores, and the feed-forward block."""

    def __init__(self, width: int, hidden: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GatedScoreMLP(nn.Module):
    """Raw scores, a GELU branch times a sigmoid branch, both with dropout: (..., width) -> (..., outputs)."""

    def __init__(self, width: int, hidden: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(width, hidden, bias=bias), nn.GELU(), nn.Dropout(0.25))
        self.attention_b = nn.Sequential(nn.Linear(width, hidden, bias=bias), nn.Sigmoid(), nn.Dropout(0.25))
        self.attention_c = nn.Linear(hidden, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention_c(self.attention_a(x) * self.attention_b(x))


class AttentionPlus(nn.Module):
    """A+ of Equation 4: adds to every score alpha times the scores of similar instances.

    Args:
        width: what the LayerNorm and Q, K see: d, one head, or E (``full_width``), all heads at once.
        heads: m.
        kernel: one of ``KERNELS``.
        full_width: Q and K of all heads come from the whole feature (``attn_plus_embed_new``).
    """

    def __init__(self, width: int, heads: int, kernel: str, full_width: bool) -> None:
        super().__init__()
        self.heads, self.kernel, self.full_width = heads, kernel, full_width
        self.scale = width**-0.5
        self.norm_x = nn.LayerNorm(width)
        self.qk = nn.Linear(width, 2 * width, bias=False)
        self.v = nn.Linear(1, 1, bias=False)

    def forward(self, features: Tensor, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features (B, N, E) and raw scores (B, m, N) to refined scores (B, m, N)."""
        v = self.v(scores.unsqueeze(-1)).squeeze(-1)
        return scores + propagate(self._queries_keys(features), v, mask, self.scale, self.kernel)

    def _queries_keys(self, features: Tensor) -> Tensor:
        """(B, N, E) to Q and K, (B, N, m, 2, d)."""
        bags, count, _ = features.shape
        if self.full_width:
            return self.qk(self.norm_x(features)).view(bags, count, 2, self.heads, -1).transpose(2, 3)
        heads = features.view(bags, count, self.heads, -1)
        return self.qk(self.norm_x(heads)).unflatten(-1, (2, -1))


class DAttentionX(nn.Module):
    """ABMILX. The module's docstring has the equations and the letters.

    Args:
        input_dim: C, width of an instance.
        n_classes: K, number of logits.
        dropout: rate after the input projection.
        act: activation after the input projection: "gelu", "relu" or "none".
        mil_norm: "ln" or "bn" normalises the input and the bag feature; None or "none" neither.
        mil_bias: biases in the input projection, norms, output projection, FFN and classifier.
        inner_dim: E, a multiple of ``n_heads``.
        n_heads: m.
        proj_drop: dropout rate after the output projection.
        D: hidden width of the score MLP: above 10 a width, which the heads divide; else a divisor of d.
        attn_type: score MLP, "mlp" or "mlp_gated".
        attn_bias: biases in the score MLP.
        attn_plus: A+ on; off leaves multi-head attention pooling (MHLA).
        ffn: feed-forward block on the bag feature, after a norm of its own.
        sdpa_type: kernel of A+: "torch" picks the best there is, "flash" and "memo_effi" name one ("flash"
            falls back where it cannot run), "math" and "torch_math" build the N x N matrix.
        pad_v: without effect; V is padded wherever a kernel needs it, and the values are the same.
        attn_plus_embed_new: one score MLP on the whole feature gives m scores; Q and K see all of it too.
        alpha_init: start of alpha, or "normal": a draw from N(0, 1) as in the published code.
        ignored: other arguments, which the published class takes; a warning names them.

    Weights of the published code load with ``strict=True`` and compute what they computed there: see
    ``_load_from_state_dict``. Raises ValueError for arguments that do not fit.
    """

    def __init__(
        self,
        input_dim: int,
        n_classes: int,
        dropout: float = 0.25,
        act: str = "gelu",
        mil_norm: str | None = None,
        mil_bias: bool = False,
        inner_dim: int = 512,
        n_heads: int = 8,
        proj_drop: float = 0.0,
        D: float | None = None,
        attn_type: str = "mlp",
        attn_bias: bool = False,
        attn_plus: bool = True,
        ffn: bool = False,
        sdpa_type: str = "torch",
        pad_v: bool = False,
        attn_plus_embed_new: bool = False,
        alpha_init: float | str = ALPHA_INIT,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if ignored:
            names = ", ".join(sorted(ignored))
            warnings.warn(f"DAttentionX goes on without {names}; help(DAttentionX) has its arguments.", stacklevel=2)
        mil_norm = None if mil_norm == "none" else mil_norm
        _one_of("act", act, ACTIVATIONS)
        _one_of("mil_norm", mil_norm or "none", ("ln", "bn", "none"))
        _one_of("attn_type", attn_type, ("mlp", "mlp_gated"))
        _one_of("sdpa_type", sdpa_type, KERNELS)
        if n_heads < 1 or inner_dim % n_heads:
            raise ValueError(f"inner_dim {inner_dim} is not a multiple of n_heads {n_heads}")
        self.input_dim, self.n_heads, self.mil_norm = input_dim, n_heads, mil_norm
        self.full_width = full = attn_plus_embed_new
        self.alpha_init = _alpha(alpha_init)
        norm, activation = _norm(mil_norm, input_dim, mil_bias), ACTIVATIONS[act]
        layers = [norm, nn.Linear(input_dim, inner_dim, bias=mil_bias), activation and activation()]
        self.feature = nn.Sequential(*(layer for layer in layers if layer is not None), nn.Dropout(dropout))
        width = inner_dim if full else inner_dim // n_heads
        scorer = MLP if attn_type == "mlp" else GatedScoreMLP
        outputs = n_heads if full else 1
        self.attention = scorer(width, _hidden_width(width, D, n_heads), outputs, attn_bias)
        self.attn_plus_fn = AttentionPlus(width, n_heads, sdpa_type, full) if attn_plus else None
        self.proj = nn.Linear(inner_dim, inner_dim, bias=mil_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.norm_ffn: nn.Module = nn.LayerNorm(inner_dim, bias=mil_bias) if ffn else nn.Identity()
        self.mlp = MLP(inner_dim, 4 * inner_dim, inner_dim, mil_bias) if ffn else None
        self.norm1: nn.Module = _norm(mil_norm, inner_dim, mil_bias) or nn.Identity()
        self.classifier = nn.Linear(inner_dim, n_classes, bias=mil_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-normal weights, zero biases (the published initialisation), and alpha at ``alpha_init``."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.BatchNorm1d)):
                module.reset_parameters()
        if self.attn_plus_fn is not None and self.alpha_init is not None:
            nn.init.constant_(self.attn_plus_fn.v.weight, self.alpha_init)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        pos: Any = None,
        return_attn: bool = False,
        return_act: bool = False,
        return_img_feat: bool = False,
        **ignored: Any,
    ) -> Any:
        """Logits of bags of instances.

        Args:
            x: (B, N, C), or one bag (N, C).
            mask: (B, N) bool (or (N,)), True where there is an instance; None: everywhere. A masked bag
                computes what the bag cut to its instances computes. A bag without any instance gives NaN.
            pos: not used by this model.
            **ignored: not used either.
            return_attn: also return the attention (B, m, N), which sums to one over N.
            return_act: also return the projected instances (B, N, E).
            return_img_feat: put [logits, bag features (B, E)] in the place of the logits.

        Returns:
            Logits (B, K); with ``return_attn`` or ``return_act`` a tuple of the logits, the attention, the
            instances, in this order.
        """
        x, mask = self._check(x, mask)
        act = self._project(x, mask)
        scores = self._scores(act, mask)
        attention = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)  # (B, m, N)
        bag = self._pool(act, attention)
        logits = self.classifier(bag)
        extras = ([attention] if return_attn else []) + ([act] if return_act else [])
        first = [logits, bag] if return_img_feat else logits
        return (first, *extras) if extras else first

    def _check(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Bags as (B, N, C), zero where the mask is False, so that padding may hold anything, NaN too."""
        x = x.unsqueeze(0) if x.ndim == 2 else x
        if x.ndim != 3 or x.shape[-1] != self.input_dim or x.shape[1] == 0:
            raise ValueError(
                f"the bags have shape {tuple(x.shape)}, but must be (B, N, {self.input_dim}) or "
                f"(N, {self.input_dim}) with N > 0; input_dim says how wide an instance is"
            )
        if mask is None:
            return x, None
        mask = mask.unsqueeze(0) if mask.ndim == 1 else mask
        if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
            needed, given = f"{tuple(x.shape[:2])} and torch.bool", f"{tuple(mask.shape)} and {mask.dtype}"
            raise ValueError(f"the mask is {given}, but must be {needed}, True where there is an instance")
        return x.masked_fill(~mask.unsqueeze(-1), 0.0), mask

    def _project(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, C) -> (B, N, E)."""
        if self.mil_norm != "bn":
            return self.feature(x)
        if mask is None:
            x = _batch_norm(self.feature[0], x.flatten(0, 1)).view_as(x)
        else:
            x = torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), _batch_norm(self.feature[0], x[mask]))
        return self.feature[1:](x)

    def _scores(self, act: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, E) -> refined scores (B, m, N), minus infinity where there is no instance."""
        if self.full_width:
            scores = self.attention(act).transpose(1, 2)
        else:
            scores = self.attention(act.unflatten(-1, (self.n_heads, -1))).squeeze(-1).transpose(1, 2)
        if self.attn_plus_fn is not None:
            scores = self.attn_plus_fn(act, scores, mask)
        return scores if mask is None else scores.masked_fill(~mask[:, None, :], float("-inf"))

    def _pool(self, act: Tensor, attention: Tensor) -> Tensor:
        """Instances (B, N, E) under attention (B, m, N) to bag features (B, E)."""
        heads = act.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, m, N, d)
        bag = attention.unsqueeze(-2).to(heads.dtype) @ heads  # (B, m, 1, d)
        bag = self.proj_drop(self.proj(bag.flatten(1)))
        if self.mlp is not None:
            bag = bag + self.mlp(_batch_norm(self.norm_ffn, bag))
        return _batch_norm(self.norm1, bag)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes the shape of a checkpoint's FFN before loading it.

        The published FFN loses its norm whenever ``mil_norm`` is set, and keeps its biases under
        ``mil_bias=False``. Ours does neither, but weights trained that way must compute what they computed:
        where the checkpoint has an FFN, this module gets the norm and the biases that the checkpoint has.
        """
        if self.mlp is not None and f"{prefix}mlp.fc1.weight" in state_dict:
            like, width = self.classifier.weight, self.classifier.in_features
            bias = f"{prefix}mlp.fc1.bias" in state_dict
            if bias != (self.mlp.fc1.bias is not None):
                self.mlp = MLP(width, 4 * width, width, bias).to(like)
            norm = [name for name in ("weight", "bias") if f"{prefix}norm_ffn.{name}" in state_dict]
            if norm != [name for name, _ in self.norm_ffn.named_parameters()]:
                self.norm_ffn = nn.LayerNorm(width, bias="bias" in norm).to(like) if norm else nn.Identity()
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _one_of(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(map(repr, known))}")


def _alpha(alpha_init: float | str) -> float | None:
    """The constant that alpha starts from; None for a draw from N(0, 1)."""
    if alpha_init == "normal":
        return None
    try:
        return float(alpha_init)
    except ValueError as error:
        raise ValueError(f"alpha_init {alpha_init!r} is neither a number nor 'normal'") from error


def _hidden_width(width: int, divisor: float | None, heads: int) -> int:
    """Hidden width of the score MLP: ``D`` above 10 is absolute, for all heads together, else it divides."""
    if divisor is None:
        return width
    if divisor <= 0:
        raise ValueError(f"D is {divisor}, but must be positive: a width above 10, else a divisor of {width}")
    return max(1, int(divisor // heads) if divisor > 10 else int(width / divisor))


def _norm(kind: str | None, width: int, bias: bool) -> nn.Module | None:
    if kind == "bn":
        return nn.BatchNorm1d(width)
    return nn.LayerNorm(width, bias=bias) if kind == "ln" else None


def _batch_norm(norm: nn.Module, rows: Tensor) -> Tensor:
    """Normalises (R, width); batch statistics need two rows, so a single one takes the running statistics."""
    if isinstance(norm, nn.BatchNorm1d) and norm.training and rows.shape[0] == 1:
        return F.batch_norm(rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return norm(rows)
