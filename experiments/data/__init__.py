"""Images: from a name and a folder to a training, a holdout and a test split.

`sources.py` says what each name means; `tree.py` and `cifar.py` read the disk, `cache.py` keeps what was
decoded; `splits.py` divides; `memory.py` and `streamed.py` give batches, and share `batching.py`.
"""

from .batching import complete_batches
from .in_memory import Images
from .sources import load
from .splits import Splits
from .streamed import Folder

__all__ = ["Folder", "Images", "Splits", "complete_batches", "load"]
