"""How good a state is, where the data are at the sites."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.errors import DeploymentError
from ..data.examples import Example, FederatedData
from ..evaluation.calibration import best_scale, tempered_losses
from ..evaluation.metrics import Metrics, client_mean, worst_client
from ..evaluation.statistics import Statistics, pooled_metrics, pooled_scale
from ..federated.evaluator import Result, with_references
from ..methods import Method, State
from ..models.inference import measure
from ..models.load import Base
from .remote import Remote


class RemoteEvaluation:
    """Quality on the server's own data where it has some, and on the sites' where it has none."""

    def __init__(self, remote: Remote, method: Method, base: Base, data: FederatedData) -> None:
        self.remote, self.method, self.base, self.data = remote, method, base, data

    def development(self, state: State) -> Metrics:
        """Quality on the development split."""
        if self.data.development:
            return self._here(state, self.data.development, texts=False)
        return self._pooled(self.remote.evaluate(state, "development"), "development")

    def scale(self, state: State) -> float:
        """What a classifier's logits are best multiplied by, on the development split."""
        if examples := self.data.development:
            said = self.method.predict(state, examples, texts=False)
            return best_scale(tempered_losses(said.scores, [example.label for example in examples]))
        told = self.remote.evaluate(state, "development").values()
        parts = [statistics["whole"] for statistics in told if "whole" in statistics]
        return pooled_scale(parts) if parts else 1.0

    def test(self, state: State) -> Metrics:
        """Quality of one global state on the test split."""
        if self.data.test:
            return self._here(state, self.data.test, texts=self.data.task.kind != "classification")
        return self._pooled(self.remote.evaluate(state, "test"), "test")

    def final(self, state: State, trained: State | None = None) -> Result:
        """Quality on the test split and on every site's own test part; sites' versions are fine-tuned from
        the state as it was ``trained``, where that is another.
        """
        by_site = self.remote.evaluate(state, "test") if self.data.task.kind != "retrieval" else {}
        whole = {name: pooled_metrics([told["whole"]]) for name, told in by_site.items() if "whole" in told}
        tuned = by_site
        if trained is not None and trained is not state and any("own" in told for told in by_site.values()):
            tuned = self.remote.evaluate(trained, "test")
        own = {name: pooled_metrics([told["own"]]) for name, told in tuned.items() if "own" in told}
        predictions = None
        if self.data.test:
            texts = self.data.task.kind != "classification"
            predictions = self.method.predict(state, self.data.test, texts=texts)
            metrics = measure(predictions, self.data.test, self.base)
        else:
            metrics = self._pooled(by_site, "test")
        described = {
            name: {
                "examples": self.remote.sizes[name]["train"],
                "test_examples": self.remote.sizes[name]["test"],
                **values,
            }
            for name, values in whole.items()
        }
        result = Result(metrics, described, client_mean(whole), worst_client(whole), predictions, own)
        return with_references(result, self.data.task, self.data.test)

    def _here(self, state: State, examples: list[Example], *, texts: bool) -> Metrics:
        return measure(self.method.predict(state, examples, texts=texts), examples, self.base)

    def _pooled(self, by_site: Mapping[str, Mapping[str, Statistics]], part: str) -> Metrics:
        told = [statistics.get("whole") or statistics["own"] for statistics in by_site.values()]
        if not told:
            raise DeploymentError(
                f"nobody has {part} data to evaluate on: name some in federation.toml (data.{part}), or "
                "let sites evaluate"
            )
        if any("whole" not in statistics for statistics in by_site.values()):
            return client_mean({name: pooled_metrics([s["own"]]) for name, s in by_site.items()})
        return pooled_metrics(told)
