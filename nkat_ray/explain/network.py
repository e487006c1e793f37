"""Compute a network's predictions with the attention behind them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nkat_ray.errors import UserError
from nkat_ray.explain import attention
from nkat_ray.explain.page import Example

BATCH: Final = 16  # images per pass: the weights of 256 tokens, 9 blocks and 8 heads take 300 MB
RANKED: Final = 3  # classes named per image


@dataclass(frozen=True)
class Batch:
    """Images as read, each with a caption, uint8 (C, H, W), and its true class or None."""

    captions: Sequence[str]
    images: Sequence[NDArray[np.uint8]]
    labels: Sequence[int | None]


@dataclass(frozen=True)
class Scan:
    """Averages over images, (L, H): entropy and kept tokens; and whether each image is classified correctly."""

    entropy: NDArray[np.float64]
    kept: NDArray[np.float64]
    right: Sequence[bool]


class Network:
    """A model on the CPU, with the normalisation that it was trained with."""

    def __init__(self, weights: Any) -> None:
        try:
            self._model = weights.build()
        except RuntimeError as error:  # tensors that do not fit the configuration
            raise UserError(f"the model's weights do not fit its configuration: {error}") from error
        self._mean, self._std = weights.mean, weights.std

    def scalars(self) -> dict[str, list[float]]:
        """Return the NKAT scalars, block by block."""
        from nkat_ray.model.capture import nkat_scalars

        return nkat_scalars(self._model)

    def scan(self, batch: Batch) -> Scan:
        """Compute averages over a batch of any size, a few images at a time."""
        entropy: list[NDArray[np.float64]] = []
        kept: list[NDArray[np.float64]] = []
        predicted: list[int] = []
        for start in range(0, len(batch.images), BATCH):
            logits, weights, (_, _, capture) = self._capture(batch.images[start : start + BATCH])
            entropy += list(attention.entropy(weights).mean(-1).swapaxes(0, 1))  # (L, B, H) -> B of (L, H)
            kept += list(capture.kept.double().mean(-1).numpy().swapaxes(0, 1))
            predicted += logits.argmax(1).tolist()
        right = [truth == said for truth, said in zip(batch.labels, predicted, strict=True)]
        return Scan(np.mean(entropy, 0), np.mean(kept, 0), right)

    def examples(
        self, batch: Batch, chosen: Sequence[int], names: Sequence[str]
    ) -> tuple[list[Example], dict[str, str]]:
        """Return chosen images with predictions and weights, each from one pass, and the results of the checks."""
        from nkat_ray.model.capture import plain_difference, row_error

        found, rows, differences = [], 0.0, 0.0
        for row in chosen:
            logits, weights, (inputs, pixels, capture) = self._capture([batch.images[row]])
            rows = max(rows, row_error(capture))
            differences = max(differences, plain_difference(self._model, inputs, capture))
            label = batch.labels[row]
            found.append(
                Example(
                    caption=batch.captions[row], image=pixels[0], truth=None if label is None else names[label],
                    ranked=_ranked(logits[0], names), weights=weights[:, 0],
                )
            )  # fmt: skip
        checks = {
            "attention rows": f"sum to 1 within {rows:.1g}",
            "logits": "those of a pass without hooks"
            + (f", within {differences:.1g} of the largest" * (differences > 0)),
        }
        return found, checks

    def _capture(self, images: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[Any], NDArray[Any], Any]:
        """Return logits (B, K), weights (L, B, H, N, N) and (inputs, pixels (B, H, W, 3), the capture)."""
        import torch

        from nkat_ray.model.capture import capture_attention
        from nkat_ray.train.images import in_pixels, normalise, to_network_size

        pixels = torch.cat([to_network_size(torch.from_numpy(image[None].copy())) for image in images])
        inputs = normalise(pixels, in_pixels(self._mean), in_pixels(self._std))
        capture = capture_attention(self._model, inputs)
        shown = pixels.permute(0, 2, 3, 1).numpy()
        return capture.logits.double().numpy(), capture.weights.double().numpy(), (inputs, shown, capture)


def _ranked(logits: NDArray[np.float64], names: Sequence[str]) -> list[tuple[str, float]]:
    """Return the most probable classes and their probabilities; the first is the prediction."""
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-logits, kind="stable")[:RANKED]
    return [(names[index], float(shares[index])) for index in best]
