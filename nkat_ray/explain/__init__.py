"""Show the attention of a trained network: capture it as numbers, draw it, and put it on a page."""
