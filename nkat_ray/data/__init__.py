"""Datasets as uint8 arrays: found, checked, decoded, split. Knows nothing of models or Ray, and loads no torch.

`open_dataset` finds and checks one (sources.py has the order, folder.py the rules); `Dataset.load` decodes it.
"""

from nkat_ray.data.catalogue import DatasetRow, dataset_table, fetch, verify
from nkat_ray.data.dataset import DataError, Dataset, Missing, Split, SplitName
from nkat_ray.data.image_folder import ImportSummary, import_folder
from nkat_ray.data.sources import open_dataset
from nkat_ray.data.splits import split_validation, stratified_subset

__all__ = [
    "DataError",
    "Dataset",
    "DatasetRow",
    "ImportSummary",
    "Missing",
    "Split",
    "SplitName",
    "dataset_table",
    "fetch",
    "import_folder",
    "open_dataset",
    "split_validation",
    "stratified_subset",
    "verify",
]
