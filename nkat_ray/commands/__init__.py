"""The commands of `nkat` other than `tune`, a file each; cli.py calls them."""
