"""The development loss of adapters, all by the same code: ``evaluate.py JOB ADAPTER...``, a JSON list."""

from __future__ import annotations

import json
import sys

import peft
from work import Job, development_loss


def main() -> None:
    """Print the losses in the order of the adapters."""
    job = Job(sys.argv[1])
    model, losses = job.model(), []
    for folder in sys.argv[2:]:
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(folder, device="cpu"))
        losses.append(development_loss(model, job))
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
