"""Language models that score public texts for distillation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import ModelError
from ...core.tensors import Tensors
from ...data.tokens import Batch
from ...models.inference import to_device
from ..tuning.technique import Context
from .alignment import Vocabulary
from .packing import Floats, Format, Integers, TopK
from .settings import DistillationSettings
from .student import StudentModel

Ids = np.ndarray[Any, np.dtype[np.int32]]


class Speaker:
    """A language model with its tokens of the public texts."""

    def __init__(self, learner: StudentModel, context: Context, settings: DistillationSettings) -> None:
        if learner.base.architecture != "decoder":
            raise ModelError(
                f"method.name = 'distillation': {learner.base.name} is an {learner.base.architecture}; "
                "for generation only causal language models tell each other of their next tokens"
            )
        self.learner, self.settings = learner, settings
        self.vocabulary = Vocabulary.of(learner.base.tokenizer)
        self.texts: list[Ids] = [tokens.source for tokens in learner.tokens(context.public)]
        self.format = Format(int(learner.base.model.config.vocab_size), settings.top_k, settings.bits)
        if self.format.whole:
            raise ModelError(
                f"method.top_k = {settings.top_k}: {learner.base.name} has {self.format.labels} tokens only"
            )

    def places(self, text: int) -> int:
        """How many tokens of a text are predicted: all but the first."""
        return max(0, len(self.texts[text]) - 1)

    def rows(self, texts: Integers) -> Integers:
        """Where each text's rows begin, and where the last one's end."""
        return np.cumsum([0, *(self.places(int(text)) for text in texts)])

    def plain(self, text: int) -> Integers:
        """The positions of a text's tokens that are not special."""
        special = set(self.vocabulary.special.values())
        return np.array(
            [i for i, token in enumerate(self.texts[text]) if int(token) not in special], np.int64
        )

    @torch.inference_mode()
    def log_probabilities(self, tensors: Tensors, texts: Integers) -> Iterator[tuple[int, Tensor]]:
        """For each text its number and the model's log-probabilities (places, vocabulary) of the next
        token.
        """
        self.learner.put(tensors)
        self.learner.trainable.model.eval()
        size = self.settings.distil_batch_size
        longest_first = sorted((int(t) for t in texts), key=lambda t: (-len(self.texts[t]), t))
        for start in range(0, len(longest_first), size):
            chosen = longest_first[start : start + size]
            logits = self.logits(self.batch(chosen))
            for row, text in enumerate(chosen):
                yield text, torch.log_softmax(logits[row, : self.places(text)], dim=1).cpu()

    def top_k(self, tensors: Tensors, texts: Integers) -> TopK:
        """The largest probabilities at each place of the texts, one text after the other."""
        found = {}
        for text, logs in self.log_probabilities(tensors, texts):
            kept, labels = logs.double().exp().topk(self.format.sent, dim=1)
            rest = (1 - kept.sum(1)).clamp(0, 1)
            found[text] = TopK(labels.numpy(), kept.numpy(), rest.numpy())
        said = [found[int(text)] for text in texts]
        return TopK(*(np.concatenate(parts) for parts in zip(*map(_parts, said), strict=True)))

    def losses(self, tensors: Tensors, texts: Integers) -> dict[int, Floats]:
        """For each text the loss (nats) at each place."""
        return {
            text: -logs.gather(1, torch.from_numpy(self.texts[text][1:, None].astype(np.int64)))[:, 0]
            .double()
            .numpy()
            for text, logs in self.log_probabilities(tensors, texts)
        }

    def batch(self, texts: Iterable[int]) -> Batch:
        """Padded token ids and attention mask of (texts, tokens)."""
        rows = [torch.from_numpy(self.texts[text].astype(np.int64)) for text in texts]
        pad = self.learner.base.tokenizer.pad_token_id
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return to_device({"input_ids": ids, "attention_mask": mask}, self.learner.base.device)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of (texts, tokens, vocabulary) in float32."""
        with self.learner.base.autocast():
            logits: Tensor = self.learner.trainable.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        return logits.float()


def _parts(rows: TopK) -> tuple[Any, Any, Any]:
    return rows.labels, rows.probabilities, rows.rest
