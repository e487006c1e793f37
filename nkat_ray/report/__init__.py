"""What a run leaves behind, and how people read it: tables, scores, terminal, TensorBoard, HTML.

Everything here reads results only. Importing it loads neither torch nor Ray.
"""
