"""What every block of the config is made of, and how a block depends on its `kind`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, InitErrorDetails, PydanticCustomError

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class _OneMistake(NamedTuple):
    """A value that fits no type of a union is one mistake, not one for each type."""

    message: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        union = cast(dict[str, Any], handler(source))
        error = {"custom_error_type": NO_NUMBER, "custom_error_message": self.message}
        return cast(CoreSchema, union | error)


PositiveIntOrAuto = Annotated[
    PositiveInt | Literal["auto"], _OneMistake("must be greater than 0, or auto")
]
CountOrAuto = Annotated[
    Annotated[int, Field(ge=0)] | Literal["auto"], _OneMistake("must be at least 0, or auto")
]
MarginOrAuto = Annotated[
    Annotated[float, Field(ge=0, lt=1.6)] | Literal["auto"],
    _OneMistake("must be at least 0 and less than 1.6, or auto"),
]

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
_HERE: Final = re.compile(r"(file|local):(//)?")  # how URLs of this machine begin, as fsspec has it


def expand_path(path: str) -> str:
    """A path or URL with `~` at its beginning and `$VARIABLES` replaced.

    Raises:
        PydanticCustomError: a variable is not set, or empty, so that `$DATA/x` would be `/x`; the
            message says which.
    """
    for match in _VARIABLE.finditer(path):
        name = match[1].strip("{}")
        if not os.environ.get(name):
            lack = "is empty" if name in os.environ else "is not set"
            raise PydanticCustomError(
                OWN_WORDS,
                "the environment variable {name} {lack}; a `$` that belongs to the name of a file "
                "or folder cannot be given: call it otherwise, or name a link to it",
                {"name": name, "lack": lack},
            )
    return os.path.expanduser(os.path.expandvars(path))


def has_variable(path: str) -> bool:
    """Whether `expand_path` would look for a variable in a path."""
    return bool(_VARIABLE.search(path))


def expand_paths(paths: list[str]) -> list[str]:
    """See `expand_path`."""
    return [expand_path(path) for path in paths]


def local_path(url: str) -> str:
    """A `file://` URL as the path that it names; any other path or URL as it is."""
    found = _HERE.match(url)
    return os.path.expanduser(url[found.end() :]) or os.curdir if found else url


PathText = Annotated[str, AfterValidator(expand_path)]
"""A path or URL; whoever uses it finds `~` and variables replaced."""
PathTexts = Annotated[list[str], AfterValidator(expand_paths)]
FolderText = Annotated[PathText, AfterValidator(local_path)]
"""A folder, or its URL, that is written; a `file://` URL is the path that it names."""

INAPPLICABLE = "inapplicable"  # pydantic's type of the error
TRUTH_VALUE: Final = "truth_value"  # likewise
NO_NUMBER: Final = "no_number"  # likewise
OWN_WORDS: Final = "own_words"  # likewise, of an error whose message says all


class Inapplicable(NamedTuple):
    """Why a key does not apply: `tag` has the value `chosen`, and not one of `owners`."""

    tag: str
    chosen: str
    owners: list[str]

    def explain(self, section: str = "") -> str:
        """What is wrong and what to do, where `section` is the dotted path of the block."""
        tag = f"{section}.{self.tag}" if section else self.tag
        return (
            f"belongs to {tag}={' or '.join(self.owners)}, but {tag} is {self.chosen}; "
            f"leave it out, or set {tag}={self.owners[0]}"
        )


class Alternatives(NamedTuple):
    """The kinds of a section, which is a tagged union.

    Attributes:
        tag: the key that chooses, such as "kind".
        keys: for each value of the tag the keys that apply; a key of none of them always applies.
    """

    tag: str
    keys: Mapping[str, tuple[str, ...]]

    def inapplicable(self, chosen: Any) -> dict[str, Inapplicable]:
        """The keys that do not apply to a value of the tag; none if it is no such value."""
        if not isinstance(chosen, str) or chosen not in self.keys:
            return {}
        owners: dict[str, list[str]] = {}
        for kind, own in self.keys.items():
            for key in own:
                owners.setdefault(key, []).append(kind)
        return {
            key: Inapplicable(self.tag, chosen, kinds)
            for key, kinds in owners.items()
            if chosen not in kinds
        }


class ConfigSection(BaseModel):
    """A block of keys; a key that is not named here is a mistake, not an extension.

    A section with `alternatives` is a tagged union: a key of another kind is a mistake, too. As an
    attribute such a key has its default, so that code may read it, and it is never written.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    alternatives: ClassVar[tuple[Alternatives, ...]] = ()

    @classmethod
    def inapplicable(cls, chosen: Mapping[str, Any]) -> dict[str, Inapplicable]:
        """The keys that do not apply to the tags in `chosen`; a missing one has its default."""
        return {
            key: reason
            for alternatives in cls.alternatives
            for tag in [alternatives.tag]
            for key, reason in alternatives.inapplicable(
                chosen.get(tag, cls.model_fields[tag].default)
            ).items()
        }

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, which pydantic would take for 1."""
        field = cls.model_fields[info.field_name or ""]
        if _has_truth_value(value) and _wants_number(field.annotation):
            raise PydanticCustomError(TRUTH_VALUE, "is a truth value, and no number")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _fits_64_bits(cls, value: Any) -> Any:
        """No tensor, array or file of a run holds a larger number."""
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) >= 2**63:
                raise PydanticCustomError(OWN_WORDS, "must be a number of at most 63 bits")
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_inapplicable(cls, values: Any, validate: ModelWrapValidatorHandler[Any]) -> Any:
        """Refuse every key of another kind by name, beside what else is wrong."""
        reasons = cls.inapplicable(values) if isinstance(values, dict) else {}
        errors = [_error(key, values[key], reasons[key]) for key in reasons if key in values]
        if not errors:
            return validate(values)
        try:
            validate({key: value for key, value in values.items() if key not in reasons})
        except ValidationError as error:
            errors += map(_again, error.errors())
        raise ValidationError.from_exception_data(cls.__name__, errors)

    @model_serializer(mode="wrap")
    def _leave_out_inapplicable(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        left_out = self.inapplicable(self.__dict__)
        values: dict[str, Any] = serialize(self)
        return {key: value for key, value in values.items() if key not in left_out}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """For each kind a condition that forbids the keys of the others."""
        schema = handler(core)
        conditions = [
            _condition(alternatives, kind, kind == cls.model_fields[alternatives.tag].default)
            for alternatives in cls.alternatives
            for kind in alternatives.keys
        ]
        if conditions:
            handler.resolve_ref_schema(schema)["allOf"] = conditions
        return schema


def _wants_number(annotation: Any) -> bool:
    """Whether a type is that of a number, or has such a type or the values of one in it."""
    inner = get_args(annotation)
    return annotation in (int, float) or type(annotation) is int or any(map(_wants_number, inner))


def _has_truth_value(value: Any) -> bool:
    """Whether a value is true or false, or a container of such."""
    if isinstance(value, dict):
        value = list(value.values())
    inner = value if isinstance(value, list | tuple) else []
    return isinstance(value, bool) or any(map(_has_truth_value, inner))


def _condition(alternatives: Alternatives, kind: str, is_default: bool) -> JsonSchemaValue:
    """JSON Schema: if the tag is `kind`, given or by default, keys of other kinds are forbidden."""
    given: JsonSchemaValue = {"properties": {alternatives.tag: {"const": kind}}}
    if not is_default:
        given["required"] = [alternatives.tag]
    forbidden = dict.fromkeys(alternatives.inapplicable(kind), False)
    return {"if": given, "then": {"properties": forbidden}}


def _error(key: str, value: Any, reason: Inapplicable) -> InitErrorDetails:
    context = {**reason._asdict(), "reason": reason.explain()}
    error = PydanticCustomError(INAPPLICABLE, "{reason}", context)
    return InitErrorDetails(type=error, loc=(key,), input=value)


def _again(found: ErrorDetails) -> InitErrorDetails:
    """A finding inside a section, to be raised once more."""
    if found["type"] in (INAPPLICABLE, TRUTH_VALUE, NO_NUMBER, OWN_WORDS):
        context = {"reason": found["msg"], **found.get("ctx", {})}
        error = PydanticCustomError(found["type"], "{reason}", context)
        return InitErrorDetails(type=error, loc=found["loc"], input=found["input"])
    return cast(InitErrorDetails, found)


def section_of(annotation: Any) -> type[ConfigSection] | None:
    """The section behind an annotation `Section` or `Section | None`; None for another type."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, ConfigSection):
            return option
    return None


def path_keys(section: type[ConfigSection]) -> set[str]:
    """The keys of a section that hold paths or URLs: a `PathText` or a list of them."""
    expanded = {get_args(kind)[1] for kind in (PathText, PathTexts)}
    return {
        name
        for name, field in section.model_fields.items()
        if any(item in field.metadata for item in expanded)
    }


def inapplicable_keys(
    section: type[ConfigSection], values: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Inapplicable]]:
    """Dotted path, value and reason of every key in nested values that is of another kind."""
    reasons = section.inapplicable(values)
    for key, value in values.items():
        if key in reasons:
            yield f"{prefix}{key}", value, reasons[key]
        elif (inner := _inner(section, key)) and isinstance(value, Mapping):
            yield from inapplicable_keys(inner, value, f"{prefix}{key}.")


def applicable_values(
    section: type[ConfigSection], values: Mapping[str, Any], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """A copy of nested values without the keys that do not apply to the kinds in `chosen`.

    Args:
        section: what the values are of.
        values: of a section and those inside it.
        chosen: nested values that hold the tags.
    """
    reasons, kept = section.inapplicable(chosen), {}
    for key, value in values.items():
        if key in reasons:
            continue
        inner, inside = _inner(section, key), chosen.get(key)
        if inner and isinstance(value, Mapping):
            tags = inside if isinstance(inside, Mapping) else {}
            kept[key] = applicable_values(inner, value, tags)
        else:
            kept[key] = value
    return kept


def _inner(section: type[ConfigSection], key: str) -> type[ConfigSection] | None:
    field = section.model_fields.get(str(key))
    return section_of(field.annotation) if field else None
