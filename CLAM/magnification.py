"""From what a user asks (a level, um/px, a magnification) to what is read from one slide. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from utils.errors import UserError

MPP_TOLERANCE = 0.01
"""A level within 1 % of the requested um/px is read as it is: resizing 257 px to 256 would only blur."""

MPP_TIMES_MAGNIFICATION = 10.0
"""The usual convention: 20x is 0.5 um/px, 40x is 0.25."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asks for. Sizes are px of the patch as stored (after resizing)."""

    patch_size_px: int = 256
    step_size_px: int = 256
    patch_level: int = 0
    mpp: float | None = None
    magnification: float | None = None
    published_step: bool = False

    @property
    def requested_mpp(self) -> float | None:
        """The requested um/px, also where a magnification was given."""
        return MPP_TIMES_MAGNIFICATION / self.magnification if self.magnification else self.mpp


@dataclass(frozen=True, kw_only=True)
class Optics:
    """What is known of a slide's geometry and scale."""

    level_dimensions: tuple[tuple[int, int], ...]
    mpp: float | None = None
    mpp_source: str | None = None
    objective_power: float | None = None

    def downsample(self, level: int) -> tuple[float, float]:
        """(W0 / Wl, H0 / Hl)."""
        (width, height), (w, h) = self.level_dimensions[0], self.level_dimensions[level]
        return width / w, height / h


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is read: the level, the edge read there, the edge stored, and both grids in level-0 px per axis."""

    level: int
    read_size_px: int
    target_size_px: int
    patch_px: tuple[int, int]
    step_px: tuple[int, int]
    level0_mpp: float | None
    mpp_source: str | None
    resolved_mpp: float | None


def nominal_downsample(size0_px: int, size_px: int) -> float:
    """The factor by which a level was reduced along one axis.

    Sizes of levels are whole numbers, so W0 / Wl misses a reduction by n slightly: 4443 / 2221 = 2.0005.
    Where Wl is W0 / n rounded down or up, the factor is n. Otherwise it is the ratio itself.
    """
    n = round(size0_px / size_px)
    if n >= 1 and size_px in (size0_px // n, -(-size0_px // n)):
        return float(n)
    return size0_px / size_px


def level_factors(optics: Optics, level: int, published: bool) -> tuple[float, float]:
    """Level-0 px per px of a level, for patches and steps.

    Published: the ratio of sizes truncated to a whole number, so that 3.99 becomes 3 and the patches overlap.
    """
    if published:
        x, y = optics.downsample(level)
        return float(int(x)), float(int(y))
    (width, height), (w, h) = optics.level_dimensions[0], optics.level_dimensions[level]
    return nominal_downsample(width, w), nominal_downsample(height, h)


def plan(optics: Optics, request: Request) -> Plan:
    """Resolves a request for one slide.

    Raises:
        UserError: the slide has no such level, its um/px is unknown, or it is coarser than what is asked for.
    """
    if request.requested_mpp is None:
        return _plan_level(optics, request)
    return _plan_mpp(optics, request, request.requested_mpp)


def _plan_level(optics: Optics, request: Request) -> Plan:
    level = request.patch_level
    if not 0 <= level < len(optics.level_dimensions):
        raise UserError(
            f"there is no level {level}: the slide has levels 0 to {len(optics.level_dimensions) - 1}; "
            "lower --patch_level or give --mpp"
        )
    factors = level_factors(optics, level, request.published_step)
    resolved = optics.mpp * factors[0] if optics.mpp else None
    return Plan(
        level=level,
        read_size_px=request.patch_size_px,
        target_size_px=request.patch_size_px,
        patch_px=_scaled(request.patch_size_px, factors),
        step_px=_scaled(request.step_size_px, factors),
        level0_mpp=optics.mpp,
        mpp_source=optics.mpp_source,
        resolved_mpp=resolved,
    )


def _plan_mpp(optics: Optics, request: Request, wanted_mpp: float) -> Plan:
    mpp, source = known_mpp(optics, request)
    if mpp > wanted_mpp * (1 + MPP_TOLERANCE):
        raise UserError(
            f"its finest level has {mpp:.4g} um/px ({source}), coarser than the {wanted_mpp:.4g} asked for; "
            "ask for a larger --mpp (a lower --magnification)"
        )
    factors = [level_factors(optics, i, False) for i in range(len(optics.level_dimensions))]
    level = max(i for i, f in enumerate(factors) if mpp * min(f) <= wanted_mpp * (1 + MPP_TOLERANCE))
    ratio = wanted_mpp / (mpp * sum(factors[level]) / 2)
    if abs(ratio - 1) <= MPP_TOLERANCE:
        ratio = 1.0
    read = round(request.patch_size_px * ratio)
    patch = _scaled(read, factors[level])
    # Steps follow the patch as read, so that step = patch tiles without gap or overlap after rounding.
    stride = request.step_size_px / request.patch_size_px
    return Plan(
        level=level,
        read_size_px=read,
        target_size_px=request.patch_size_px,
        patch_px=patch,
        step_px=(max(1, round(patch[0] * stride)), max(1, round(patch[1] * stride))),
        level0_mpp=mpp,
        mpp_source=source,
        resolved_mpp=mpp * factors[level][0] * read / request.patch_size_px,
    )


def known_mpp(optics: Optics, request: Request) -> tuple[float, str]:
    """The um/px of level 0 and where it is from.

    Objective power alone is only used against a requested magnification, where both sides are nominal.

    Raises:
        UserError: it is not known.
    """
    if optics.mpp:
        return optics.mpp, optics.mpp_source or "given"
    if request.magnification and optics.objective_power:
        return MPP_TIMES_MAGNIFICATION / optics.objective_power, "objective power"
    power = f" (only an objective power of {optics.objective_power:g})" if optics.objective_power else ""
    raise UserError(f"the file does not say its um/px{power}; give it with --mpp_csv, or use --patch_level")


def _scaled(size_px: int, factors: tuple[float, float]) -> tuple[int, int]:
    return max(1, round(size_px * factors[0])), max(1, round(size_px * factors[1]))
