"""The patch store: JPEG patches of many slides in LMDB files (FORMAT.md describes the format)."""

from datasets.store.layout import SlideInfo, StoreHeader
from datasets.store.reader import PatchStore
from datasets.store.writer import StoreWriter

__all__ = ["PatchStore", "SlideInfo", "StoreHeader", "StoreWriter"]
