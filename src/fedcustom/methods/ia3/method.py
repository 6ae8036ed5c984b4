"""(IA)^3 (Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning"): learnt vectors that rescale inner activations.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ...core.errors import ModelError
from ...models.load import Base
from ..tuning.feed_forward import find_feed_forward
from ..tuning.peft_support import attach_peft, ending_in, peft_parameters, task_type, tuned_with, upper
from ..tuning.technique import TrainableModel
from .settings import Ia3Settings

KEYS_AND_VALUES = (
    ("k_proj", "v_proj"),
    ("key", "value"),
    ("k_lin", "v_lin"),
    ("key_proj", "value_proj"),
    ("attn.k", "attn.v"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("Wqkv",),
)
"""What models call the matrices of keys and values; where queries share theirs, they are rescaled as well."""


class Ia3:
    """With l_k, l_v and l_ff learnt vectors, all ones at first, and * taken number by number::

        attention:     softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V)
        feed-forward:  W2 (l_ff * f(W1 x))

    What travels: one vector for each adapted matrix, (out, 1) where its output is rescaled and (1, in) where
    its input is, and the head. PEFT's choice for some models rescales queries in place of keys.
    """

    def __init__(self, settings: Ia3Settings) -> None:
        self.settings = settings

    def attach(self, base: Base, seed: int) -> TrainableModel:
        """Wrap the chosen matrices with PEFT's layers.

        Raises:
            ModelError: the matrices are not found; the message names the setting that says which they are.
        """
        from peft import IA3Config

        targets, feed_forward = self._chosen(base)
        if first := self.settings.first_layer:
            inputs = ending_in(base.model, [f".{name}" for name in feed_forward])
            targets = sorted(upper(base, ending_in(base.model, [f".{name}" for name in targets]), first))
            feed_forward = sorted(inputs & set(targets))
        config = IA3Config(
            task_type=task_type(base),
            target_modules=targets,
            feedforward_modules=feed_forward,
            modules_to_save=list(base.head) or None,
        )
        model = attach_peft(base, config, "ia3")
        parameters = peft_parameters(model)
        return tuned_with(base, model, {n.removesuffix(".default"): p for n, p in parameters.items()})

    def _chosen(self, base: Base) -> tuple[list[str], list[str]]:
        """The name endings of all matrices to rescale, and of those whose inputs are rescaled."""
        targets, feed_forward = self.settings.target_modules, self.settings.feedforward_modules
        if feed_forward is None:
            feed_forward = usual_feed_forward(base)
            if targets is not None:
                usual = ending_in(base.model, feed_forward)
                feed_forward = [t for t in targets if set() < ending_in(base.model, [t]) <= usual]
        if targets is None:
            targets = sorted({*usual_targets(base), *feed_forward})
        return targets, feed_forward


def usual_targets(base: Base) -> Iterable[str]:
    """PEFT's choice of matrices; for a model it does not know, those of keys and values by common names.

    Raises:
        ModelError: no matrices have such names.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as CHOICES

    if base.model.config.model_type in CHOICES:
        return list(CHOICES[base.model.config.model_type])
    for names in KEYS_AND_VALUES:
        if all(ending_in(base.model, [f".{name}"]) for name in names):
            return names
    raise ModelError(_unknown(base, "method.target_modules"))


def usual_feed_forward(base: Base) -> list[str]:
    """PEFT's choice of matrices whose inputs are rescaled; for a model it does not know, those out of the
    hidden units of feed-forward networks.

    Raises:
        ModelError: the model has no feed-forward networks that can be found.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as CHOICES

    if base.model.config.model_type in CHOICES:
        return list(CHOICES[base.model.config.model_type])
    found = find_feed_forward(base)
    if found is None:
        raise ModelError(_unknown(base, "method.feedforward_modules"))
    return endings(base.model, found.outputs)


def endings(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """The shortest name endings that belong to the wanted matrices and to no others."""
    wanted = set(wanted)
    for parts in range(1, max(name.count(".") for name in wanted) + 1):
        found = {".".join(name.split(".")[-parts:]) for name in wanted}
        if ending_in(model, found) == wanted:
            return sorted(found)
    return sorted(wanted)


def _unknown(base: Base, setting: str) -> str:
    return (
        f"method ia3 does not fit {base.name} by itself: neither PEFT nor fedcustom knows the matrices of "
        f"its {base.model.config.model_type} code; name them in {setting}"
    )
