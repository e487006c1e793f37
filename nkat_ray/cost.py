"""Estimate what a training costs from its configuration alone: parameters, floating-point operations, memory.

No network is built. The constants of memory were fitted to measured peaks on a CPU (docs/LOG.md), which they match
within 30 % over Round-2's space at batch size 128.
"""

from typing import Final

from nkat_ray.config import IMAGE_SIZE, RunConfig, TrialConfig

GIB: Final = 2**30
STATE_COPIES: Final = 6  # weights, gradients, two moments, the average and one temporary
TOKEN_COPIES: Final = 20  # activations of shape (tokens, embed_dim) that a block keeps for the backward pass
SCORE_COPIES: Final = 6  # activations of shape (heads, tokens, tokens) that it keeps
STEM_COPIES: Final = 8  # activations of shape (64, 16, 16) that the stem keeps
FLOPS_PER_PARAMETER_AND_TOKEN: Final = 6  # forward 2, backward 4
CHECKPOINT_BYTES: Final = 20  # per parameter: weights, two moments and average of the state, and the best weights
STEM_PARAMETERS: Final = {"off": (0, 3), "tiny": (19_584, 64), "small": (223_808, 128)}  # and the channels it returns
CPU_PROCESS_BYTES: Final = 500 * 2**20  # of Python, torch and Ray in one worker, without shared libraries
RECOMPUTE_BYTES: Final = 4 * GIB  # of a step; above it a CPU computes activations twice
GPU_CONTEXT_BYTES: Final = 900 * 2**20  # CUDA context and kernels of a process (854 MiB on an H100)


def parameter_estimate(config: TrialConfig) -> int:
    """Estimate the number of parameters: blocks and embeddings without biases and stem (within 10 % in the spaces)."""
    block = (4 + 2 * config.mlp_ratio) * config.embed_dim**2
    return int(config.depth * block + config.tokens * config.embed_dim)


def stored_parameters(config: TrialConfig) -> int:
    """Estimate the parameters in a file: with stem and patch embedding, which are most of a small network."""
    stem, channels = STEM_PARAMETERS[config.conv_stem]
    return parameter_estimate(config) + stem + channels * config.patch_size**2 * config.embed_dim


def epoch_flops(config: TrialConfig, images: int) -> float:
    """Estimate the floating-point operations of one training epoch: 6 x parameters x tokens x images."""
    return FLOPS_PER_PARAMETER_AND_TOKEN * parameter_estimate(config) * config.tokens * float(images)


def least_epochs(run: RunConfig) -> float:
    """Return the mean number of epochs per trial if 1 / `reduction` of the trials continue at every rung of ASHA."""
    if run.scheduler == "none":
        return float(run.epochs)
    epochs, left, rung = float(run.grace), 1.0, run.grace
    while rung < run.epochs:
        left, following = left / run.reduction, min(rung * run.reduction, run.epochs)
        epochs += left * (following - rung)
        rung = following
    return epochs


def peak_bytes(config: TrialConfig) -> int:
    """Estimate the peak memory of a training step in bytes: the state and the activations of one batch, in float32."""
    return _state_bytes(config) + config.batch_size * (config.depth * _block_bytes(config) + _stem_bytes())


def recomputes(config: TrialConfig) -> bool:
    """Return whether a training on a CPU stores only each block's input and computes the rest again for the gradients.

    The results are the same, and a batch that would need more than 4 GiB need not be split on a small machine. Only the
    configuration decides, so that neither results nor times depend on the machine's memory.
    """
    return peak_bytes(config) > RECOMPUTE_BYTES


def cpu_bytes(config: TrialConfig) -> int:
    """Estimate the memory of a training on a CPU in bytes: its process and the peak of a step, recomputed or not."""
    if not recomputes(config):
        return CPU_PROCESS_BYTES + peak_bytes(config)
    inputs = 4 * config.depth * config.tokens * config.embed_dim
    one_image = inputs + _block_bytes(config) + _stem_bytes()
    return CPU_PROCESS_BYTES + _state_bytes(config) + config.batch_size * one_image


def _state_bytes(config: TrialConfig) -> int:
    return 4 * STATE_COPIES * parameter_estimate(config)


def _block_bytes(config: TrialConfig) -> int:
    """Return the bytes of one image's activations, float32, that one block keeps until the backward pass."""
    tokens = config.tokens
    return 4 * (TOKEN_COPIES * tokens * config.embed_dim + SCORE_COPIES * config.num_heads * tokens**2)


def _stem_bytes() -> int:
    """Return an upper bound for the bytes of one image's activations, float32, that the stem keeps."""
    return 4 * STEM_COPIES * 64 * (IMAGE_SIZE // 2) ** 2
