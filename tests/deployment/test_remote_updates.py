"""Sites' updates as the server reads them: one that does not pass is that site's failure in that round."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fedcustom.deployment.nvflare.messenger import SiteReply
from fedcustom.deployment.transport import RemoteTransport
from fedcustom.methods.tuning.messages import MESSAGES, TrainTask, TrainUpdate
from fedcustom.transport.channel import Channel, Packed, task_length
from fedcustom.updates.settings import CompressionSettings

SOUND = {"weight": 8.0, "loss": 1.5, "examples": 8, "steps": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"steps": True}, "answer to 'train': steps: input should be a valid integer"),
        ({"loss": float("nan")}, "answer to 'train': loss: input should be a finite number"),
        ({"layers": [0]}, "answer to 'train': unknown key 'layers'"),
    ],
)
def test_an_update_is_read_or_is_a_failure(change: dict[str, Any], reason: str) -> None:
    state = {"w": torch.zeros(3)}
    task = TrainTask(state, round_number=1)
    sent = SiteReply({**SOUND, **change}, Packed({"w": torch.ones(3)}), 200)
    settings, nothing = CompressionSettings(), cast(Any, SimpleNamespace(clients=[]))
    method = cast(Any, SimpleNamespace(messages=MESSAGES, check=lambda task, update: None))
    transport = RemoteTransport(method, Channel(settings, state), (), nothing, nothing, nothing, 1)
    reply = transport._unpacked("a", task, task_length(task), sent)
    assert reply.reason.startswith(reason)
    assert (reply.update is None) == bool(reason)
    if reply.update is not None:
        assert isinstance(reply.update, TrainUpdate)
        assert (reply.update.loss, reply.update.steps, reply.update.tensors["w"].tolist()) == (
            1.5,
            1,
            [1] * 3,
        )
