"""Files that people write: lines of keys and items, and what YAML would swallow."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from sluice.infra.errors import InputError
from sluice.infra.field_mistakes import validated
from sluice.infra.yaml_file import read_text, read_yaml


class Circle(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["circle"]
    radius: float = Field(gt=0)


class Square(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["square"]
    side: float


class Kinds(BaseModel):
    model_config = ConfigDict(extra="forbid")
    shapes: list[Circle | Square] = Field(min_length=1)
    main: Circle | Square | None = Field(None, discriminator="kind")


def test_lines_are_those_of_keys_and_of_list_items() -> None:
    read = read_yaml("a: 1\nb:\n  - x: 2\n  - {y: 3}\n", "f.yaml", "drawing")
    assert read.values == {"a": 1, "b": [{"x": 2}, {"y": 3}]}
    assert read.lines == {
        ("a",): 1, ("b",): 2, ("b", "0"): 3, ("b", "0", "x"): 3, ("b", "1"): 4, ("b", "1", "y"): 4,
    }  # fmt: skip
    assert read.problems == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "f.yaml holds no drawing: a mapping of fields, each as `name: value`, was expected, not nothing."),
        ("- a\n", "not a list."),
        ("7\n", "not 7."),
        ("a:\n\tb: 1\n", "f.yaml line 2: a tab; YAML indents with spaces only."),
        ("a: [1\n", "is not YAML"),
        ("a: !!python/object:os.system {}\n", "is not YAML"),
    ],
)
def test_what_is_no_mapping_is_refused(text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        read_yaml(text, "f.yaml", "drawing", "the hint")
    assert says in caught.value.message


def test_a_text_that_holds_itself_ends() -> None:
    read = read_yaml("a: &x [1, *x]\nb: *x\n", "f.yaml", "drawing")
    assert read.lines[("b",)] == 2
    assert ("b", "0") not in read.lines


def test_a_kind_in_a_list_is_no_part_of_a_fields_name() -> None:
    with pytest.raises(InputError) as caught:
        validated(Kinds, {"shapes": [], "main": {"kind": "circle", "raduis": 2}}, "f.yaml", {("main", "raduis"): 4})
    assert caught.value.message.splitlines() == [
        "f.yaml has 3 mistakes:",
        "  shapes = []: is an empty list.",
        "  main.radius: is required and not given.",
        "  main.raduis (line 4): no such field; did you mean radius?",
    ]
    with pytest.raises(InputError, match=r"^f.yaml: main.kind = 'cirle': should be circle or square; did you mean"):
        validated(Kinds, {"shapes": [{"kind": "square", "side": 1}], "main": {"kind": "cirle"}}, "f.yaml", {})


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no drawing '.*absent': No such file") as caught:
        read_text(tmp_path / "absent", "drawing", "the hint")
    assert caught.value.hint == "the hint"
    (tmp_path / "odd").write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_text(tmp_path / "odd", "drawing")
