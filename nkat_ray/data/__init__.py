"""Datasets as uint8 arrays: found, checked, decoded, split. Knows nothing of models or Ray, and loads no torch.

`open_dataset` finds and checks one (sources.py has the order); `Dataset.load` decodes it.
"""

from nkat_ray.data.dataset import DataError, Dataset, Missing, Split, SplitName
from nkat_ray.data.sources import open_dataset
from nkat_ray.data.splits import split_validation, stratified_subset

__all__ = [
    "DataError", "Dataset", "Missing", "Split", "SplitName", "open_dataset", "split_validation", "stratified_subset",
]
