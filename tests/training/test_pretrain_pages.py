"""The curriculum of the frozen VLM for pages: what a patch says, what is prepared, and one command that goes on."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from transformers import AutoModelForImageTextToText, AutoProcessor

from prunezoo import PruneZooError
from trainers import pretrain
from trainers.data.conversation import ConversationCollator
from trainers.data.pages import GROUPS, Pages
from trainers.data.pages_dense import DensePages, patch_of
from trainers.data.pages_render import KINDS, NAMES, make_page
from trainers.data.scenes_dense import as_pixels, encode_dialogue
from trainers.pretraining.build import PAGES, Sizes, new_processor, new_vlm
from trainers.pretraining.pages_language import PagesLanguage, Stage
from trainers.pretraining.pages_said import PatchWords, prepare_look_up, shows_something
from trainers.pretraining.pages_tower import PagesTower, inked, say, start_tower
from trainers.pretraining.train import Phase, train

ROOT = Path(__file__).parent.parent.parent
SHIPPED = ROOT / "checkpoints" / "small-llava"
SMALL = Sizes(tower_width=32, tower_inner=48, tower_layers=3, width=64, inner=48, layers=3, heads=4)


def _batch(count=2, **options):
    return default_collate([DensePages(PAGES.word_ids, **options)[i] for i in range(count)])


@pytest.fixture
def vlm():
    torch.manual_seed(0)
    return new_vlm(SMALL, PAGES).eval()


def test_packed_questions_are_answered_as_the_model_answers_each_alone(vlm):
    vlm.set_attn_implementation("plain")  # which is what trains it; the shipped model runs with any
    batch = _batch(questions=4, length=80)
    with torch.no_grad():
        logits, targets, asked = PagesLanguage(vlm, Stage("s", steps=1, drawn=True)).read(batch, 256, blind=False)
        vlm.set_attn_implementation("sdpa")
        opening = torch.tensor([PAGES.word_ids[word] for word in ("<s>", "<user>", *["<image>"] * 256)])
        alone, right = [], []
        for row in range(2):
            for segment in range(4):
                own = batch["segment"][row] == segment
                ids = torch.cat([opening, batch["ids"][row][own]])[None]
                pixels = as_pixels(batch["image"][row : row + 1])
                out = vlm(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0, 258:]
                answer = batch["targets"][row][own]
                alone.append(out[:-1][answer[1:] >= 0])
                right.append(answer[answer >= 0])
    assert asked.sum() == len(targets) >= 16
    assert torch.equal(targets, torch.cat(right))
    assert logits.std() > 0.05, "the logits say nothing, so the comparison proves nothing"
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-4, rtol=1e-4)  # float32, another order of sums


def test_the_chat_template_lays_dialogues_out_as_training_did():
    item = next(item for item in Pages("test") if item.group == "dialogue")
    ids = ConversationCollator(new_processor(PAGES))([item])["input_ids"][0].tolist()
    tokens, _ = encode_dialogue(item.turns, PAGES.word_ids)
    assert ids[258:] == tokens
    assert ids[:2] == [PAGES.word_ids["<s>"], PAGES.word_ids["<user>"]]
    assert set(ids[2:258]) == {PAGES.word_ids["<image>"]}


def test_what_a_patch_says_can_be_read_off_and_names_no_owner(vlm):
    words = PatchWords(new_vlm(Sizes(), PAGES))  # vectors of 64 numbers get in each other's way
    batch = _batch(6, draw=False)
    left = words(batch) - words.waves
    for slot in ("name", "digit", "bar", "cell"):
        there = batch[slot] >= 0
        assert there.any()
        read = (left @ words.table(slot).T).argmax(-1)
        assert (read == batch[slot])[there].float().mean() > 0.95, slot
    assert (left[~shows_something(batch)] == 0).all()
    page = make_page(np.random.default_rng(0), "train", "form")
    values = {patch_of(*spot) for text in page.values.values() for spot in text.spots()}
    other = make_page(np.random.default_rng(0), "train", "form")
    other.names = {NAMES[-1 - i]: text for i, text in enumerate(other.names.values())}  # other names, equal numbers
    from trainers.data.pages_dense import patch_labels

    one, two = ({k: torch.as_tensor(v)[None] for k, v in patch_labels(p).items()} for p in (page, other))
    difference = (words(one) - words(two))[0].abs().sum(-1)
    assert difference.nonzero().flatten().numel() == 0 or not set(difference.nonzero().flatten().tolist()) & values


def test_the_prepared_look_up_finds_the_name_that_is_asked_for():
    torch.manual_seed(0)
    ratios = []
    for prepared in (False, True):
        vlm = new_vlm(Sizes(), PAGES)
        words = PatchWords(vlm)
        if prepared:
            prepare_look_up(vlm, words)
        batch = _batch(4, draw=False, shares={"where": 1})
        vlm.set_attn_implementation("eager")
        tokens = words(batch)
        name = torch.tensor([batch["ids"][row][2] for row in range(4)])  # where is NAME ?
        asked = vlm.get_input_embeddings()(name)[:, None]
        place = torch.arange(257)[None].expand(4, -1)
        with torch.no_grad():
            out = vlm.model.language_model(
                inputs_embeds=torch.cat([tokens, asked], 1), position_ids=place, output_attentions=True, use_cache=False
            )
        looks = out.attentions[0][:, :2, -1, :256].mean(1)  # the two heads of layer 0 that look up
        rank = torch.tensor([NAMES.index(list(PAGES.word_ids)[int(i)]) for i in name])
        ratios.append(float((looks * (batch["name"] == rank[:, None])).sum(-1).min() / looks.mean()))
    assert ratios[0] < 3 and ratios[1] > 5


def test_ink_is_what_shows_something_and_half_a_page_is_seen_as_a_whole_one_would_be(vlm):
    batch = _batch(8)
    slots = inked(batch["image"], 112)
    kept = torch.zeros(8, 256, dtype=torch.bool).scatter_(1, slots, True)
    assert (kept & shows_something(batch)).sum() >= 0.9 * shows_something(batch).sum()
    every = torch.arange(256).expand(8, -1)
    with torch.no_grad():
        whole = say(vlm, batch["image"])
        assert torch.equal(say(vlm, batch["image"], every), whole)
        assert not torch.allclose(say(vlm, batch["image"], slots), whole.gather(1, slots[..., None].expand(-1, -1, 64)))
        plain = vlm.model.vision_tower(as_pixels(batch["image"]), output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(whole, vlm.model.multi_modal_projector(plain))


def test_the_tower_begins_as_that_of_scenes(vlm):
    big = new_vlm(Sizes(), PAGES)
    start_tower(big, str(ROOT / "checkpoints" / "tiny-llava"))
    scenes = AutoModelForImageTextToText.from_pretrained(ROOT / "checkpoints" / "tiny-llava", dtype=torch.float32)
    one, other = (model.model.vision_tower.state_dict() for model in (big, scenes))
    for name, weight in one.items():
        if "position_embedding" in name:
            grid = weight[1:].view(16, 16, -1)
            torch.testing.assert_close(
                grid[[0, -1]].mean(), other[name][1:].view(12, 12, -1)[[0, -1]].mean(), atol=0.02, rtol=0
            )
        elif "position_ids" not in name:
            assert torch.equal(weight, other[name]), name


def test_only_the_phases_own_weights_learn(vlm):
    module = PagesTower(vlm, steps=4)
    loss, seen = module.losses(default_collate([DensePages(kinds=["form"])[i] for i in range(2)]), keep=112)
    loss.backward()
    learns = {name.split(".")[1] for name, weight in vlm.named_parameters() if weight.grad is not None}
    assert learns == {"vision_tower", "multi_modal_projector"} and loss.isfinite() and 0 <= seen["digit"] <= 1
    module = PagesLanguage(vlm.requires_grad_(False), Stage("s", steps=1))
    vlm.zero_grad()
    logits, targets, _ = module.read(_batch(draw=False), 48, blind=True)
    torch.nn.functional.cross_entropy(logits, targets).backward()
    learns = {name for name, weight in vlm.named_parameters() if weight.grad is not None}
    assert learns and all("language_model" in name and "embed_tokens" not in name for name in learns)


WORDS = [
    "--suite=pages", "--machine.workers=0", "--machine.precision=32-true", "--machine.accelerator=cpu",
    "--tower.batch_size=4", "--tower.steps=2", "--sizes.tower_width=32", "--sizes.tower_inner=48",
    "--sizes.tower_layers=3", "--sizes.width=32", "--sizes.inner=48", "--sizes.layers=3", "--sizes.heads=4",
]  # fmt: skip


def test_one_command_trains_side_by_side_and_goes_on_where_it_stopped(tmp_path):
    def stages(last):
        made = "{name: made, steps: 2, batch_size: 2, length: 40, shares: {field: 1, chart: 1}, weights: {chart: 2}}"
        return f"--stages=[{made}, {{name: seen, steps: {last}, batch_size: 2, drawn: true, keep: {{48: 1}}}}]"

    words = [*WORDS, f"--work={tmp_path / 'work'}", f"--out={tmp_path / 'vlm'}"]
    pretrain.main([*words, stages(2), "--part=made"])
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"made"} and not (tmp_path / "vlm").exists()
    pretrain.main([*words, stages(2), "--part=tower"])
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"made", "tower"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*/vlm/model.safetensors")}
    pretrain.main([*words, stages(2)])
    vlm = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm")
    assert vlm.dtype == torch.bfloat16
    tower, seen = (AutoModelForImageTextToText.from_pretrained(tmp_path / "work" / name / "vlm").state_dict()
                   for name in ("tower", "seen"))  # fmt: skip
    assert all(torch.equal(tower[name], weight) for name, weight in seen.items() if "vision_tower" in name)
    batch = ConversationCollator(AutoProcessor.from_pretrained(tmp_path / "vlm"))([Pages("test")[0]])
    batch.pop("labels")
    with torch.no_grad():
        assert vlm.float()(**batch).logits.isfinite().all()
    # as a run that was stopped in the middle of the last stage leaves it: checkpoints, but no finished model
    shutil.rmtree(tmp_path / "work" / "seen" / "vlm")
    pretrain.main([*words, stages(4)])
    assert [*(tmp_path / "work" / "seen").glob("*step=4.ckpt")]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


def test_mistakes_are_named():
    with pytest.raises(PruneZooError, match="no group is called 'cells'; there are field, cell"):
        Stage("s", steps=1, shares={"cells": 1})
    with pytest.raises(PruneZooError, match="steps=0 of stage s: at least 1"):
        Stage("s", steps=0)
    with pytest.raises(PruneZooError, match="at least 3 layers of 4 heads"):
        train(Phase(1, 1), stages=[], suite="pages", sizes=Sizes(heads=2))
    with pytest.raises(PruneZooError, match="stages, start and part are for pages"):
        train(Phase(1, 1), Phase(1, 1), part="made")
    assert {group for kind in KINDS for group in GROUPS if DensePages(shares={group: 1}).kinds} == set(GROUPS)
