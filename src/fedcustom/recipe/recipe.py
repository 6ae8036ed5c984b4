"""The recipe of a run, read from one TOML file and checked."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import tomli_w
from pydantic import Field, ValidationError, model_validator

from ..aggregation.settings import AggregationSettings
from ..core.errors import RecipeError
from ..core.settings import Settings
from ..data.settings import ClientSettings, DataSettings, PublicSettings, TaskKind
from ..evaluation.settings import EvaluationSettings
from ..methods import registry
from ..methods.prefix.settings import PrefixSettings
from ..methods.settings import MethodSettingsBase
from ..models.settings import ModelSettings
from ..privacy.secure_sum.settings import SecureSumSettings
from ..privacy.settings import PrivacySettings
from ..simulation.settings import AttackSettings, NoiseSettings, ParticipationSettings
from ..training.settings import TrainingSettings
from ..transport.workers.settings import WorkerSettings
from ..updates.settings import CompressionSettings
from .combinations import check_combinations
from .help import explain, explained, nearest
from .label_skew import settled
from .objective import with_task_of_objective
from .overrides import UNSET, merged, nested, split
from .paths import beside, existing
from .privacy import with_private_defaults
from .sections import FEDERATED_ONLY, PersonalisationSettings, RoundSettings
from .tracking import TrackingSettings

Baseline = Literal["federated", "centralised", "local"]

if TYPE_CHECKING:
    MethodSettings = MethodSettingsBase
else:
    MethodSettings = registry.settings_union()  # of every method that is registered, told apart by name

DEFAULT_METRIC: dict[TaskKind, str] = {
    "classification": "accuracy",
    "generation": "loss",
    "chat": "loss",
    "preference": "loss",
    "retrieval": "mrr",
}


class Recipe(Settings):
    """One job: model, data, clients, method, local training, aggregation, rounds, evaluation and seed."""

    seed: int = Field(
        0, ge=0, le=2**31, description="Seed of everything random: the same seed gives the same result"
    )
    baseline: Baseline = Field(
        "federated",
        description="federated; centralised: one client holds all data; local: clients alone, nothing merged",
    )
    model: ModelSettings = Field(default_factory=lambda: ModelSettings(), description="Base model")
    data: DataSettings = Field(default_factory=lambda: DataSettings(), description="Data and task")
    clients: ClientSettings = Field(
        default_factory=lambda: ClientSettings(), description="Clients and partition"
    )
    public: PublicSettings = Field(
        default_factory=lambda: PublicSettings(), description="Public unlabelled set"
    )
    method: Annotated[MethodSettings, Field(discriminator="name")] = Field(
        default_factory=lambda: PrefixSettings(), description="Way of customising"
    )
    training: TrainingSettings = Field(
        default_factory=lambda: TrainingSettings(), description="Local training"
    )
    aggregation: AggregationSettings = Field(
        default_factory=lambda: AggregationSettings(), description="Aggregation"
    )
    personalisation: PersonalisationSettings = Field(
        default_factory=lambda: PersonalisationSettings(), description="Personalisation"
    )
    rounds: RoundSettings = Field(default_factory=lambda: RoundSettings(), description="Rounds")
    evaluation: EvaluationSettings = Field(
        default_factory=lambda: EvaluationSettings(), description="Evaluation"
    )
    compression: CompressionSettings = Field(
        default_factory=lambda: CompressionSettings(), description="Compression of what travels"
    )
    participation: ParticipationSettings = Field(
        default_factory=lambda: ParticipationSettings(), description="Simulated participation"
    )
    attack: AttackSettings = Field(default_factory=lambda: AttackSettings(), description="Simulated attack")
    noise: NoiseSettings = Field(
        default_factory=lambda: NoiseSettings(), description="Simulated mistakes in labels"
    )
    privacy: PrivacySettings | None = Field(None, description="Differential privacy")
    secure_sum: SecureSumSettings | None = Field(None, description="Secure sums")
    tracking: TrackingSettings | None = Field(None, description="Trackers that follow the run")
    workers: WorkerSettings | None = Field(None, description="Workers that train a simulation's clients")
    compare: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="What differs in a comparison: [compare.<method or baseline>.<section>]",
    )

    _task_of_objective = model_validator(mode="before")(with_task_of_objective)
    _private_defaults = model_validator(mode="before")(with_private_defaults)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        check_combinations(self, dict(self))
        for name in self.compare:
            known = [*registry.names(), "centralised", "local"]
            if name not in known:
                raise ValueError(f"compare.{name}: unknown method or baseline{nearest(name, known)}")
        return self

    @property
    def client_privacy(self) -> PrivacySettings | None:
        """The section on privacy where it hides clients; None where there is none."""
        return self.privacy if self.privacy is not None and self.privacy.unit == "client" else None

    @property
    def example_privacy(self) -> PrivacySettings | None:
        """The section on privacy where it hides training rows; None where it does not."""
        return self.privacy if self.privacy is not None and self.privacy.unit == "example" else None

    @property
    def sums_only(self) -> bool:
        """Whether the server is shown sums over clients, and no client's own changes and figures."""
        return self.secure_sum is not None and self.secure_sum.on

    @property
    def metric(self) -> str:
        """The metric by which the best round is chosen."""
        return self.evaluation.metric or DEFAULT_METRIC[self.data.task]

    @property
    def untracked(self) -> Recipe:
        """This recipe without its trackers, which change no result."""
        return self if self.tracking is None else self.model_copy(update={"tracking": None})

    @property
    def identity(self) -> Recipe:
        """This recipe without what changes no result, or that by rounding alone: its trackers, and its
        workers. Two runs whose recipes are the same otherwise are the same.
        """
        if self.tracking is None and self.workers is None:
            return self
        return self.model_copy(update={"tracking": None, "workers": None})

    def settled(self, clients: int) -> Recipe:
        """This recipe, complete, as it is run where there are so many ``clients``
        (:func:`fedcustom.recipe.label_skew.settled`).
        """
        found = settled(self, clients)
        if not found.training:
            return self
        training = self.training.model_copy(update=found.training)
        rounds = self.rounds.model_copy(update={"selection": found.selection})
        return self.model_copy(update={"training": training, "rounds": rounds})

    def for_method(self, name: str, baseline: Baseline = "federated") -> Recipe:
        """This recipe with another method and baseline, and with what ``[compare.<method>]`` and
        ``[compare.<baseline>]`` say of them.

        The recipe's own method keeps its settings; another starts from its defaults.

        Raises:
            RecipeError: there is no such method, or its settings do not fit.
        """
        if name not in registry.names():
            raise RecipeError(f"--methods: unknown method {name!r}{nearest(name, registry.names())}")
        values = self.model_dump(exclude={"compare"})
        if name != self.method.name:
            values["method"] = {"name": name}
            # A rate that suits one method does not suit another.
            if values["training"]["learning_rate"] != "auto":
                values["training"]["learning_rate"] = None
            values["training"]["search_rates"] = None
            values["training"]["head_learning_rate"] = None
        if name != self.method.name:
            for key in registry.settings_of(name).not_for:
                section, _, part = key.partition(".")
                values[section] = {k: v for k, v in values[section].items() if part and k != part}
        values["baseline"] = baseline
        if baseline != "federated":
            values = {key: value for key, value in values.items() if key not in FEDERATED_ONLY}
        for part in (name, baseline):
            values = merged(values, self.compare.get(part, {}))
        return parse_recipe(values, f"compare.{name}")


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Recipe:
    """Read and check a recipe.

    ``source`` is a TOML file, a dict of its content, or a recipe; ``overrides`` are ``"section.key=value"``
    texts with values as in TOML (quotes around text may be left out; ``unset`` takes a setting back), or a
    dict with such keys. Paths in a
    file are relative to it, those in overrides to the current folder; both become absolute.

    Raises:
        RecipeError: the file cannot be read, is not TOML, or holds an unknown key or an impossible value. The
            message names the key, the value, what is allowed and the nearest right name.
    """
    where = "recipe"
    if isinstance(source, Recipe):
        values: dict[str, Any] = source.model_dump()
    elif isinstance(source, Mapping):
        values = dict(source)
    else:
        values, where = read_toml(Path(source)), str(source)
        if not _says_something(values):
            raise RecipeError(
                f"{where}: is empty; a recipe to start from is written by: fedcustom recipe > {where}"
            )
        values = beside(values, Path(source).parent, where)
    is_file = isinstance(source, str | Path)
    given = overrides.items() if isinstance(overrides, Mapping) else (split(text) for text in overrides)
    pairs = list(given)
    for key, value in pairs:
        change = nested(key, value)
        values = merged(values, existing(change) if is_file else change)
    for key, value in pairs:
        if value is UNSET:
            _check_name(values, key, where)
    return parse_recipe(values, where)


def _says_something(values: Mapping[str, Any]) -> bool:
    """Whether there is a setting in a file's tables: not in one that is empty, or has headings alone."""
    return any(_says_something(v) if isinstance(v, Mapping) else True for v in values.values())


def recorded_recipe(path: Path) -> Recipe:
    """The recipe in a run's directory. Its paths are absolute; one of an older run is relative to the current
    folder, as it was when the run was made.

    Raises:
        RecipeError: see :func:`load_recipe`.
    """
    return parse_recipe(read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        RecipeError: it cannot be read, or is not TOML.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; name a recipe file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not a text in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    return content


def parse_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Check a recipe's content.

    Raises:
        RecipeError: see :func:`load_recipe`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = explained(error.errors(), Recipe)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RecipeError(f"{where}: {problems[0]}{more}") from None


def to_toml(recipe: Recipe) -> str:
    """The complete recipe as TOML; settings that are unset are left out."""
    return tomli_w.dumps(recipe.model_dump(exclude_none=True))


def _check_name(values: Mapping[str, Any], key: str, where: str) -> None:
    """Refuse to take back a setting that there is not: it leaves no trace by which it could be refused later.

    Raises:
        RecipeError: names the setting and the nearest right name.
    """
    try:
        Recipe.model_validate(merged(values, nested(key, None)))
    except ValidationError as error:
        for problem in error.errors():
            if problem["type"] == "extra_forbidden":
                raise RecipeError(f"{where}: {explain(problem, Recipe)}") from None
