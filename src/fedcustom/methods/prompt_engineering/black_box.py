"""Black-box prompt tuning (BBT, Sun et al. 2022) over clients (FedBPT, Sun et al. 2023): CMA-ES over a
low-dimensional soft prompt, by forward passes alone.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import AggregationError, DataError, ModelError, RecipeError, RunError
from ...core.files import read_tensors, write_tensors
from ...core.seeds import name_seed
from ...data.encode import encode_examples, input_cut
from ...data.examples import Example
from ...data.tokens import TokenizedExample, example_order, pad
from ...models.configuration import HUB_NAMES, context_length
from ...models.forward import pooled
from ...models.inference import Predictions, to_device
from ..messages import Task, Update, Work, typed
from ..protocol import Aggregate, Answer, Client, Prompts, State, Values
from ..tuning.technique import Context
from .black_box_checks import WORST, check_search_update
from .black_box_page import soft_prompt_page
from .evolution import Array, Distribution, merge_distributions, population_size, rank_weights, search
from .messages import BLACK_BOX, SearchTask, SearchUpdate
from .prompt_method import PromptMethod
from .scorer import Matrix, Scorer, log_softmax
from .settings import PromptEngineeringSettings
from .templates import CONTENT_FREE, INPUT, PLAIN, Candidate, label_sets

SEARCH_FILE = "soft_prompt.safetensors"


class BlackBox(PromptMethod):
    """The verbs of federated black-box prompt tuning.

    The soft prompt is P = reshape(A z) + P0 (virtual tokens, embedding width): z (d,) is searched, A is a
    fixed random map that server and clients draw from the seed, with entries N(0, s^2 / d) where s is the
    standard deviation of the model's embeddings, and P0 are the embeddings of random tokens of the
    vocabulary. Each client searches for some generations from the server's N(m, sigma^2 C) on its own
    examples and sends the distribution that it arrives at. The server's mean is FedBPT's: the clients' means,
    weighted by the rank of their losses; its covariance is the weighted mean of theirs, in the place of
    FedBPT's evolution paths at the server. FedBPT's perturbed examples against overfitting are left out.

    Discloses: a client's mean, step size and covariance of the search, its number of examples and the loss at
    its mean: about as much about its data as the gradient of a soft prompt with d numbers would.
    """

    strategy = "black_box"
    messages = BLACK_BOX

    def __init__(self, settings: PromptEngineeringSettings, context: Context) -> None:
        self.settings, self.context, self.base = settings, context, context.base
        if self.base.architecture == "encoder-decoder":
            raise ModelError(
                f"method.strategy = 'black_box': {self.base.name} is an encoder-decoder; "
                "allowed: encoders and causal language models"
            )
        self.scorer = Scorer(settings, context)
        if self.scorer.generates and settings.verbalisers:
            raise RecipeError("method.verbalisers: a generation task has no labels")
        plain = PLAIN["encoder" if self.scorer.encoder else self.base.task.kind]
        (labels,) = label_sets(self.base.task.labels, settings.verbalisers)
        self.candidate = Candidate(settings.instructions[0] if settings.instructions else plain, labels)
        self.scorer.check(self.candidate, "method.instructions")
        self.population = settings.population or population_size(settings.dimensions)
        self._check_length()
        self.first, self.map = _projection(self.base.model, settings, context.seed)
        self._wrapped: Any = None

    # --- server ---

    def initialise(self) -> State:
        """N(0, sigma^2 I): the mean gives P0."""
        settings = self.settings
        full = settings.covariance == "full"
        begun = Distribution.isotropic(settings.dimensions, settings.sigma, full=full)
        return State(_tensors(begun), {}, {"round": 0, "sigma": settings.sigma})

    def configure(self, state: State, round_number: int, work: Mapping[str, Work]) -> dict[str, Task]:
        """Search from the server's distribution."""
        sigma = state.values["sigma"]
        return {
            name: SearchTask(dict(state.tensors), round_number=round_number, sigma=sigma) for name in work
        }

    def check(self, task: Task, update: Update) -> None:
        """Refuse what no search from the task's distribution can have come to."""
        check_search_update(task, update, self.settings.local_generations)

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """One distribution of the clients' ones."""
        received = [typed(answer.update, SearchUpdate) for answer in answers]
        losses = [float(update.loss) for update in received]
        if self.settings.client_weights == "rank":
            weights = rank_weights(losses)
        else:
            weights = np.array([update.weight for update in received], dtype=np.float64)
            weights = weights / weights.sum()
        found = [_distribution(update.tensors, update.sigma) for update in received]
        merged = merge_distributions(found, weights)
        if not (math.isfinite(merged.sigma) and merged.sigma > 0 and np.isfinite(merged.covariance).all()):
            raise AggregationError("the clients' distributions have no variance together")
        report = {"sigma": round(merged.sigma, 6), "norm": round(float(np.linalg.norm(merged.mean)), 6)}
        values = {"round": state.values["round"] + 1, "sigma": merged.sigma}
        return Aggregate(State(_tensors(merged), {}, {**state.values, **values}), report)

    # --- client ---

    def execute(self, task: Task, client: Client) -> Update:
        """Some generations on the round's examples: the same for all candidates, so that they compare.

        Raises:
            DataError: the client has no examples.
        """
        asked, train = typed(task, SearchTask), client.data.train
        number = asked.round_number
        if not train:
            raise DataError(f"client {client.name!r} has no examples to score prompts on")
        count = min(self.settings.examples, len(train))
        seed = [self.context.seed, 24, name_seed(client.name)]
        examples = [train[i] for i in example_order(len(train), (number - 1) * count, number * count, seed)]
        digest = hashlib.sha256(repr([*seed, number]).encode()).digest()
        found = search(
            _distribution(asked.tensors, asked.sigma),
            lambda point: self.loss(point, examples),
            generations=self.settings.local_generations,
            population=self.population,
            seed=int.from_bytes(digest[:4], "big"),
        )
        return SearchUpdate(
            _tensors(found),
            float(len(train)),
            loss=self.loss(found.mean, examples),
            sigma=found.sigma,
            examples=len(train),
        )

    def loss(self, point: Array, examples: list[Example]) -> float:
        """Mean cross-entropy of the labels, or mean loss a target token, under the soft prompt of a point."""
        prefix = self.soft_prompt(point)
        if self.scorer.generates:
            losses, tokens = self._target_scores(prefix, examples).T
            value = float(losses.sum() / tokens.sum())
        else:
            labels = np.array([example.label for example in examples])
            odds = log_softmax(self._logits(prefix, examples))
            value = float(-odds[np.arange(len(labels)), labels].mean())
        return value if math.isfinite(value) else WORST

    def predict(
        self, state: State, examples: list[Example], client: Client | None = None, *, texts: bool
    ) -> Predictions:
        """What the model says under the mean's soft prompt."""
        prefix = self.soft_prompt(_mean(state))
        if not self.scorer.generates:
            return Predictions(self._logits(prefix, examples))
        prompts = [self.candidate.fill(text) for text in self.scorer.inputs(examples)]
        return self.scorer.predict_texts(prompts, examples, texts=texts, model=self._with(prefix))

    def prompts(self, state: State, examples: Sequence[Example]) -> Prompts:
        """The examples in the template, for the base model with the mean's soft prompt."""
        texts = [self.candidate.fill(text) for text in self.scorer.inputs(list(examples))]
        model = self._with(self.soft_prompt(_mean(state)))
        return Prompts(model, self.base, self.scorer.sources(texts))

    def sizes(self, state: State) -> tuple[int, int]:
        """The numbers that are searched."""
        return self.settings.dimensions, 0

    # --- result ---

    def export(self, state: State, folder: Path) -> None:
        """Write the soft prompt with its template: for a causal language model as a PEFT prompt-tuning
        adapter, and always as tensors.
        """
        prefix = self.soft_prompt(_mean(state))
        write_tensors(folder / SEARCH_FILE, {"soft_prompt": prefix, **state.tensors})
        if not self.scorer.encoder:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._with(prefix).save_pretrained(str(folder), save_embedding_layers=False)
        super().export(state, folder)
        (folder / "README.md").write_text(
            soft_prompt_page(self.base, encoder=self.scorer.encoder), encoding="utf-8"
        )

    def open(self, folder: Path) -> State:
        """The distribution that was found.

        Raises:
            RunError: it is of another size than the recipe's.
        """
        state, tensors = super().open(folder), read_tensors(folder / SEARCH_FILE)
        tensors.pop("soft_prompt", None)
        if tensors.get("mean", torch.empty(0)).shape != (self.settings.dimensions,):
            raise RunError(f"{folder / SEARCH_FILE}: has no mean of {self.settings.dimensions} dimensions")
        return State(tensors, {}, state.values)

    def prompt(self, state: State) -> dict[str, Any]:
        """The text around the soft prompt, which itself is tensors."""
        labels = dict(zip(self.base.task.labels, self.candidate.labels, strict=True))
        form: Values = {"template": self.candidate.template, "labels": labels}
        if self.scorer.encoder:
            form["descriptions"] = dict(zip(labels, self.candidate.describe(), strict=True))
        else:
            form["messages"] = [{"role": "user", "content": self.candidate.fill(INPUT)}]
            form["placeholder"] = INPUT
        calibrated = self.scorer.calibrate and not self.scorer.generates
        form |= {"calibrated": calibrated, "content_free": CONTENT_FREE, "soft_prompt": SEARCH_FILE}
        return self.described(form, {"rounds": state.values["round"], "sigma": state.values["sigma"]})

    def restore(self, content: dict[str, Any]) -> State:
        """What of the state is in the file: all but the tensors."""
        origin = content["provenance"]
        return State({}, {}, {"round": origin["rounds"], "sigma": origin["sigma"]})

    # --- parts ---

    def soft_prompt(self, point: Array) -> Tensor:
        """P = reshape(A z) + P0, (virtual tokens, embedding width)."""
        moved = self.map @ torch.from_numpy(np.ascontiguousarray(point)).float()
        return self.first + moved.view_as(self.first)

    def _logits(self, prefix: Tensor, examples: list[Example]) -> Matrix:
        if not self.scorer.encoder:
            return self.scorer.logits(self.candidate, examples, prefix)
        scores: Matrix = self._embed(examples, prefix) @ self.scorer.described(self.candidate).T
        if self.scorer.calibrate:
            free = self._embed([Example(CONTENT_FREE)], prefix)
            scores = scores - free @ self.scorer.described(self.candidate).T
        return scores / self.scorer.temperature

    @torch.inference_mode()
    def _embed(self, examples: list[Example], prefix: Tensor) -> Matrix:
        """Vectors of texts behind a soft prompt, over whose own places the mean is not taken."""
        model, padding, size = (
            self.base.model,
            self.base.tokenizer.pad_token_id,
            self.context.evaluation.batch_size,
        )
        cut, rules = input_cut(self.context.data), self.base.token_rules
        tokens = [
            TokenizedExample.of(each.ids, [])
            for each in encode_examples(self.base.tokenizer, examples, cut, rules)
        ]
        order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].text), i))
        result = np.zeros((len(examples), model.config.hidden_size))
        for start in range(0, len(order), size):
            places = order[start : start + size]
            batch = to_device(pad([tokens[i].source for i in places], padding), self.base.device)
            with self.base.autocast():
                vectors = pooled(_Prefixed(model, prefix), batch)
            result[places] = vectors.double().cpu().numpy()
        return result

    def _target_scores(self, prefix: Tensor, examples: list[Example]) -> Matrix:
        prompts = [self.candidate.fill(text) for text in self.scorer.inputs(examples)]
        return self.scorer.losses(prompts, examples, self._with(prefix))

    def _with(self, prefix: Tensor) -> Any:
        """The language model with a soft prompt, as PEFT's prompt tuning."""
        if self._wrapped is None:
            import peft

            config = peft.PromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=self.settings.prompt_length
            )
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._wrapped = peft.get_peft_model(self.base.model, config)
            config.base_model_name_or_path = HUB_NAMES.get(self.base.name, self.base.path)
            self._wrapped.requires_grad_(False)
        with torch.no_grad():
            self._wrapped.prompt_encoder["default"].embedding.weight.copy_(prefix)
        return self._wrapped.eval()

    def _check_length(self) -> None:
        limit = context_length(self.base.model.config)
        needed = self.settings.prompt_length + self.context.data.max_length
        if limit is not None and needed > limit:
            raise ModelError(
                f"method.prompt_length = {self.settings.prompt_length}: with data.max_length {needed} "
                f"positions are needed; {self.base.name} has {limit}"
            )


class _Prefixed:
    """An encoder's body behind virtual tokens, whose states are those of the real tokens."""

    def __init__(self, model: Any, prefix: Tensor) -> None:
        self.model, self.prefix, self.config = model, prefix, model.config

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        embedded = self.model.get_input_embeddings()(input_ids)
        front = self.prefix.to(embedded).expand(len(input_ids), -1, -1)
        mask = torch.cat([attention_mask.new_ones(front.shape[:2]), attention_mask], dim=1)
        output = self.model(inputs_embeds=torch.cat([front, embedded], dim=1), attention_mask=mask)
        output.last_hidden_state = output.last_hidden_state[:, front.shape[1] :]
        return output


def _projection(model: Any, settings: PromptEngineeringSettings, seed: int) -> tuple[Tensor, Tensor]:
    """P0 (virtual tokens, embedding width) and A (their product, d)."""
    words = model.get_input_embeddings().weight.detach().float().cpu()
    generator = torch.Generator().manual_seed(seed * 1000 + 25)
    chosen = torch.randint(len(words), (settings.prompt_length,), generator=generator)
    size = settings.prompt_length * words.shape[1]
    scale = float(words.std()) / math.sqrt(settings.dimensions)
    return words[chosen].clone(), torch.randn(size, settings.dimensions, generator=generator) * scale


def _tensors(distribution: Distribution) -> dict[str, Tensor]:
    return {
        "mean": torch.from_numpy(distribution.mean).float(),
        "covariance": torch.from_numpy(distribution.covariance).float(),
    }


def _distribution(tensors: Mapping[str, Tensor], sigma: float) -> Distribution:
    return Distribution(tensors["mean"].double().numpy(), sigma, tensors["covariance"].double().numpy())


def _mean(state: State) -> Array:
    mean: Array = state.tensors["mean"].double().numpy()
    return mean
