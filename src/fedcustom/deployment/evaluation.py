"""Evaluation of a deployed run: on the server's own data, or at the sites where it has none."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.errors import DeploymentError, UpdateError
from ..data.examples import Example, FederatedData
from ..evaluation.calibration import best_scale, tempered_losses
from ..evaluation.metrics import Metrics, client_mean, worst_client
from ..evaluation.settings import CHOICE_METRIC, PREFERENCE_METRICS, TEXT_METRICS
from ..evaluation.statistics import Statistics, pooled_metrics, pooled_scale
from ..federated.evaluator import (
    Result,
    development_predictions,
    final_predictions,
    predicted,
    with_references,
)
from ..methods import Method, State
from ..models.inference import measure
from ..models.load import Base
from ..recipe.recipe import Recipe
from .connection import SiteConnection, SiteFailure
from .memories import RemoteMemories
from .participants import Participants
from .replies import Part, SiteStatistics


class RemoteEvaluation:
    """Evaluation: quality on the server's own data where it has some, else at the sites. A site's statistics
    are left out unless they are those that the ``recipe`` asks every site for.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        base: Base,
        data: FederatedData,
        connection: SiteConnection,
        participants: Participants,
        memories: RemoteMemories,
    ) -> None:
        self.recipe, self.method, self.base, self.data = recipe, method, base, data
        self.connection, self.participants, self.memories = connection, participants, memories

    def development(self, state: State) -> Metrics:
        """Quality on the development split."""
        if self.data.development:
            return measure(
                development_predictions(self.method, state, self.data.development, self.recipe.evaluation),
                self.data.development,
                self.base,
            )
        return _pooled(self._at_sites(state, "development"), "development")

    def scale(self, state: State) -> float:
        """What a classifier's logits are best multiplied by, on the development split."""
        if examples := self.data.development:
            predictions = self.method.predict(state, examples, texts=False)
            return best_scale(tempered_losses(predictions.scores, [example.label for example in examples]))
        by_site = self._at_sites(state, "development").values()
        parts = [site.global_model for site in by_site if site.global_model is not None]
        return pooled_scale(parts) if parts else 1.0

    def test(self, state: State) -> Metrics:
        """Quality of one global state on the test split."""
        if self.data.test:
            texts = self.data.task.texts_are_scored and self.recipe.evaluation.writes_all
            return self._on_server_data(state, self.data.test, texts=texts)
        return _pooled(self._at_sites(state, "test"), "test")

    def final(self, state: State, trained: State | None = None) -> Result:
        """Quality on the test split and on every site's own test part; sites' versions are fine-tuned from
        the state as it was ``trained``, where that is another.
        """
        by_site = self._at_sites(state, "test") if self.data.task.kind != "retrieval" else {}
        by_client = {
            name: pooled_metrics([site.global_model])
            for name, site in by_site.items()
            if site.global_model is not None
        }
        tuned = by_site
        personal = any(site.personalised is not None for site in by_site.values())
        if personal and trained is not None and trained is not state:
            tuned = self._at_sites(trained, "test")
        predictions = None
        if self.data.test:
            predictions = final_predictions(
                self.method, state, self.data.test, self.data.task, self.recipe.evaluation
            )
            metrics = measure(predictions, self.data.test, self.base)
        else:
            metrics = _pooled(by_site, "test")
        sizes = self.participants.sizes
        described = {
            name: {"examples": sizes[name].train, "test_examples": sizes[name].test, **values}
            for name, values in by_client.items()
        }
        result = Result(
            metrics, described, client_mean(by_client), worst_client(by_client), predictions,
            _personalised(tuned),
        )  # fmt: skip
        return with_references(result, self.data.task, self.data.test, self.recipe.evaluation)

    def _on_server_data(self, state: State, examples: list[Example], *, texts: bool) -> Metrics:
        return measure(predicted(self.method, state, examples, texts=texts), examples, self.base)

    def _at_sites(self, state: State, part: Part) -> dict[str, SiteStatistics]:
        """The statistics of a state on one part of the data, by site; sites without any are left out."""
        names = [name for name, sizes in self.participants.sizes.items() if sizes.of(part)]
        labels = len(self.participants.labels)
        by_site = {}
        for name, reply in self.connection.evaluate(names, state, part, self.memories.after, labels):
            if isinstance(reply, SiteFailure):
                self.connection.note(f"site {name} is left out of the evaluation: {reply.reason}")
                continue
            try:
                self._check(reply, part, self.participants.sizes[name].of(part))
            except UpdateError as error:
                self.connection.note(f"site {name} is left out of the evaluation: {error}")
                continue
            by_site[name] = reply
        return by_site

    def _check(self, reply: SiteStatistics, part: Part, announced: int) -> None:
        """Refuse statistics of other models, metrics or more examples than those of the other sites: the
        figures of all sites are computed from what they have in common.

        Raises:
            UpdateError: says what is missing or was not asked for.
        """
        personal, epochs = self.method.keeps_parts(), self.recipe.personalisation.finetune_epochs
        whole = self.recipe.method.is_whole or not personal
        own = personal or bool(epochs and part == "test")
        generates = self.recipe.data.texts_are_scored and self.recipe.evaluation.writes_all
        writes = part == "test" and generates
        for name, found, wanted, texts in (
            ("the global model", reply.global_model, whole, writes),
            ("the site's own model", reply.personalised, own, False),
        ):
            if (found is not None) != wanted:
                raise UpdateError(f"statistics of {name} {'are missing' if wanted else 'were not asked for'}")
            if found is not None:
                more = PREFERENCE_METRICS if self.recipe.data.task == "preference" else ()
                metrics = {"loss", *(TEXT_METRICS if texts else more)}
                _check_figures(found, announced, metrics, choices=self.recipe.data.options is not None)


def _check_figures(found: Statistics, announced: int, metrics: set[str], *, choices: bool) -> None:
    """Refuse statistics of more examples than a site ``announced``, or of other ``metrics``. Where the recipe
    asks for ``choices``, sites whose examples have options say how often the right one was chosen.

    Raises:
        UpdateError: says which.
    """
    if found["examples"] > announced:
        raise UpdateError(
            f"statistics of {found['examples']} examples: the site announced {announced} when the run began"
        )
    asked = found.get("sums", {}).keys() - ({CHOICE_METRIC} if choices else set())
    if "sums" in found and asked != metrics:
        raise UpdateError(f"statistics of other metrics than {', '.join(sorted(metrics))}")


def _personalised(by_site: Mapping[str, SiteStatistics]) -> dict[str, Metrics]:
    """The metrics of sites' own versions of the model."""
    return {
        name: pooled_metrics([site.personalised])
        for name, site in by_site.items()
        if site.personalised is not None
    }


def _pooled(by_site: Mapping[str, SiteStatistics], part: str) -> Metrics:
    """The metrics over all sites' examples; where sites have versions of their own, the mean over sites.

    Raises:
        DeploymentError: no site evaluated.
    """
    if not by_site:
        raise DeploymentError(
            f"nobody has {part} data to evaluate on: name some in federation.toml (data.{part}), or "
            "let sites evaluate"
        )
    parts = [site.global_model for site in by_site.values() if site.global_model is not None]
    if len(parts) < len(by_site):
        return client_mean(_personalised(by_site))
    return pooled_metrics(parts)
