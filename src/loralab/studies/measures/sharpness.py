"""Sharpness: the largest eigenvalue of the loss's Hessian in the trained parameters.

Power iteration with Hessian-vector products; nothing of the Hessian is ever formed. The eigenvalue
meant is the largest one, not the one of largest size. Where a negative one is as large in size, the
iteration is made once more with the Hessian shifted above zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from loralab.studies.measures.one_batch import first_rows, mean_loss
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell, scored, trained

MEASURE_SHARPNESS = "loralab.studies.measures.sharpness:measure"
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """Largest eigenvalue, found with so many `products`.

    Of the unit vector v that was found, `residual` is |H v - value v| over |value| and `image` is |H v|.
    """

    value: float
    residual: float
    products: int
    image: float


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train and score; then measure the sharpness on the first training rows, in fp32."""
    run = trained(trial, folder, tell)
    record = scored(trial, run, folder)
    run.base.model.float()
    batch = first_rows(trial.setup, run.base, run.task)
    found = sharpness(mean_loss(run.base, batch), run.adapter.parameters(), seed=trial.seed)
    numbers = {"sharpness": found.value, "sharpness_residual": found.residual, "products": found.products}
    return replace(record, numbers={**record.numbers, **numbers})


def sharpness(
    loss_of: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    *,
    products: int = 200,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Sharpness:
    """Return the largest eigenvalue of the Hessian of a loss.

    Args:
        loss_of: the loss of one batch, without random numbers; it is computed once.
        parameters: what the Hessian is in, such as an adapter's.
        products: Hessian-vector products of each of the two iterations, at least 1.
        tolerance: the residual at which it ends.
        seed: of the vector that it begins with.
    """
    # the quick forms of attention have no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(loss_of(), list(parameters), create_graph=True, allow_unused=True)
        pairs = [(g, p) for g, p in zip(gradients, parameters, strict=True) if g is not None]
        gradient = torch.cat([g.flatten() for g, _ in pairs])
        followed = [p for _, p in pairs]

        def product(vector: Tensor) -> Tensor:
            found = torch.autograd.grad(gradient, followed, vector, retain_graph=True, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for g, p in zip(found, followed, strict=True)]
            return torch.cat([g.flatten() for g in filled])

        draw = torch.Generator().manual_seed(seed)
        start = torch.randn(len(gradient), generator=draw).to(gradient)
        found = _farthest(product, start, products, tolerance)
        if found.value > 0 and found.residual <= tolerance:
            return found
        # a negative eigenvalue is as large in size, or larger: seen from below all, the largest is the farthest
        again = _farthest(product, start, products, tolerance, shift=found.image)
        return replace(again, products=found.products + again.products)


def _farthest(product: Product, start: Tensor, products: int, tolerance: float, shift: float = 0.0) -> Sharpness:
    """Return the eigenvalue of largest size after `shift` is added to all, as far as the products go."""
    vector, found = start / start.norm(), None
    for made in range(1, products + 1):
        image = product(vector)
        value, length = float(vector @ image), float(image.norm())
        residual = float((image - value * vector).norm()) / max(abs(value), 1e-30)
        found = Sharpness(value=value, residual=residual, products=made, image=length)
        moved = image + shift * vector
        if residual <= tolerance or not moved.norm() > 0:
            break
        vector = moved / moved.norm()
    assert found is not None
    return found
