"""BitFit (Ben Zaken et al. 2022): only bias vectors are trained."""

from __future__ import annotations

from torch import nn

from ...core.errors import ModelError
from ...models.load import Base
from ..tuning.peft_support import upper
from ..tuning.technique import TrainableModel
from ..tuning.whole_model import partly_trained
from .settings import BitFitSettings


class BitFit:
    """What travels: every bias of the model (those of matrices and of normalisation layers), with ``norms``
    every normalisation scale, and the head. The customised model is exported whole.
    """

    def __init__(self, settings: BitFitSettings) -> None:
        self.settings = settings

    def attach(self, base: Base, seed: int) -> TrainableModel:
        """Freeze everything but biases, with ``norms`` normalisation scales, and the head.

        Raises:
            ModelError: the model has no such parameters.
        """
        chosen = bias_names(base.model)
        if self.settings.norms:
            chosen |= norm_scale_names(base.model)
        if all(name.split(".")[0] in base.head for name in chosen):
            lacks = (
                "it has neither biases nor normalisation scales; use method lora"
                if self.settings.norms
                else "it has no biases; set method.norms = true to train normalisation scales"
            )
            raise ModelError(f"method bitfit does not fit {base.name}: {lacks}")
        kept = upper(base, chosen, self.settings.first_layer, head_alone=True)
        return partly_trained(base, seed, kept)


def bias_names(model: nn.Module) -> set[str]:
    """The bias vectors. T5's table of relative positions, an embedding that is called a bias, is not one."""
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if name.rpartition(".")[2] == "bias" or name.endswith("_bias")}


def norm_scale_names(model: nn.Module) -> set[str]:
    """The scales of normalisation layers, which are modules of some class called a norm."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.dim() == 1
    }
