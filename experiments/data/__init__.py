"""Data sets: a name and a folder become a training, a holdout and a test split.

`sources.py` knows the data sets by name and divides them, `image_folder.py` reads pictures from disk. A split gives
batches from memory (`in_memory.py`) or from disk (`streamed.py`); `batching.py` has what both share.
"""

from .batching import complete_batches
from .in_memory import Images
from .sources import Splits, load
from .streamed import Folder

__all__ = ["Folder", "Images", "Splits", "complete_batches", "load"]
