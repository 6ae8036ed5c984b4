"""A site: ``transformers.Trainer`` on the job's batches, federated by ``nvflare.client.hf``."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import nvflare.client.hf as flare
import torch
import transformers
from nvflare.app_common.abstract.fl_model import MetaKey
from work import Job


class JobTrainer(transformers.Trainer):  # type: ignore[misc]
    """The Trainer with the job's batches of each round, in the job's order; it notes the losses."""

    def __init__(self, job: Job, client: str, **named: Any) -> None:
        super().__init__(**named)
        self.job = job
        self.items = [plan[client] for plan in job.rounds]
        self.round = 0
        self.noted: list[tuple[float, int]] = []

    def get_train_dataloader(self) -> Any:
        """One round's batches."""
        batches = self.items[self.round]["batches"]
        return torch.utils.data.DataLoader(
            range(len(self.job.examples)), batch_sampler=batches, collate_fn=self.job.batch
        )

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
        """The Trainer's own loss."""
        loss = super().compute_loss(model, inputs, *args, **named)
        self.noted.append((loss.item(), len(inputs["labels"])))
        return loss


class Told(transformers.TrainerCallback):  # type: ignore[misc]
    """Leaves a round's loss for the server before NVFlare sends the adapter, which it does when the training
    ends.
    """

    def __init__(self, result: Path, site: int) -> None:
        self.result, self.site = result, site
        self.trainer: Any = None

    def on_train_end(self, *args: Any, **named: Any) -> None:
        """A round's training has ended."""
        trainer = self.trainer
        seen = sum(count for _, count in trainer.noted)
        loss = sum(loss * count for loss, count in trainer.noted) / seen
        file = self.result / f"loss-{trainer.round}-{self.site}.json"
        file.write_text(json.dumps({"loss": loss, "seen": seen}), encoding="utf-8")
        trainer.noted.clear()


def without_dropout(model: Any) -> Any:
    """The Trainer trains in train mode, in which the model must compute what it does for the others."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def main() -> None:
    """``flare_client.py JOB RESULT``, which NVFlare starts at every site."""
    torch.set_num_threads(1)
    folder, result = sys.argv[1], Path(sys.argv[2])
    flare.init()
    site = int(flare.get_site_name().removeprefix("site-")) - 1
    job = Job(folder)
    client = job.clients[site]
    model = without_dropout(job.model())
    steps = {len(plan[client]["batches"]) for plan in job.rounds}
    told = Told(result, site)
    with tempfile.TemporaryDirectory() as space:
        trainer = JobTrainer(
            job,
            client,
            model=model,
            train_dataset=range(len(job.examples)),
            callbacks=[told],
            args=transformers.TrainingArguments(
                output_dir=space,
                per_device_train_batch_size=len(job.rounds[0][client]["batches"][0]),
                max_steps=max(steps),
                optim="adamw_torch",
                learning_rate=job.learning_rate,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=job.clip_norm,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
            ),
        )
        told.trainer = trainer
        flare.patch(trainer, restore_state=False)
        while flare.is_running():
            # FedAvg weighs sites by this number.
            model.__fl_meta__ = {MetaKey.NUM_STEPS_CURRENT_ROUND: trainer.items[trainer.round]["weight"]}
            trainer.train()
            trainer.round += 1


if __name__ == "__main__":
    main()
