"""Sites' updates as the server reads them: one that does not pass is that site's failure in that round."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fedcustom.deployment.nvflare.messenger import SiteReply
from fedcustom.deployment.replies import PartSizes
from fedcustom.deployment.transport import RemoteTransport
from fedcustom.methods.tuning.messages import MESSAGES, TrainTask, TrainUpdate
from fedcustom.transport.channel import Channel, Packed, task_length
from fedcustom.updates.pipeline import update_transforms
from fedcustom.updates.settings import CompressionSettings

SOUND = {"weight": 8.0, "loss": 1.5, "examples": 8, "steps": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"steps": True}, "answer to 'train': steps: input should be a valid integer"),
        ({"loss": float("nan")}, "answer to 'train': loss: input should be a finite number"),
        ({"layers": [0]}, "answer to 'train': unknown key 'layers'"),
        ({"weight": 9.0}, "weight 9: the site announced 8 training examples"),
        ({"weight": 1.0}, "weight 1: the site announced 8 training examples"),
    ],
)
def test_an_update_is_read_or_is_a_failure(change: dict[str, Any], reason: str) -> None:
    state = {"w": torch.zeros(3)}
    task = TrainTask(state, round_number=1)
    sent = SiteReply({**SOUND, **change}, Packed({"w": torch.ones(3)}), 200)
    settings, nothing = CompressionSettings(), cast(Any, None)
    participants = cast(Any, SimpleNamespace(clients=[], sizes={"a": PartSizes(train=8)}))
    method = cast(Any, SimpleNamespace(messages=MESSAGES, check=lambda task, update: None))
    transport = RemoteTransport(method, Channel(settings, state), (), nothing, participants, nothing, 1)
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


@pytest.mark.parametrize(
    "layout",
    [{"w": ["F32", [2**31 - 1]]}, {"w": ["F32", [2**30] * 8]}, {f"{i}": ["F32", [2**22]] for i in range(9)}],
)
def test_a_short_message_cannot_stand_for_a_huge_change(layout: dict[str, Any]) -> None:
    """top_k keeps a thousandth: by its layout, a message would become a thousand times as long."""
    state, settings = {"w": torch.zeros(3)}, CompressionSettings(kind="top_k", fraction=0.001)
    task, nothing = TrainTask(state, round_number=1), cast(Any, SimpleNamespace(clients=[]))
    codes = {
        "gaps": torch.zeros(1, dtype=torch.uint8),
        "numbers": torch.ones(1).half(),
        "scales": torch.ones(1).bfloat16(),
    }
    method = cast(Any, SimpleNamespace(messages=MESSAGES, check=lambda task, update: None))
    transforms = update_transforms(settings)
    transport = RemoteTransport(method, Channel(settings, state), transforms, nothing, nothing, nothing, 1)
    reply = transport._unpacked(
        "a", task, task_length(task), SiteReply(dict(SOUND), Packed(codes, layout), 200)
    )
    assert reply.update is None
    assert reply.reason.endswith("a compressed change of far more numbers than were sent")
