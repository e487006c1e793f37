"""NKAT-Ray: two-stage tuning of a small vision transformer on Ray.

Importing the package loads neither torch nor Ray, so that a command line can refuse bad input at once.
"""

__version__ = "0.1.0"
