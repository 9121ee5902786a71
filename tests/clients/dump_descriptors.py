"""Prints the wire contract of a package's stubs as JSON: `python dump_descriptors.py MODULE MODULE`.

The modules are the service's and the model configuration's generated code.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any


def messages(container: Mapping[str, Any]) -> Iterator[Any]:
    for message in container.values():
        yield message
        yield from messages(message.nested_types_by_name)


def field_facts(field: Any) -> dict[str, Any]:
    kind = field.message_type or field.enum_type
    return {
        "number": field.number,
        "type": field.type,
        "repeated": field.is_repeated,
        "of": kind.full_name if kind else None,
        "oneof": field.containing_oneof.name if field.containing_oneof else None,
        "json": field.json_name,
    }


def enum_facts(enum: Any) -> dict[str, int]:
    return {value.name: value.number for value in enum.values}


def main() -> None:
    contract: dict[str, dict[str, Any]] = {"messages": {}, "enums": {}, "services": {}}
    for name in sys.argv[1:]:
        file = importlib.import_module(name).DESCRIPTOR
        everything = list(messages(file.message_types_by_name))
        for message in everything:
            fields = {field.name: field_facts(field) for field in message.fields}
            contract["messages"][message.full_name] = fields
        enums = [*file.enum_types_by_name.values(), *(e for m in everything for e in m.enum_types)]
        contract["enums"].update({enum.full_name: enum_facts(enum) for enum in enums})
        for service in file.services_by_name.values():
            contract["services"][service.full_name] = {
                method.name: [
                    method.input_type.full_name,
                    method.client_streaming,
                    method.output_type.full_name,
                    method.server_streaming,
                ]
                for method in service.methods
            }
    print(json.dumps(contract))


main()
