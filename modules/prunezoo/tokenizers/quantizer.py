"""Vector quantisation: straight through in front, moving averages behind (van den Oord et al., 2017, arXiv 1711.00937,
appendix A.1), by angle on the unit sphere (Yu et al., ViT-VQGAN, 2021, arXiv 2110.04627) or by distance anywhere.

Not the library vector-quantize-pytorch: it was measured beside this with the same settings, and takes several times as
long on a CPU, since it makes one-hot rows of all tokens by all codes; after equal steps fewer of its codes were in use.

Letters: V codes, C width of a code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn


class Quantizer(nn.Module):
    """A codebook that follows what it quantises. Codes that are hardly used move to where the latents are.

    Args:
        codes: V.
        width: C.
        decay: Of the moving averages, a step.
        dead: A code that is used less than this share of the average is replaced.
        commitment: Weight of the pull of the latents to their codes.
        unit: Whether latents are brought to length 1, and codes have it; False: both are as long as they are.
    """

    def __init__(
        self,
        codes: int,
        width: int,
        decay: float = 0.99,
        dead: float = 0.03,
        commitment: float = 0.25,
        unit: bool = True,
    ) -> None:
        super().__init__()
        self.unit = unit
        self.decay, self.dead, self.commitment = decay, dead, commitment
        self.codebook: Tensor
        self.sums: Tensor
        self.uses: Tensor
        self.register_buffer("codebook", F.normalize(torch.randn(codes, width), dim=-1))  # (V, C)
        self.register_buffer("sums", torch.zeros(codes, width))  # moving average of what a step adds to each code
        self.register_buffer("uses", torch.zeros(codes))  # moving average of how often a step uses each code

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise, and in training follow.

        Args:
            latents: (…, C), any length.

        Returns:
            The codes' vectors (…, C), whose gradient goes to the latents; the codes (…) long; the commitment loss.
        """
        latents = F.normalize(latents.float(), dim=-1) if self.unit else latents.float()
        codes = self.nearest(latents)
        if self.training:
            self.follow(latents.detach().flatten(0, -2), codes.flatten())
        chosen = self.codebook[codes]
        loss = self.commitment * F.mse_loss(latents, chosen)
        return latents + (chosen - latents).detach(), codes, loss

    def nearest(self, latents: Tensor) -> Tensor:
        """Codes (…) long of latents (…, C) of any length; in float32, whatever the model's type."""
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            codebook = self.codebook.float()
            near = latents.float() @ codebook.T
            if not self.unit:
                near -= codebook.square().sum(-1) / 2  # falls as the distance rises
            return near.argmax(-1)

    @torch.no_grad()
    def follow(self, latents: Tensor, codes: Tensor) -> None:
        """Update the codebook by latents (M, C), of length 1 if codes are, and their codes (M,)."""
        sums = torch.zeros_like(self.sums).index_add_(0, codes, latents)
        uses = torch.bincount(codes, minlength=len(self.uses)).float()
        # dead codes take the place of latents drawn at random
        drawn = latents[torch.randint(len(latents), (len(self.uses),), device=latents.device)]
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
            distributed.all_reduce(uses)
            distributed.broadcast(drawn, 0)
        self.sums.lerp_(sums, 1 - self.decay)
        self.uses.lerp_(uses, 1 - self.decay)
        floor = self.dead * uses.mean()
        is_dead = self.uses < floor
        self.uses[is_dead] = floor
        self.sums[is_dead] = floor * drawn[is_dead]
        self.codebook.copy_(F.normalize(self.sums, dim=-1) if self.unit else self.sums / self.uses[:, None])
