"""`Section`: the base of every part of a recipe."""

from collections.abc import Iterator
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A part of a recipe: unknown keys, wrong types and NaN are errors, and it cannot change once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)

    # {field: another that says the same}: on the command line one takes the place of what the recipe says of the other.
    alternatives: ClassVar[dict[str, str]] = {}

    def contradictions(self) -> Iterator[str]:
        """What its fields say that does not go together, one message each, with the way out; a section overrides this.

        Fields that would not act belong here, too. A message names dotted keys (`train.steps`), which errors take the
        line of the recipe from.
        """
        yield from ()

    def is_changed(self, name: str) -> bool:
        """Whether a field has another value than its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if found := list(self.contradictions()):
            raise ValueError("\n".join(found))
        return self
