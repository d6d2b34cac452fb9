"""Checked data: the base class of all parameters and schemes, and faults as one sentence."""

import difflib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from corec import CorecError


class Model(BaseModel):
    """Base class of parameters: frozen, and unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def checked(cls, values: Mapping[str, Any], origin: str = "parameters") -> Self:
        """Build the model from `values`.

        Parameters
        ----------
        values
            Values by name.
        origin
            Start of the error message.

        Raises
        ------
        CorecError
            For the first fault: an unknown name (with the nearest known one), a value out of range, or values that do not go
            together.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise CorecError(f"{origin}: {first_fault(cls, error)}") from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy with other values. Unlike pydantic's method, it runs all checks (raises CorecError)."""
        values = {name: getattr(self, name) for name in type(self).model_fields} | dict(update or {})
        return self.checked(values)


def exit_status(work: Callable[[], object]) -> int:
    """Do the work of a command; returns its exit status. A CorecError is printed as one sentence, and the status is 1."""
    try:
        work()
    except CorecError as error:
        print(f"corec: {error}", file=sys.stderr)
        return 1
    return 0


def differences(now: Any, then: Any, name: str = "") -> list[str]:
    """Describe the values in which two nested mappings differ: ``seed is 1, was 0``."""
    if isinstance(now, dict) and isinstance(then, dict):
        keys = [*now, *(key for key in then if key not in now)]
        return [text for key in keys for text in differences(now.get(key), then.get(key), f"{name}.{key}".lstrip("."))]
    return [] if now == then else [f"{name} is {now!r}, was {then!r}"]


def first_fault(model: type[BaseModel], error: ValidationError) -> str:
    """Describe the first faulty value of a `model` as a sentence that names the parameter."""
    fault = error.errors()[0]
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    *stage, name = (str(part) for part in fault["loc"])
    full = ".".join([*stage, name])
    if fault["type"] == "missing":
        return f"parameter {full!r} is missing: add it."
    if fault["type"] == "extra_forbidden":
        field: Any = model
        for part in stage:
            field = field.model_fields[part].annotation
        near = difflib.get_close_matches(name, field.model_fields, n=1, cutoff=0)[0]
        return f"there is no parameter {full!r}: did you mean {near!r}?"
    return f"parameter {full!r} is {fault['input']!r}: {fault['msg']}."
