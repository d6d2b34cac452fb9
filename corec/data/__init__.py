"""Stage 01: read a data source and write its tables, with the split and the windows.

All sources give the same tables (see :mod:`corec.data.tables`), so later stages do not depend on the source. :func:`prepare`
makes all tables.
"""

from corec.data.preparation import category_tags, fill_categories, prepare, tagger_quality
from corec.data.sources import SOURCES, find_source, source_files
from corec.data.split import describe_items, k_core, make_windows, split_by_time
from corec.data.summary import brand_effect, buckets, card, coverage
from corec.data.tables import Raw, Tables, complete, load, save

__all__ = [
    "SOURCES",
    "Raw",
    "Tables",
    "brand_effect",
    "buckets",
    "card",
    "category_tags",
    "complete",
    "coverage",
    "describe_items",
    "fill_categories",
    "find_source",
    "k_core",
    "load",
    "make_windows",
    "prepare",
    "save",
    "source_files",
    "split_by_time",
    "tagger_quality",
]
