"""What vLLM answers under a pruner is, token for token, what the model answers inside of `attach`.

In an environment of its own: `make test-serve`.
"""

from types import SimpleNamespace

import pytest
from serving import VLM, expect, requests, said, served

pytest.importorskip("vllm", reason="`make test-serve` installs vLLM in an environment of its own")

COUNT, KEEP = 64, 16
PRUNERS = {
    "uniform": ("original", "compact"),
    "divprune": ("original", "compact"),
    "fastervlm": ("original", "compact"),
    "visionzip": ("original",),
    "checkpoints/m3-tiny": ("original", "compact"),
    "checkpoints/ppm-tiny": ("original", "compact"),
    "random": ("original",),
}
CASES = [(pruner, positions) for pruner, several in PRUNERS.items() for positions in several]


def job(pruner, positions, count=COUNT, images=1, keep=KEEP):
    return {
        "vlm": VLM,
        "pruner": pruner,
        "keep": keep,
        "positions": positions,
        "count": count,
        "images": images,
    }


@pytest.fixture(scope="module")
def expected(answers_folder):
    """By pruner and positions."""
    return dict(zip(CASES, expect(answers_folder, [job(*case) for case in CASES]), strict=True))


@pytest.mark.parametrize(("pruner", "positions"), CASES)
def test_served_answers_are_those_of_attach(pruner, positions, expected):
    with served(VLM, pruner, KEEP, positions) as llm:
        answers, lengths = said(llm, requests(VLM, COUNT))
    assert answers == expected[pruner, positions]
    assert max(lengths) < KEEP + 20  # it was shorter


@pytest.mark.parametrize(("pruner", "positions"), [case for case in CASES if len(PRUNERS[case[0]]) > 1])
def test_two_processes_answer_as_one(pruner, positions, expected):
    """Tensor parallel: heads of tower and language model are divided, the pruner is in both."""
    several = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with served(VLM, pruner, KEEP, positions, **several) as llm:
        assert said(llm, requests(VLM, COUNT))[0] == expected[pruner, positions]


def test_the_comparison_can_fail(expected):
    """Pruners and positions differ on some of the questions."""
    assert expected["divprune", "original"] != expected["divprune", "compact"]
    assert expected["divprune", "original"] != expected["checkpoints/ppm-tiny", "original"]
    assert expected["uniform", "original"] != expected["fastervlm", "original"]


OTHERS = {"two images": job("checkpoints/ppm-tiny", "original", 16, 2)} | {
    keep: job("checkpoints/ppm-tiny", "original", 24, keep=keep) for keep in (9, 4)
}


@pytest.fixture(scope="module")
def others(answers_folder):
    """With two images in a prompt, and with less kept."""
    return dict(zip(OTHERS, expect(answers_folder, list(OTHERS.values())), strict=True))


def test_small_steps_several_images_and_keeps_of_requests(expected, others):
    """One engine whose steps take so few tokens that images are cut by them, with everything mixed and again."""
    whole = expected["checkpoints/ppm-tiny", "original"]
    small = {"max_num_batched_tokens": 24, "max_num_seqs": 4, "max_model_len": 192, "enable_chunked_prefill": True}
    with served(VLM, "checkpoints/ppm-tiny", KEEP, **small) as llm:
        assert said(llm, requests(VLM, COUNT))[0] == whole
        assert said(llm, requests(VLM, 16, images=2))[0] == others["two images"]
        prompts = [*requests(VLM, 24, prunezoo_keep=9), *requests(VLM, 24, prunezoo_keep=4), *requests(VLM, 24)]
        answers, lengths = said(llm, prompts)
        assert answers == [*others[9], *others[4], *whole[:24]]  # the picture is in the cache at another keep
        assert lengths[48] - lengths[0] == KEEP - 9 and lengths[0] - lengths[24] == 5
        for keep in (17, 0, 0.9, "many"):
            with pytest.raises(ValueError, match="keep"):
                said(llm, requests(VLM, 1, prunezoo_keep=keep))
        assert said(llm, requests(VLM, 2))[0] == whole[:2]
    assert others[9] != others[4] != whole[:24]


def test_an_image_keeps_the_words_of_its_own_turn():
    """What is said after the first answer behind it leaves an image's words, and so its cache key, as they were."""
    from transformers import AutoProcessor

    from prunezoo.serve.processor import Processor

    hf = AutoProcessor.from_pretrained(VLM)
    processor = object.__new__(Processor)
    processor.info = SimpleNamespace(
        get_hf_processor=lambda: hf, get_hf_config=lambda: SimpleNamespace(image_token_id=hf.image_token_id)
    )

    def words(*turns):
        chat = [
            {"role": role, "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}
            for role, images, text in turns
        ]
        text = hf.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return processor._words(hf.tokenizer(text, add_special_tokens=False)["input_ids"])

    first = ("user", 1, "what color is the ball ?"), ("assistant", 0, "red")
    (alone,) = words(first[0])
    then = words(*first, ("user", 2, "what shape is it ?"))
    last = words(*first, ("user", 2, "what shape is it ?"), ("assistant", 0, "round"), ("user", 0, "is it left ?"))
    assert then[0] == last[0] == alone and then[1] == then[2] == last[1] == last[2]
    assert len(then[1]) > len(alone) and hf.image_token_id not in then[1]
    assert words(("user", 1, "what shape is it ?"))[0] != alone and words(("user", 0, "is it left ?")) == ()


def test_adapters_are_refused_at_start_up():
    with (
        pytest.raises(ValueError, match="--enable-lora is not served with 'llava'"),
        served(VLM, "uniform", 8, enable_lora=True),
    ):
        pass


def test_other_models_are_refused_by_name():
    """In what vLLM calls while it reads its options."""
    from transformers import AutoConfig

    from prunezoo.serve.config import ServedConfig

    config = AutoConfig.from_pretrained(VLM)
    config.prunezoo = {"pruner": "checkpoints/m3-tiny", "keep": 8}
    model_config = SimpleNamespace(hf_config=config, model="mine")
    config.text_config.hidden_size = 64
    with pytest.raises(ValueError, match=r"width 128 and 64"):
        ServedConfig.verify_and_update_model_config(model_config)
    config.prunezoo = {"pruner": "tome", "keep": 8}
    with pytest.raises(ValueError, match="pruner 'tome' cannot be served: it acts in the vision stage"):
        ServedConfig.verify_and_update_model_config(model_config)
    model_config.hf_config = SimpleNamespace(model_type="gemma3", prunezoo={"pruner": "uniform", "keep": 8})
    with pytest.raises(ValueError, match="model_type 'gemma3' cannot be served; llava, llava_next"):
        ServedConfig.verify_and_update_model_config(model_config)
