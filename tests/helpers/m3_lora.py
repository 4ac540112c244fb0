"""An M3 with a LoRA, far from where it starts, and a prompt to ask under it."""

import torch

from prunezoo.learned.m3 import M3

SIZES = {"width": 32, "hidden": 16, "heads": 2}
PROMPT = "<s> USER: <image> what color is the ball ? ASSISTANT:"
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")


def stir(module, std=0.3):
    """Random weights everywhere, as after much training."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)


def made_for(vlm, **config):
    """An M3 with a LoRA for a model, both far from where they start."""
    torch.manual_seed(0)
    pruner = M3(**SIZES, lora_rank=2, lora_alpha=4, **config).eval()
    pruner.lora.fit(vlm)
    stir(pruner)
    return pruner
