"""Training in plain PyTorch: augmentation, optimizer, loop and checkpoints; knows nothing of Ray."""
