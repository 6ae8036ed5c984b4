"""Virtual tokens trained through a network that stays at the client (Li and Liang 2021; Liu et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.tensors import Tensors
from .technique import TrainableModel


@dataclass(frozen=True)
class Network:
    """A network through which virtual tokens are trained.

    With codes h_i learnt for each token i, ``mlp`` gives ``W2 tanh(W1 h_i + b1) + b2`` (prefix-tuning, Li and
    Liang 2021, section 4.3), and ``lstm`` gives ``W2 relu(W1 s_i + b1) + b2`` with s_i the states, forwards
    and backwards, of a two-layer LSTM over all codes (p-tuning, Liu et al. 2021, "GPT Understands, Too",
    section on optimisation). ``width`` is that of the codes, of the mlp's hidden layer and of the states in
    one direction. ``seed`` draws the codes and all layers but the last, which starts at zero.
    """

    kind: Literal["mlp", "lstm"]
    width: int
    seed: int


class Reparametrised(nn.Module):
    """Virtual tokens plus the output of a network, which is zero until it is trained."""

    def __init__(self, embedding: nn.Embedding, network: Network) -> None:
        super().__init__()
        self.embedding = embedding
        self.embedding.weight.requires_grad_(False)
        self.network = network
        length, numbers = embedding.weight.shape
        width = network.width
        self.codes = nn.Parameter(torch.empty(length, width))
        self.recurrent: nn.LSTM | None = None
        if network.kind == "lstm":
            self.recurrent = nn.LSTM(width, width, num_layers=2, bidirectional=True)
            width = 2 * width
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, numbers)

    def restart(self) -> None:
        """Initialise the network such that its output is zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.network.seed)
            nn.init.normal_(self.codes)
            self.hidden.reset_parameters()
            if self.recurrent is not None:
                self.recurrent.reset_parameters()
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def materialised(self) -> Tensor:
        """The virtual tokens themselves, (length, numbers)."""
        if self.recurrent is None:
            hidden = torch.tanh(self.hidden(self.codes))
        else:
            with torch.autocast(self.codes.device.type, enabled=False):  # CPUs lack LSTMs in bfloat16
                states, _ = self.recurrent(self.codes)
            hidden = torch.relu(self.hidden(states))
        change: Tensor = self.output(hidden)
        return self.embedding.weight + change

    def forward(self, positions: Tensor) -> Tensor:
        """The virtual tokens for a batch: (batch, length) to (batch, length, numbers)."""
        return self.materialised()[None].expand(positions.shape[0], -1, -1)

    def _load_adapter_state_dict(self, saved: Tensors) -> None:
        """What PEFT calls to load virtual tokens."""
        with torch.no_grad():
            self.embedding.weight.copy_(saved["prompt_embeddings"])
        self.restart()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def reparametrise(
    trainable: TrainableModel,
    model: Any,
    name: str,
    network: Network,
    *,
    to_travel: Callable[[Tensor], Tensor] = _as_it_is,
    from_travel: Callable[[Tensor], Tensor] = _as_it_is,
) -> None:
    """Train the virtual tokens of a PEFT model through a network, which is never sent.

    The network is started anew whenever tensors are put into the model, such that it changes nothing at
    first. What travels, as ``name``, are the virtual tokens with its output added. ``to_travel`` is their
    form for that, ``from_travel`` its inverse. ``tuned.parameters`` must not hold the tokens themselves.
    """
    embedding = model.prompt_encoder["default"].embedding
    tokens = Reparametrised(embedding, network).to(embedding.weight.device)
    tokens.restart()
    model.prompt_encoder["default"] = tokens
    own = {f"reparametrisation.{n}": p for n, p in tokens.named_parameters() if p.requires_grad}
    trainable.parameters.update(own)

    def read(tensors: Tensors) -> Tensors:
        travelling = {key: tensor for key, tensor in tensors.items() if key not in own}
        return {**travelling, name: to_travel(tokens.materialised())}

    def write(tensors: Tensors) -> Tensors:
        tokens.embedding.weight.copy_(from_travel(tensors.pop(name)))
        tokens.restart()
        return {**tensors, **{key: parameter.detach().clone() for key, parameter in own.items()}}

    trainable.corrects = False
    trainable.read_hook, trainable.write_hook = read, write
