"""The command that times the first token: what runs under each way, on a tiny model."""

import json

import torch

from prunezoo import attach
from trainers.upkeep import first_token


def test_ways_of_equal_tokens_are_equal():
    """The input stage, the prompt stage and the smaller picture leave the language model as many tokens."""
    _, _, _, _, (rows, columns) = first_token.SIZES["tiny"]
    vlm, lengths = first_token.build("tiny"), {}
    watch = vlm.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    patches = vlm.model.visual.blocks[0].attn.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    for way, (pruner, keep, picture) in first_token.ways(rows, columns).items():
        seen: list[int] = []
        batch = first_token.request(*picture)
        with torch.no_grad():
            if pruner is None:
                vlm.generate(**batch, max_new_tokens=1)
            else:
                with attach(vlm, pruner, keep):
                    vlm.generate(**batch, max_new_tokens=1)
        lengths[way] = tuple(seen)
    watch.remove()
    patches.remove()
    whole, words = rows * columns, 2 + first_token.WORDS
    assert lengths["bare"] == lengths["input stage, all kept"] == (whole, whole // 4 + words)
    for share, part in (("1/2", 2), ("1/4", 4)):
        left = whole // 4 // part + words
        assert lengths[f"prompt stage, {share}"] == (whole, left)
        assert lengths[f"input stage, {share}"] == lengths[f"smaller picture, {share}"] == (whole // part, left)


def test_the_command(tmp_path, capsys):
    path = tmp_path / "times.json"
    first_token.main(["--size", "tiny", "--repeats", "1", "--json", str(path)])
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [row["way"] for row in found["rows"]] == list(first_token.ways(8, 8))
    assert all(row["first_token"]["seconds"] >= row["tower"]["seconds"] > 0 for row in found["rows"])
    assert found["rows"][0]["first_token"]["times"] == 1 and "times bare" in capsys.readouterr().out
