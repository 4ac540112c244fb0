"""How near a painted picture is to the one that was coded: torchmetrics, one figure a picture.

Perceptual measures that rest on a trained network (LPIPS, DISTS, FID) want weights that would have to be downloaded;
taken are the ones that need none: SSIM over several scales, and visual information fidelity.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
    visual_information_fidelity,
)

METRICS = {"psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "vif": "VIF"}
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of MS-SSIM's scales, finest first
WINDOW = 11  # pixels, of SSIM's Gaussian
LEAST_VIF = 41  # pixels, below which VIF is not defined

Floats = NDArray[np.float64]


def quality(painted: Tensor, images: Tensor) -> dict[str, Floats]:
    """Figures ``(B,)`` of painted pictures beside the true ones, both ``(B, 3, S, S)`` in [0, 1].

    MS-SSIM takes as many of its five scales as fit into the picture, their weights brought to a sum of 1; VIF is NaN
    for pictures below 41 pixels.
    """
    side = min(images.shape[-2:])
    count = max(n for n in range(1, 6) if side // max(n - 1, 1) ** 2 >= WINDOW and side >= 2**n)
    betas = tuple(weight / sum(SCALES[:count]) for weight in SCALES[:count])
    options: dict[str, Any] = {"data_range": 1.0, "reduction": "none"}
    figures: dict[str, Any] = {
        "psnr": peak_signal_noise_ratio(painted, images, dim=(1, 2, 3), **options),
        "ssim": structural_similarity_index_measure(painted, images, **options),
        "ms_ssim": multiscale_structural_similarity_index_measure(painted, images, betas=betas, **options),
        "vif": visual_information_fidelity(255 * painted, 255 * images, reduction="none")
        if side >= LEAST_VIF
        else torch.full((len(images),), torch.nan),
    }
    return {name: figure.reshape(-1).double().cpu().numpy() for name, figure in figures.items()}
