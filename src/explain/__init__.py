"""What a memory snapshot shows: who took the GPU's memory, what for, and when.

`python -m src.explain FILE [FILE2]` reads snapshots of any PyTorch program. Only recording.py needs torch.
"""

from src.explain.categories import CATEGORIES, COLOURS, GATHER, LOSS_MODULE, OWNER, PEAK, PHASE, REDUCE
from src.explain.reading import read, save
from src.explain.report import breakdown_table, waterfall
from src.explain.timeline import Timeline, timeline

__all__ = [
    "CATEGORIES",
    "COLOURS",
    "GATHER",
    "LOSS_MODULE",
    "OWNER",
    "PEAK",
    "PHASE",
    "REDUCE",
    "Timeline",
    "breakdown_table",
    "read",
    "save",
    "timeline",
    "waterfall",
]
