"""Round-2: tune NKAT-ViT on CIFAR-10, evaluate the survivors on four datasets, report.

python tune_round2.py --preset quick
"""

import sys

if __name__ == "__main__":
    try:
        from nkat_ray.cli import tune
    except KeyboardInterrupt:  # so early that `tune`, which ends in order, is not loaded yet
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(tune(sys.argv[1:]))
