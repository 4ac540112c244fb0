"""Without torchvision the processors of families that read clips are loaded less their half for those."""

from importlib.util import find_spec
from inspect import signature

import pytest
from families import FAMILIES, tiny_family
from processors import make
from transformers import AutoProcessor

from prunezoo import PruneZooError
from prunezoo.host.parts.loading import images_only, load_processor

CLIPS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision")


def saved(name, folder):
    """A folder as the Hub has it: the parts of the processor, and the config of a model."""
    processor, _ = make(name)
    for part in (processor.image_processor, processor.tokenizer, tiny_family(name).vlm.config):
        part.save_pretrained(folder)
    return processor


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="with it nothing has to be left out")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name in CLIPS])
def test_a_processor_is_loaded_less_its_half_for_clips(name, tmp_path):
    made = saved(name, tmp_path)
    with pytest.raises((ImportError, ValueError), match=r"(?i)torchvision"):
        AutoProcessor.from_pretrained(tmp_path)
    loaded = load_processor(str(tmp_path))
    assert type(loaded).__name__ == type(made).__mro__[1].__name__
    assert loaded.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert loaded.image_processor.to_dict().keys() == made.image_processor.to_dict().keys()


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="with it nothing has to be left out")
@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("qwen2_5_vl", "chat_template", "{{ messages }}"),
        ("internvl", "image_seq_length", 9),
        ("llava_onevision", "vision_aspect_ratio", "anyres_max_2"),
    ],
)
def test_settings_of_the_processor_are_read_too(name, setting, value, tmp_path):
    """A processor that has no half for clips is saved and loaded as it is."""
    made = saved(name, tmp_path)
    kind = type(made).__mro__[1]
    assert signature(kind.__init__).parameters[setting].default != value
    images_only(kind.__name__)(made.image_processor, made.tokenizer, **{setting: value}).save_pretrained(tmp_path)
    loaded = load_processor(str(tmp_path))
    assert getattr(loaded, setting) == value and type(loaded).__name__ == kind.__name__


@pytest.mark.parametrize("name", ["llava_next", "gemma3", "idefics3"])
def test_others_are_as_they_are(name, tmp_path):
    made = saved(name, tmp_path)
    assert type(load_processor(str(tmp_path))) is type(made) is type(AutoProcessor.from_pretrained(tmp_path))


@pytest.mark.skipif(find_spec("num2words") is not None, reason="nothing is missing")
def test_another_package_that_is_missing_is_named(tmp_path):
    saved("idefics3", tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"idefics3"', '"smolvlm"')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(PruneZooError, match="num2words"):
        load_processor(str(tmp_path))
