"""Stage 03: attributes as control values, candidate pools, requests and control scores."""

from corec.controls.incomplete import corrupt, hide, without
from corec.controls.pools import (
    Pools,
    Prepared,
    Vocabulary,
    build_vocabulary,
    control_scores,
    draw_requests,
    make_pools,
    matches,
    place_of,
    pool_coverage,
    prepare,
    standardise,
    wanted,
)
from corec.controls.storage import load, save, to_dataset

__all__ = [
    "Pools",
    "Prepared",
    "Vocabulary",
    "build_vocabulary",
    "control_scores",
    "corrupt",
    "draw_requests",
    "hide",
    "load",
    "make_pools",
    "matches",
    "place_of",
    "pool_coverage",
    "prepare",
    "save",
    "standardise",
    "to_dataset",
    "wanted",
    "without",
]
