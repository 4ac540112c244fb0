"""Small vision towers without a language model."""

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig
from transformers import SiglipVisionModel as Siglip


def small_tower(kind, **options):
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 3, **options}
    torch.manual_seed(0)
    if kind == "clip":
        config = CLIPVisionConfig(**sizes, image_size=20, patch_size=4)
        model = CLIPVisionModel(config)
    else:
        config = SiglipVisionConfig(**sizes, image_size=20, patch_size=4, vision_use_head=False)
        model = Siglip(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # far from even attention
    return model.eval().requires_grad_(False)
