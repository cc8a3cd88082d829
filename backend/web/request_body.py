"""The JSON body of a request."""

from __future__ import annotations

from typing import Any

from flask import request

from backend.errors import BadRequest


def parse_json_body() -> dict[str, Any]:
    """Returns the body of the current request.

    Raises:
        BadRequest: it is not a JSON object.
    """
    try:
        body = request.get_json(force=True)  # whatever its content type
    except RecursionError:
        raise BadRequest("the JSON is nested too deeply") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def parse_string_fields(*names: str) -> dict[str, str]:
    """Returns these fields of the body of the current request; a missing field is empty.

    Raises:
        BadRequest: the body is not a JSON object, or one of the fields is not a string.
    """
    body = parse_json_body()
    fields = {name: body.get(name, "") for name in names}
    if not all(isinstance(value, str) for value in fields.values()):
        raise BadRequest(f"{', '.join(names)} must be strings")
    return fields
