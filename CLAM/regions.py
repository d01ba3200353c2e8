"""Tissue given from outside (mask images, GeoJSON) and contours written as GeoJSON, as QuPath reads and writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from grid import Region
from PIL import Image
from tissue import Tissue

from utils.errors import UserError, did_you_mean
from utils.files import write_text

MASK_SUFFIXES = (".geojson", ".json", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
ASPECT_TOLERANCE = 0.02
"""A mask whose proportions differ by more than 2 % from the slide's belongs to another slide or another crop."""

MAX_MASK_PX = 400_000_000
MAX_COORDINATE = 2**30
"""Far beyond any slide, and exact in the contour tests."""


def find_own_mask(folder: Path, name: str) -> Path:
    """The mask of a slide: ``<name>`` with one of ``MASK_SUFFIXES``.

    Raises:
        UserError: there is none.
    """
    for suffix in MASK_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    known = sorted(p.stem for p in folder.iterdir() if p.suffix.lower() in MASK_SUFFIXES)
    raise UserError(
        f"--masks {folder} holds no {name} with a suffix of {', '.join(MASK_SUFFIXES)}." + did_you_mean(name, known)
    )


def read_own_regions(path: Path, slide_px: tuple[int, int]) -> Tissue:
    """The tissue that a mask image (non-zero is tissue) or a GeoJSON (level-0 px) gives. Nothing is filtered out.

    Raises:
        UserError: the file cannot be read or does not fit the slide.
    """
    regions = _read_geojson(path) if path.suffix.lower() in (".geojson", ".json") else _read_mask(path, slide_px)
    area = sum(_area(r.outline) - sum(_area(h) for h in r.holes) for r in regions)
    hint = "" if regions else f"the mask {path.name} is empty"
    return Tissue(tuple(regions), area / (slide_px[0] * slide_px[1]), hint, len(regions))


def _area(contour: npt.NDArray[np.integer]) -> float:
    return float(cv2.contourArea(contour.astype(np.float32).reshape(-1, 1, 2)))


def _read_mask(path: Path, slide_px: tuple[int, int]) -> list[Region]:
    try:
        with Image.open(path) as image:
            if image.size[0] * image.size[1] > MAX_MASK_PX:
                raise UserError(f"{path}: {image.size[0]} x {image.size[1]} px; the limit is {MAX_MASK_PX} px.")
            mask = np.array(image.convert("L")) > 0
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a mask: {error}") from error
    scale = (slide_px[0] / mask.shape[1], slide_px[1] / mask.shape[0])
    if abs(scale[0] / scale[1] - 1) > ASPECT_TOLERANCE:
        raise UserError(
            f"{path}: the mask is {mask.shape[1]} x {mask.shape[0]} px and the slide {slide_px[0]} "
            f"x {slide_px[1]}; "
            f"their proportions may differ by {ASPECT_TOLERANCE:.0%}. Is it another slide's mask?"
        )
    contours, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return _nested(contours, np.asarray(hierarchy, np.int32)[0, :, 3], scale) if contours else []


def _nested(contours: Sequence[Any], parents: npt.NDArray[np.int32], scale: tuple[float, float]) -> list[Region]:
    scaled = [(c.reshape(-1, 2) * np.array(scale)).astype(np.int32) for c in contours]
    children: dict[int, list[Any]] = {}
    for contour, parent in zip(scaled, parents, strict=True):
        children.setdefault(int(parent), []).append(contour)
    return [Region(scaled[i], tuple(children.get(int(i), ()))) for i in np.flatnonzero(parents == -1)]


def _read_geojson(path: Path) -> list[Region]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        regions = [_region(rings) for rings in _polygons(value)]
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: is not GeoJSON with polygons: {error}") from error
    return [r for r in regions if len(r.outline) >= 3]


def _polygons(value: Any) -> Iterator[list[Any]]:
    """The polygons in any GeoJSON object, each a list of rings."""
    if isinstance(value, list):
        for item in value:
            yield from _polygons(item)
        return
    kind = value["type"]
    if kind == "FeatureCollection":
        yield from _polygons(value["features"])
    elif kind == "Feature":
        yield from _polygons(value["geometry"])
    elif kind == "GeometryCollection":
        yield from _polygons(value["geometries"])
    elif kind == "Polygon":
        yield value["coordinates"]
    elif kind == "MultiPolygon":
        yield from value["coordinates"]


def _region(rings: list[Any]) -> Region:
    # GeoJSON repeats the first vertex at the end of a ring.
    outline, *holes = (_vertices(ring[:-1]) for ring in rings)
    return Region(outline, tuple(holes))


def _vertices(ring: list[Any]) -> npt.NDArray[np.int32]:
    points = np.rint(np.asarray(ring, float).reshape(len(ring), -1)[:, :2])
    if not (np.abs(points) < MAX_COORDINATE).all():
        raise ValueError(f"a coordinate is not a number below {MAX_COORDINATE}")
    return points.astype(np.int32)


def write_geojson(path: Path, regions: Sequence[Region]) -> None:
    """Writes contours and holes as QuPath annotations, in level-0 px."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [_ring(r.outline), *(_ring(h) for h in r.holes)]},
            "properties": {
                "objectType": "annotation",
                "name": f"tissue {index}",
                "classification": {"name": "Tissue", "color": [0, 200, 0]},
            },
        }
        for index, r in enumerate(regions)
    ]
    write_text(path, json.dumps({"type": "FeatureCollection", "features": features}))


def _ring(contour: npt.NDArray[np.integer]) -> list[list[int]]:
    points = contour.tolist()
    return [*points, points[0]]
