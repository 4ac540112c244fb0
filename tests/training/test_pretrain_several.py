"""The recipe of the frozen VLM for several pictures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from prunezoo.core.errors import PruneZooError
from trainers.data.conversation import ConversationCollator
from trainers.data.several_dense import GROUPS, KINDS, SCENES, Bank, DenseSeveral, fill
from trainers.data.suite import Item
from trainers.pretraining.build import Sizes, new_processor, new_vlm
from trainers.pretraining.several import SEVERAL, SeveralLanguage, SeveralStage, look, start_from

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "checkpoints" / "tiny-llava")
IDS = SEVERAL.word_ids


@pytest.fixture(scope="module")
def made():
    """A model that begins as tiny-llava, a bank, its pictures and what the tower says of them."""
    torch.manual_seed(0)
    vlm = new_vlm(Sizes(layers=6), SEVERAL).eval()
    start_from(vlm, TINY)
    bank, pictures = Bank(), []
    for kind in SCENES:
        for number in range(24 if kind == "icl" else 2):
            pictures += fill(bank, kind, number, "train")
    return vlm, bank, pictures, look(vlm, torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])))


def test_it_begins_as_tiny_llava(made):
    vlm, other = made[0], AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    known, own = other.state_dict(), vlm.state_dict()
    places = next(name for name in known if name.endswith("position_embedding.weight"))
    corner = known[places][1:].view(12, 12, -1)[:6, :6].flatten(0, 1)
    assert torch.equal(own[places], torch.cat([known[places][:1], corner]))
    assert torch.equal(vlm.get_input_embeddings().weight[:82], other.get_input_embeddings().weight)
    same = [name for name in known if own[name].shape == known[name].shape]
    assert len(same) == len(known) - 3 and all(torch.equal(own[name], known[name]) for name in same)
    with pytest.raises(PruneZooError, match="other widths than sizes"):
        start_from(new_vlm(Sizes(width=64), SEVERAL), TINY)
    with pytest.raises(PruneZooError, match="has 5 layers in its text_config"):
        start_from(new_vlm(Sizes(layers=4), SEVERAL), TINY)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_in_one_sequence_are_answered_as_the_model_answers_each_alone(made, kind):
    """With all patches, and nobody blind, as the processor lays pictures and turns out."""
    vlm, bank, pictures, tokens = made
    data = DenseSeveral(bank, tokens, IDS, 1, 2, {kind: 1.0}, {36: 1.0}, most_hidden=0.0)
    batch = {name: torch.as_tensor(values) for name, values in data[0].items()}
    with torch.no_grad():
        logits, targets, asked, _ = SeveralLanguage(vlm, SeveralStage("any", 1)).answers(batch)
    collate, names = ConversationCollator(new_processor(SEVERAL)), {token: word for word, token in IDS.items()}
    rows, places = asked.nonzero().unbind(1)
    segments, found = batch["segment"][rows, places + 1], 0
    for row in range(2):
        for segment in segments[rows == row].unique().tolist():
            own = (batch["segment"][row] == segment) | (batch["segment"][row] == 0)
            item = item_of(batch["ids"][row][own].tolist(), batch["tokens"][row][own], pictures, tokens, names)
            inputs = collate([item])
            labels = inputs.pop("labels")[0, 1:]
            with torch.no_grad():
                alone = vlm(**inputs, use_cache=False).logits[0, :-1][labels >= 0]
            mine = (rows == row) & (segments == segment)
            assert targets[mine].tolist() == labels[labels >= 0].tolist()
            # image tokens are kept in bfloat16
            torch.testing.assert_close(logits[mine], alone, atol=0.05, rtol=0.02)
            found += 1
    assert found >= 2 and logits.std() > 0.3


def item_of(ids, tokens, pictures, known, names):
    """The item that a row of ids and image tokens says."""
    turns, shown, words, place = [], [], [], 0
    for token, state in zip(ids[2:], tokens[2:], strict=True):
        word = names[token]
        if word == "<image>":
            if not place % 36:
                same = (known == state).all(-1).nonzero()
                shown.append((len(turns), pictures[int(same[same[:, 1] == 0][0, 0])]))
            place += 1
        elif word == "</s>":
            at = words.index("<assistant>")
            turns.append((" ".join(words[:at]), " ".join(words[at + 1 :])))
            words = []
        elif word != "<user>":
            words.append(word)
    (_, image), *more = shown
    return Item("made", image, tuple(turns), GROUPS[0], more=tuple(more))


def test_what_is_beside_the_point_can_be_hidden_and_what_is_not_never_is(made):
    _, bank, _, tokens = made
    seen = []
    for index in range(6):
        batch = DenseSeveral(bank, tokens, IDS, 6, 4, {"steps": 1.0}, {36: 1.0}, most_hidden=1.0)[index]
        image = batch["ids"] == IDS["<image>"]
        assert not batch["hidden"][:, 0].any() and not (batch["hidden"] & ~image[:, None]).any()
        seen.append(batch["hidden"][:, 1:].sum(-1).max(1))
    assert 60 < np.concatenate(seen).max() <= 4 * 36 - 2  # the goal's and the hand's own patches are left


def test_few_patches_are_those_that_show_something(made):
    _, bank, _, tokens = made
    batch = DenseSeveral(bank, tokens, IDS, 1, 4, {"icl-2": 1.0}, {6: 1.0})[0]
    image = batch["ids"] == IDS["<image>"]
    assert set(image.sum(1).tolist()) == {7 * 6}  # two examples and five questions, each with its picture
    assert (batch["values"] >= 0).sum() == 4 * 7
    assert {names for names, token in IDS.items() if token in batch["values"]} <= {
        *"red green blue yellow purple cyan white circle square triangle cross ring".split()
    }


def test_one_command_trains_all_stages(tmp_path):
    words = [
        sys.executable, "-m", "trainers.pretrain", "--config", "configs/tiny_llava_multi.yaml", f"--work={tmp_path}",
        f"--out={tmp_path / 'vlm'}", "--machine.accelerator=cpu", "--bank.icl=60", "--bank.moving=2",
        "--bank.staying=2", "--bank.steps=2", "--bank.coming=2",
        '--several=[{"name": "a", "steps": 2, "batch_size": 2}, {"name": "b", "steps": 2, "value": 0.5}]',
    ]  # fmt: skip
    first = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0 and f"frozen VLM: {tmp_path / 'vlm'}" in first.stdout, first.stderr
    vlm = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm")
    assert vlm.config.image_seq_length == 36 and vlm.dtype == torch.bfloat16
    refused = subprocess.run([*words, "--bank.moving=3"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "is of another bank; remove it" in refused.stderr
