"""Find, check, decode and split datasets, as uint8 arrays. This package uses neither models nor Ray nor torch.

`open_dataset` finds and checks a dataset (sources.py has the order of sources, layouts.py the layouts of a folder,
folder.py the rules); `Dataset.load` decodes it.
"""

from nkat_ray.data.catalogue import DatasetRow, dataset_table, fetch, verify
from nkat_ray.data.dataset import DataError, Dataset, Missing, Split, SplitName
from nkat_ray.data.importer import ImportSummary, import_folder
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
