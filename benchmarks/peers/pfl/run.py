"""Apple's pfl: its federated averaging on its simulated backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from work import Job, Record, read


class Module(torch.nn.Module):
    """What pfl asks of a model: its loss of a batch."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.inner = job.model()
        self.noted: list[tuple[float, float]] = []

    def loss(self, **batch: Any) -> Any:
        """The mean loss."""
        loss = self.inner(**batch).loss
        self.noted.append((loss.item(), len(batch["labels"])))
        return loss

    def metrics(self, **batch: Any) -> dict[str, Any]:
        """None: quality is not what is compared."""
        return {}


class Batches(Dataset):  # type: ignore[misc]
    """One client's batches of one round, as the job has them."""

    def __init__(self, job: Job, name: str, item: dict[str, Any]) -> None:
        super().__init__([[]], user_id=name)
        self.job, self.item = job, item

    def __len__(self) -> int:
        return int(self.item["weight"])

    def iter(self, batch_size: int | None) -> Iterator[dict[str, Any]]:
        """The batches."""
        return map(self.job.batch, self.item["batches"])


class Rounds(TrainingProcessCallback):  # type: ignore[misc]
    """Notes when rounds begin and end."""

    def __init__(self, record: Record, module: Module) -> None:
        self.record, self.module = record, module

    def on_train_begin(self, *, model: Any) -> Metrics:
        """The first round begins."""
        self.record.begin()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        """A round has ended."""
        self.record.end(self.module.noted)
        self.module.noted = []
        self.record.begin()
        return False, Metrics()


def main() -> None:
    """``run.py JOB RESULT``."""
    job = Job(sys.argv[1])
    record, module = Record(job, sys.argv[2]), Module(job)
    planned = iter([(name, item) for plan in job.rounds for name, item in plan.items()])
    model = PyTorchModel(
        module,
        local_optimizer_create=lambda parameters, lr: torch.optim.AdamW(
            [p for p in parameters if p.requires_grad], lr=lr, weight_decay=0.0
        ),
        central_optimizer=torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0),
    )
    data = FederatedDataset(lambda pair: Batches(job, *pair), lambda: next(planned))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=len(job.rounds),
            evaluation_frequency=10**9,
            train_cohort_size=len(job.rounds[0]),
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_learning_rate=job.learning_rate,
            local_num_epochs=1,
            local_batch_size=None,
            local_max_grad_norm=job.clip_norm,
        ),
        callbacks=[Rounds(record, module)],
        send_metrics_to_platform=False,
    )
    note = "round 1 evaluates every client before and after its training, which cannot be switched off"
    record.save(module.inner, read(module.inner), note=note)


if __name__ == "__main__":
    main()
