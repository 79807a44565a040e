"""What a feature extractor says of a set of images.

Letters: N images, D features, K classes of the extractor, S spatial features.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Features:
    """Features of N images, on CPU; may be memory-mapped.

    Attributes:
        pooled [N, D]: float32; None where only others were asked for.
        logits [N, K]: float32, before the softmax; None where the extractor is no classifier.
        spatial [N, S]: float32, a feature map cut to a few channels and flattened; None where there is none.
        labels [N]: int64, the class that was asked for or is true; None where it is not known.
    """

    pooled: torch.Tensor | None
    logits: torch.Tensor | None = None
    spatial: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    def __len__(self) -> int:
        return next(len(array) for array in (self.pooled, self.logits, self.spatial) if array is not None)
