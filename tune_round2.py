"""Round-2: tune NKAT-ViT on CIFAR-10, evaluate the survivors on four datasets, report.

python tune_round2.py --preset quick
"""

import sys

from nkat_ray.cli import tune

if __name__ == "__main__":
    sys.exit(tune(sys.argv[1:]))
