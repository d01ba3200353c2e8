"""cohort.html: every slide on one self-contained page, suspicious ones first."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from process_list import Row
from suspicion import Flag, flags_of

from utils.files import write_text

THUMBNAIL_PX = 300
MOST_THUMBNAILS = 2000
"""About 15 kB each: 30 MB, which browsers still open. Further slides are listed without a picture."""

STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:24px;color:#1d2330;background:#f5f6f8}
h1{font-size:20px;margin:0 0 4px}
p{margin:4px 0 16px;color:#566}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(260px,1fr));gap:14px}
article{background:#fff;border:1px solid #dde1e7;border-radius:8px;overflow:hidden}
article.bad{border:2px solid #c62f2f}
article.odd{border:2px solid #d69a1e}
.pic{height:220px;background:#e9ecf0;display:flex;align-items:center;justify-content:center;color:#78808c}
.pic img{max-width:100%;max-height:220px}
.text{padding:10px 12px}
h2{font-size:13px;margin:0 0 6px;overflow-wrap:anywhere}
.flag{display:inline-block;border-radius:4px;padding:1px 7px;margin:0 4px 4px 0;font-size:12px;background:#fbeccc}
.flag.bad{background:#f7d3d3}
dl{display:grid;grid-template-columns:auto 1fr;gap:1px 10px;margin:4px 0}
dt{color:#6a7380}
dd{margin:0}
.why{color:#a02020;margin:6px 0 0}
"""


def write_cohort_page(save_dir: Path, rows: Sequence[Row], name: str = "cohort.html") -> Path:
    """Writes the page for the slides of a list; pictures come from ``masks/``. Returns its path."""
    flags = flags_of(rows)
    order = sorted(range(len(rows)), key=lambda i: (-sum(f.weight for f in flags[i]), rows[i].slide_id))
    cards = [_card(save_dir, rows[i], flags[i], place < MOST_THUMBNAILS) for place, i in enumerate(order)]
    title = f"{len(rows)} slides"
    text = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><p>{escape(_summary(rows, flags))}</p><main>{''.join(cards)}</main></html>\n"
    )
    path = save_dir / name
    write_text(path, text)
    return path


def _summary(rows: Sequence[Row], flags: Sequence[Sequence[Flag]]) -> str:
    statuses = ", ".join(f"{n} {status}" for status, n in Counter(r.status for r in rows).most_common())
    patches = sum(int(float(r.facts.get("patches") or 0)) for r in rows)
    doubtful = sum(any(f.weight >= 20 for f in found) for found in flags)
    return f"{statuses}; {patches:,} patches; {doubtful} worth a look, shown first."


def _card(save_dir: Path, row: Row, flags: Sequence[Flag], with_picture: bool) -> str:
    worst = max((f.weight for f in flags), default=0)
    kind = "bad" if worst >= 90 else "odd" if worst >= 20 else ""
    badges = "".join(f"<span class='flag {'bad' if f.weight >= 90 else ''}'>{escape(f.text)}</span>" for f in flags)
    reason = row.facts.get("reason")
    why = f"<p class='why'>{escape(str(reason))}</p>" if reason else ""
    facts = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in _facts(row))
    return (
        f"<article class='{kind}'>{_picture(save_dir, row, with_picture)}<div class='text'>"
        f"<h2>{escape(row.slide_id)}</h2>{badges}<dl>{facts}</dl>{why}</div></article>"
    )


def _facts(row: Row) -> list[tuple[str, str]]:
    """Names and values shown below a slide's picture."""
    get = row.facts.get
    shown = [("patches", str(get("patches") or 0))]
    if get("contours") not in (None, ""):
        shown.append(("tissue", f"{float(get('tissue_fraction') or 0):.1%} in {_plural(get('contours'), 'piece')}"))
    if get("width"):
        shown.append(("size", f"{get('width')} x {get('height')} px, {_plural(get('levels'), 'level')}"))
        mpp = get("level0_mpp")
        shown.append(("um/px", f"{float(mpp):.4g} ({get('mpp_source')})" if mpp else "unknown"))
    if get("resolved_mpp"):
        shown.append(("patch um/px", f"{float(get('resolved_mpp') or 0):.4g}"))
    return shown


def _plural(number: object, noun: str) -> str:
    return f"{number} {noun}" if str(number) == "1" else f"{number} {noun}s"


def _picture(save_dir: Path, row: Row, embed: bool) -> str:
    name = f"{Path(row.slide_id).stem}.jpg"
    path = save_dir / "masks" / name
    if not embed or not path.is_file():
        return f"<div class='pic'>{'no picture' if embed else 'picture in masks/'}</div>"
    link = "stitches" if (save_dir / "stitches" / name).is_file() else "masks"
    return (
        f"<a class='pic' href='{link}/{quote(name)}'><img alt='' loading='lazy' "
        f"src='data:image/jpeg;base64,{_thumbnail(path)}'></a>"
    )


def _thumbnail(path: Path) -> str:
    with Image.open(path) as image:
        image.draft("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=75)
    return base64.b64encode(buffer.getvalue()).decode()
