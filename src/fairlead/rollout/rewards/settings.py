"""What a recipe says of rewards: where each comes from, what of it is read, what it weighs. Imports no torch and opens
nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from pydantic import AfterValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from fairlead.config import Section
from fairlead.config_file import suggest
from fairlead.errors import ConfigError
from fairlead.rollout.rewards.rules import RULES, bound, columns_of


class _Source(Section):
    weight: float = 1.0
    """What its scores are multiplied with."""
    name: str | None = Field(default=None, min_length=1)
    """In metrics and errors; the source's own when not given."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        """Raises ValueError that says whose a key is that this kind of source has not."""
        if not isinstance(given, Mapping):
            return given
        keys = {_ALIASES.get(key, key): value for key, value in cast(Mapping[str, Any], given).items()}
        if len(keys) < len(given):
            raise ValueError("path and run are both given; they are one setting")
        own = next(kind for kind, made in _KINDS.items() if issubclass(cls, made))
        for key in keys:
            if key in cls.model_fields:
                continue
            if key in _KINDS:
                raise ValueError(f"{own} and {key} are both given; a reward has one origin")
            owners = [kind for kind, made in _KINDS.items() if key in made.model_fields]
            if owners:
                raise ValueError(f"{key} is a setting of {' and '.join(owners)}, not of {own}")
            raise ValueError(f"unknown key {key!r}; {suggest(key, list(cls.model_fields))}")
        return keys

    @property
    @abstractmethod
    def called(self) -> str:
        """What the source is called."""


class ModelSource(_Source):
    """A reward run or folder, a sequence classifier of transformers, or several of these as an ensemble."""

    path: str | tuple[str, ...]
    """Of the run, folder or hub id; `run` is another name for it. Several: an ensemble."""
    label: str | None = None
    """Which label of a classifier, or which attribute of a reward that has several."""
    use: Literal["probability", "logit"] | None = None
    """Of a classifier: after softmax (after sigmoid, where it has one label or its labels do not exclude each other),
    or before; null: the probability, but the logit where there is one label. Of a trained reward, probability is the
    sigmoid of its score: what one of loss=binary says of a good response."""
    combine: Literal["mean", "minimum", "mean-minus-disagreement"] | None = None
    """How the members of an ensemble, or the heads of a reward, become one score; null: as the reward was saved, else
    their mean."""
    disagreement_weight: float | None = Field(default=None, ge=0)
    """What the members' standard deviation is multiplied with before it is taken off their mean; 1 when not given."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens that are read, where the model can read more."""
    batch_size: int | None = Field(default=None, ge=1)
    """Texts of one forward pass at most."""

    @model_validator(mode="after")
    def _go_together(self) -> ModelSource:
        if not isinstance(self.path, str):
            if len(self.path) < 2:
                raise ValueError(f"an ensemble has two members or more, got {list(self.path)}")
            if self.label is not None or self.use is not None:
                raise ValueError("label and use speak of one model, and path names several")
        if self.disagreement_weight is not None and self.combine in ("mean", "minimum"):
            raise ValueError(f"disagreement_weight has no effect with combine={self.combine}")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def called(self) -> str:
        return self.name or ("ensemble" if not isinstance(self.path, str) else short_name(self.path))


class FunctionSource(_Source):
    """A Python function with trlX's signature."""

    function: str = Field(pattern=r"^[^:]+:[^:]+$")
    """module:function, importable from where the command runs. It is called with those of samples, prompts, outputs and
    the prompts' other columns that it takes, each a list, and with tokenizer and response_ids where it names them."""
    arguments: dict[str, Any] = Field(default_factory=dict[str, Any])
    """More keyword arguments, the same at every call."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples of one call; null: all of a round, or with workers a fair share. Calls of an async function run side by
    side."""
    workers: int = Field(default=0, ge=0)
    """Processes that call it; 0: this one."""

    @property
    def called(self) -> str:
        return self.name or self.function


class RuleSource(_Source):
    """A rule that is built in: `docs/guides/rewards.md` lists them."""

    rule: str
    arguments: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Of the rule."""
    columns: dict[str, str] = Field(default_factory=dict[str, str])
    """What the rule reads of a prompt -> the column that holds it, where it bears another name."""

    @model_validator(mode="after")
    def _known_rule(self) -> RuleSource:
        if self.rule not in RULES:
            raise ValueError(f"no rule {self.rule!r}; {suggest(self.rule, RULES)}")
        bound(self.rule, self.arguments)
        for name in self.columns:
            if name not in (read := columns_of(RULES[self.rule])):
                raise ValueError(f"the rule {self.rule} reads no column {name!r}: {', '.join(read) or 'none'}")
        return self

    @property
    def called(self) -> str:
        return self.name or self.rule


class UrlSource(_Source):
    """A scorer behind HTTP: it is sent `{"samples", "prompts", "outputs"}` and the prompts' other columns as JSON, each
    a list, and answers `{"scores": [...]}`."""

    url: str = Field(pattern=r"^https?://")
    timeout: float = Field(default=60.0, gt=0)
    """Seconds without a word after which a request has failed."""
    retries: int = Field(default=3, ge=0)
    """How often a request is sent again that found no server, was not answered, or was answered 408, 429 or 5xx."""
    backoff: float = Field(default=1.0, ge=0)
    """Seconds before the first retry; twice as many before each further one."""
    batch_size: int = Field(default=64, ge=1)
    """Samples of one request."""
    headers: dict[str, str] = Field(default_factory=dict[str, str])
    """`$NAME` stands for a variable of the environment, so that no secret need stand in a recipe; `$$` for a dollar."""

    @property
    def called(self) -> str:
        return self.name or urlsplit(self.url).netloc


Spec = ModelSource | FunctionSource | RuleSource | UrlSource
"""One source in full."""
_KINDS: dict[str, type[_Source]] = {
    "path": ModelSource,
    "function": FunctionSource,
    "rule": RuleSource,
    "url": UrlSource,
}
_ALIASES = {"run": "path"}


def source_of(text: str) -> Spec:
    """The short form: `rule:length`, `http://...`, `module:function`, or a place."""
    if text.startswith("rule:"):
        return RuleSource(rule=text.removeprefix("rule:"))
    if text.startswith(("http://", "https://")):
        return UrlSource(url=text)
    if ":" in text and not Path(text).exists():
        return FunctionSource(function=text)
    return ModelSource(path=text)


def _readable(text: str) -> str:
    try:
        source_of(text)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    return text


def _form(given: Any) -> str | None:
    """Which form of `RewardSource` something has. The names are none that a key could bear."""
    if isinstance(given, str):
        return "a text"
    if isinstance(given, list | tuple):
        return "a list"
    if isinstance(given, Mapping):
        held = {_ALIASES.get(key, key) for key, value in cast(Mapping[str, Any], given).items() if value is not None}
        return next((f"by {kind}" for kind in _KINDS if kind in held), None)
    return next((f"by {kind}" for kind, made in _KINDS.items() if isinstance(given, made)), None)


_ONE_ORIGIN = "a reward says where it comes from: one of path (or run), function, rule, url"
_Text = Annotated[str, AfterValidator(_readable), Tag("a text")]
_Model = Annotated[ModelSource, Tag("by path")]
_Function = Annotated[FunctionSource, Tag("by function")]
_Rule = Annotated[RuleSource, Tag("by rule")]
_Url = Annotated[UrlSource, Tag("by url")]
_forms = Discriminator(_form, custom_error_type="reward_source", custom_error_message=_ONE_ORIGIN)
_One = Annotated[_Text | _Model | _Function | _Rule | _Url, _forms]
_Several = Annotated[list[_One], Field(min_length=1), Tag("a list")]
RewardSource = Annotated[_Text | _Model | _Function | _Rule | _Url | _Several, _forms]
"""A source by its short form or in full, or several, whose weighted scores are added up."""
Given = str | Path | Spec | Mapping[str, Any] | Callable[..., Any] | Sequence[Any]
"""What Python may hand in besides: functions, paths, and mappings as a recipe holds them."""
_ADAPTER: TypeAdapter[Any] = TypeAdapter(RewardSource)


def sources(given: Given | None) -> list[Spec | Callable[..., Any]]:
    """The sources one by one, each in full; functions as they are. Raises ConfigError for what is no source."""
    if given is None:
        return []
    if isinstance(given, list | tuple):
        return [source for each in cast(Sequence[Any], given) for source in sources(each)]
    if callable(given):
        return [given]
    try:
        found = _ADAPTER.validate_python(str(given) if isinstance(given, Path) else given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"no reward {given!r}: {first['msg'].removeprefix('Value error, ')}") from error
    return [source_of(found) if isinstance(found, str) else found]


def model_paths(given: Given | None) -> list[str]:
    """The places of all models that the sources read."""
    return [path for source in sources(given) if isinstance(source, ModelSource) for path in source.paths]


def short_name(path: str) -> str:
    """A folder's own name, or that of the run whose `model/` it is."""
    parts = [part for part in Path(path).parts if part not in ("model", "/", "..")]
    return parts[-1] if parts else path
