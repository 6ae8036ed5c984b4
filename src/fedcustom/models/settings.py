"""The recipe's section on the base model."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ..core.settings import Settings


class ModelSettings(Settings):
    """The pretrained model that is customised."""

    base: str = Field(
        "builtin:minilm",
        description="builtin:minilm (encoder); builtin:lm, builtin:lm-small or builtin:smollm2 (decoders); a "
        "folder, a hub id",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model")
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "float32",
        description="Precision of forward and backward passes, but for attention where a processor trains: "
        "that is float32; auto: the faster in two steps on this machine",
    )
    pooling: Literal["auto", "mean", "first", "max", "last", "pooler"] = Field(
        "auto",
        description="Classification with an encoder: which vector is classified. mean: of all tokens' "
        "states; first, last: one token's; pooler: BERT's pooling layer; auto: as a sentence-transformers "
        "model says (1_Pooling), else the architecture's own head",
    )
    normalize: bool | None = Field(
        None,
        description="Divide that vector by its length; unset: as a sentence-transformers model says, else no",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] | None = Field(
        None,
        description="Implementation of attention. sdpa: PyTorch's own; eager: plain products; "
        "flash_attention_2: the package flash-attn, on a GPU in bfloat16; unset, or auto: as transformers "
        "chooses",
    )
    quantization: Literal["int8", "int4", "nf4"] | None = Field(
        None,
        description="Store the frozen matrices of the base in 8 or 4 bits (docs/memory.md): int8, int4 by "
        "torchao; nf4 by bitsandbytes. What is trained stays in float32; unset: as dtype says",
    )
    device_map: Literal["auto"] | None = Field(
        None,
        description="auto: spread the layers of the base over the GPUs of this machine (accelerate); unset: "
        "one device",
    )
    compile: bool = Field(
        False,
        description="Train through torch.compile, client by client: minutes at the start, for long runs of "
        "large models (needs a C++ compiler on a CPU)",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run Python code that comes with a hub model; leave off unless you have read that code",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto: a GPU where there is one")

    @model_validator(mode="after")
    def _placed_once(self) -> Self:
        if self.device_map is not None and self.device != "auto":
            raise ValueError(f"device_map = {self.device_map!r}: does not go with device = {self.device!r}")
        if self.compile and (self.device_map or self.quantization):
            setting = "device_map" if self.device_map else "quantization"
            raise ValueError(f"{setting} = {getattr(self, setting)!r}: does not go with compile = true")
        return self
