"""Present a run: on the terminal during and after it, in TensorBoard, and as a page.

Everything here reads results only. Importing it loads neither torch nor Ray.
"""
