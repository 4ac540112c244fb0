"""What a training is given in tests: two labelled questions."""

import torch
from tiny_llava import make_image


def labelled(tiny) -> dict:
    """A batch of two questions about a picture each, with labels on the last two and three words."""
    prompts = [
        "<s> USER: <image> what color is the ball ? ASSISTANT: red </s>",
        "<s> USER: <image> is ? ASSISTANT: 1 2 </s>",
    ]
    batch = tiny.batch(prompts, [[make_image(0)], [make_image(1)]], padding_side="right")
    labels = torch.full_like(batch["input_ids"], -100)
    for row, count in enumerate((2, 3)):
        end = batch["attention_mask"][row].nonzero()[-count:, 0]
        labels[row, end] = batch["input_ids"][row, end]
    return {**batch, "labels": labels}
