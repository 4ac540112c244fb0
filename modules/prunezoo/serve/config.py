"""What is settled of a served model before it is built: refusals at start-up, and how vLLM keeps its positions."""

from types import SimpleNamespace
from typing import Any

from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.config.model import ModelConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from ..core.base_model import check_base_model
from ..core.errors import PruneZooError
from .settings import ARCHITECTURE, Settings
from .shapes import AXES, DIVIDED, PLAIN, family_of


def register_architecture() -> None:
    """Enter the architecture, a name of our own beside vLLM's."""
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.model:{ARCHITECTURE}")
        MODELS_CONFIG_MAP[ARCHITECTURE] = ServedConfig


class ServedConfig(VerifyAndUpdateConfig):
    """What vLLM asks of an architecture while it reads its options."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Refuse a model or a pruner that cannot be served, and have a position kept for each token.

        Raises:
            PruneZooError: The message says what works instead.
        """
        config = model_config.hf_config
        settings = Settings.of(config)
        family = family_of(config)
        pruner = settings.load()
        check_base_model(
            pruner.name, pruner.base_model, SimpleNamespace(config=config, name_or_path=model_config.model)
        )
        if settings.positions == "original":
            keep_positions(model_config)
        elif AXES[config.model_type] != PLAIN:
            raise PruneZooError(
                "positions='compact' means nothing where tokens have a place in height and width: serve "
                f"{family.title} with 'original'"
            )

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what vLLM would do besides.

        Raises:
            PruneZooError: A draft model, adapters, several stages of a pipeline, or several processes that divide the
                heads of a tower where that is not tested.
        """
        parallel, kind = vllm_config.parallel_config, vllm_config.model_config.hf_config.model_type
        others = {
            "--speculative-config": vllm_config.speculative_config,
            "--enable-lora": vllm_config.lora_config,
            "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
            "--tensor-parallel-size": parallel.tensor_parallel_size > 1 and kind not in DIVIDED,
        }
        for option, value in others.items():
            if value:
                raise PruneZooError(f"{option} is not served with '{kind}' under a pruner: leave it out")


def keep_positions(model_config: ModelConfig) -> None:
    """Have vLLM keep a table of positions, and ask the model to correct it, as of its own models that prune clips.

    It does where the config of the rotary embedding has sections for axes; a model of `transformers` whose type of
    embedding knows none pays no heed to them.
    """
    text: Any = model_config.hf_text_config
    text.rope_parameters = {"mrope_section": [1, 1, 1], **text.rope_parameters}
    assert model_config.multimodal_config is not None
    model_config.multimodal_config.video_pruning_rate = 0.5  # no clip is read; any rate switches it on
