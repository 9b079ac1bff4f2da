"""The laboratory for low-rank adaptation: adapt, train, prove, compare and serve.

The public names, resolved on first use, so that `import loralab` loads no torch.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_WHERE = {
    "LoRA": "adapters.methods",
    "AdaLoRA": "adapters.methods",
    "Bottleneck": "adapters.methods",
    "Prefix": "adapters.methods",
    "Prompt": "adapters.methods",
    "IA3": "adapters.methods",
    "BitFit": "adapters.methods",
    "FullFineTune": "adapters.methods",
    "LinearProbe": "adapters.methods",
    "Method": "adapters.methods",
    "MethodSpec": "adapters.registry",
    "register": "adapters.registry",
    "LinearWithLoRA": "adapters.linear",
    "Adapter": "adapters.adapter",
    "attach": "adapters.attach",
    "attached": "adapters.several",
    "combine": "adapters.combine",
    "disabled": "adapters.several",
    "routed": "adapters.routing",
    "load": "adapters.load",
    "fingerprint": "adapters.fingerprint",
    "Training": "training.settings",
    "Evaluation": "training.settings",
    "train": "training.run",
    "train_many": "training.many",
    "TrainJob": "training.jobs",
    "evaluate": "training.evaluation",
    "generate": "training.evaluation",
    "plan": "training.plan",
    "merge": "artefacts.merge",
    "export": "artefacts.export",
    "certify": "artefacts.certificate",
    "check": "artefacts.engines",
    "verify": "artefacts.verify",
    "audit": "artefacts.audit.audit",
    "inspect": "artefacts.inspect",
    "card": "artefacts.card",
    "push": "integrations.hub",
    "serve": "serving.serve",
    "StudyOptions": "studies.study",
    "study": "studies.conduct",
    "report": "studies.conduct",
    "recommend": "studies.conduct",
    "predict": "studies.prediction.predict",
    "LoralabError": "errors",
    "read": "tasks.given",
    "resolve": "models.source",
}

__all__ = ["__version__", *sorted(_WHERE)]  # noqa: PLE0604  (all names are strings)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'loralab' has no attribute {name!r}")
    return getattr(importlib.import_module(f"loralab.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
