"""The recipe of the embedded VLM, and the VLM that it made."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.data import default_collate
from transformers import AutoModelForImageTextToText, AutoProcessor

from trainers.data.conversation import ConversationCollator
from trainers.data.scenes import Scenes
from trainers.data.scenes_dense import DenseScenes, as_pixels
from trainers.pretraining.build import WORD_IDS, Sizes, new_processor, new_vlm
from trainers.pretraining.language import LanguageModule

ROOT = Path(__file__).parent.parent.parent
SHIPPED = ROOT / "checkpoints" / "tiny-llava"
SMALL = Sizes(tower_width=32, tower_inner=48, tower_layers=3, width=32, inner=48, layers=2, heads=2)


def test_packed_questions_are_answered_as_the_model_answers_each_alone():
    torch.manual_seed(0)
    vlm = new_vlm(SMALL).eval()
    batch = default_collate([DenseScenes(WORD_IDS, questions=4, length=80)[i] for i in range(2)])
    with torch.no_grad():
        logits, targets, asked = LanguageModule(vlm, steps=1).read(batch, 144, blind=False)
        opening = torch.tensor([WORD_IDS["<s>"], WORD_IDS["<user>"], *[WORD_IDS["<image>"]] * 144])
        alone, right = [], []
        for row in range(2):
            for segment in range(4):
                own = batch["segment"][row] == segment
                ids = torch.cat([opening, batch["ids"][row][own]])[None]
                pixels = as_pixels(batch["image"][row : row + 1])
                out = vlm(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0, 146:]
                answer = batch["targets"][row][own]
                alone.append(out[:-1][answer[1:] >= 0])
                right.append(answer[answer >= 0])
    assert asked.sum() == len(targets) >= 16
    assert torch.equal(targets, torch.cat(right))
    assert logits.std() > 0.05, "the logits say nothing, so the comparison proves nothing"
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-4, rtol=1e-4)  # float32, another order of sums


def test_the_chat_template_lays_dialogues_out_as_training_did():
    from trainers.data.scenes_dense import encode_dialogue

    item = next(item for item in Scenes("test") if item.group == "dialogue")
    processor = new_processor()
    ids = ConversationCollator(processor)([item])["input_ids"][0].tolist()
    tokens, _ = encode_dialogue(item.turns, WORD_IDS)
    assert ids[146:] == tokens
    assert ids[:2] == [WORD_IDS["<s>"], WORD_IDS["<user>"]] and set(ids[2:146]) == {WORD_IDS["<image>"]}


def test_one_command_trains_both_phases_and_goes_on_where_it_stopped(tmp_path):
    words = [
        sys.executable, "-m", "trainers.pretrain", "--config", "configs/tiny_llava.yaml", "--machine.devices=1",
        "--machine.strategy=auto", "--machine.workers=0", "--machine.precision=32-true", "--machine.accelerator=cpu",
        "--tower.batch_size=4", "--tower.steps=2", "--language.batch_size=2", "--sizes.tower_width=32",
        "--sizes.tower_inner=48", "--sizes.tower_layers=3", "--sizes.width=32", "--sizes.inner=48", "--sizes.layers=2",
        "--sizes.heads=2", f"--work={tmp_path / 'work'}", f"--out={tmp_path / 'vlm'}",
    ]  # fmt: skip
    first = subprocess.run([*words, "--language.steps=2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    vlm = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm")
    processor = AutoProcessor.from_pretrained(tmp_path / "vlm")
    assert vlm.dtype == torch.bfloat16
    batch = ConversationCollator(processor)([Scenes("test")[0]])
    batch.pop("labels")
    with torch.no_grad():
        assert vlm.float()(**batch).logits.isfinite().all()
    tower = (tmp_path / "work" / "tower" / "vlm" / "model.safetensors").stat().st_mtime_ns
    # as a run that was stopped in the middle of the second phase leaves it: checkpoints, but no finished model
    shutil.rmtree(tmp_path / "work" / "language" / "vlm")
    again = subprocess.run([*words, "--language.steps=4"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and f"frozen VLM: {tmp_path / 'vlm'}" in again.stdout, again.stderr
    assert "Restored all states from the checkpoint" in again.stderr + again.stdout
    assert [*(tmp_path / "work" / "language").glob("*step=4.ckpt")]
    assert (tmp_path / "work" / "tower" / "vlm" / "model.safetensors").stat().st_mtime_ns == tower
