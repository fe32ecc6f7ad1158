from dataclasses import dataclass
from typing import Any, Literal

import pytest

from copgen_fast import schema


@dataclass(frozen=True)
class Item:
    name: str
    size: int = 1


@dataclass(frozen=True)
class Record:
    items: tuple[Item, ...]
    shape: tuple[int, int]
    kind: Literal["a", "b"] = "a"
    share: float | None = None
    more: dict[str, bool | float] | None = None


def test_values_become_what_the_hints_say():
    values = {
        "items": [{"name": "x"}, {"name": "y", "size": 2}],
        "shape": [3, 4],
        "share": 1,
        "more": {"p": True, "q": 2},
    }
    found = schema.check(values, Record)
    assert found == Record((Item("x"), Item("y", 2)), (3, 4), share=1, more={"p": True, "q": 2})
    assert schema.check({"a": [1, {}]}, dict[str, Any]) == {"a": [1, {}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": [{"size": 1}]}, "items[0].name is missing"),
        (
            {"items": [{"name": "x", "size": 2**63}]},
            "items[0].size: expected an integer of 64 bits, got 9223372036854775808",
        ),
        ({"items": [{"name": "x", "size": True}]}, "items[0].size: expected an integer of 64 bits, got True"),
        ({"items": "x"}, "items: expected a list, got 'x'"),
        ({"items": [[]]}, "items[0]: expected an object, got []"),
        ({"shape": [1, 2, 3]}, "shape: expected a list of 2, got [1, 2, 3]"),
        ({"kind": "c"}, "kind: expected one of ('a', 'b'), got 'c'"),
        ({"kind": []}, "kind: expected one of ('a', 'b'), got []"),
        ({"share": "1"}, "share: expected a number, got '1'"),
        ({"more": {"p": "yes"}}, "more.p: expected a number, got 'yes'"),
        ({"other": 1}, "'other' is no field of it"),
    ],
)
def test_the_field_what_came_and_what_was_expected_are_named(change, message):
    with pytest.raises(ValueError) as error:
        schema.check({"items": [], "shape": [1, 2]} | change, Record)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", '{"a": 1}'.encode("utf-16"), b"[" * 10**6, b" " * (schema.LONGEST + 1), b"1" * 5000]
)
def test_texts_that_are_no_record_are_value_errors(text):
    with pytest.raises(ValueError):
        schema.parse(text)
