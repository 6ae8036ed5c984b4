"""LN-tuning (Zhao et al. 2023, "Tuning LayerNorm in Attention"): only normalisation layers are trained."""

from __future__ import annotations

from ...core.errors import ModelError
from ...models.load import Base
from ..bitfit.method import norm_scale_names
from ..tuning.peft_support import attach_peft, peft_tuned, task_type, upper
from ..tuning.technique import TrainableModel
from .settings import LnTuningSettings


class LnTuning:
    """PEFT's LN-tuning. What travels: scale and, where there is one, shift of every normalisation layer,
    (width) each, and the head.

    BitFit with ``norms`` trains the biases of matrices besides, and exports the model whole; this exports a
    PEFT adapter.
    """

    def __init__(self, settings: LnTuningSettings) -> None:
        self.settings = settings

    def attach(self, base: Base, seed: int) -> TrainableModel:
        """Wrap the normalisation layers with PEFT's.

        Raises:
            ModelError: the model has none.
        """
        from peft import LNTuningConfig

        scales = upper(base, norm_scale_names(base.model), self.settings.first_layer)
        layers = {name.removesuffix(".weight") for name in scales}
        layers = {name for name in layers if name.split(".")[0] not in base.head}
        if not layers:
            raise ModelError(f"method ln_tuning does not fit {base.name}: it has no normalisation layers")
        config = LNTuningConfig(
            task_type=task_type(base), target_modules=sorted(layers), modules_to_save=list(base.head) or None
        )
        return peft_tuned(base, attach_peft(base, config, "ln_tuning"))
