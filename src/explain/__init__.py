"""What memory is for: snapshots read, the peak taken apart and drawn."""

from src.memory_plot import COLOURS, figure, save_plot
from src.snapshot import (
    CATEGORIES,
    GATHER,
    LOSS_MODULE,
    OWNER,
    PEAK,
    PHASE,
    REDUCE,
    Timeline,
    breakdown_table,
    read,
    save,
    timeline,
)
