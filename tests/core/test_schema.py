"""Plain data as typed dataclasses: what is taken, what is refused, and how the sentence names it."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from annotated_types import Interval

from mvdream_fast.core.errors import InputFileError, ModelError
from mvdream_fast.core.schema import Checked, checked


@dataclass(frozen=True)
class Lens(Checked):
    degrees: tuple[Annotated[float, Interval(gt=0, lt=180)], float] = (15.0, 60.0)
    kind: Literal["thin", "thick"] = "thin"


@dataclass(frozen=True)
class Camera(Checked):
    name: str
    lens: Lens = field(default_factory=Lens)
    sizes: tuple[int, ...] = ()
    stop: Annotated[int, Interval(ge=1, le=32)] | None = None
    tag: int | str = 0
    on: bool = True


def test_nested_frozen_dataclasses_with_lists_as_tuples_and_integers_as_floats():
    found = checked(
        Camera, {"name": "a", "lens": {"degrees": [1, 2.5]}, "sizes": [8, 9], "stop": None}, "x", ModelError
    )
    assert found == Camera("a", Lens((1.0, 2.5)), (8, 9))
    assert [type(v) for v in found.lens.degrees] == [float, float]
    assert checked(Camera, {"name": "a"}, "x", ModelError) == Camera("a")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({}, "name is missing"),
        ([], "Camera must be an object, got []"),
        ({"name": "a", "lens": 3}, "lens must be an object, got 3"),
        ({"name": "a", "z": 1, "b": 2}, "unknown key(s) b, z in Camera; known: name, lens, sizes, stop, tag, on"),
        ({"name": "a", "lens": {"width": 1}}, "unknown key(s) width in Lens; known: degrees, kind"),
        ({"name": "a", "lens": {"degrees": [1]}}, "lens.degrees[1] is missing"),
        ({"name": "a", "lens": {"degrees": [1, 2, 3]}}, "lens.degrees must have at most 2 items, got [1, 2, 3]"),
        ({"name": "a", "lens": {"degrees": [180, 2]}}, "lens.degrees[0] must be less than 180, got 180"),
        ({"name": "a", "lens": {"degrees": [1, math.nan]}}, "lens.degrees[1] must be a finite number, got nan"),
        ({"name": "a", "lens": {"degrees": [1, -math.inf]}}, "lens.degrees[1] must be a finite number, got -inf"),
        ({"name": "a", "lens": {"kind": "flat"}}, "lens.kind must be 'thin' or 'thick', got 'flat'"),
        ({"name": "a", "sizes": [1, "2"]}, "sizes[1] must be an integer, got '2'"),
        ({"name": "a", "sizes": [1, 2.0]}, "sizes[1] must be an integer, got 2.0"),
        ({"name": "a", "sizes": [True]}, "sizes[0] must be an integer, got True"),
        ({"name": "a", "stop": 0}, "stop must be at least 1, got 0"),
        ({"name": "a", "stop": 33}, "stop must be at most 32, got 33"),
        ({"name": "a", "tag": None}, "tag must be an integer or a string, got None"),
        ({"name": 3}, "name must be a string, got 3"),
        ({"name": "a", "on": 1}, "on must be a boolean, got 1"),
    ],
)
def test_the_file_the_key_the_requirement_and_the_value_are_named(data, sentence):
    with pytest.raises(InputFileError) as caught:
        checked(Camera, data, "c.json", InputFileError)
    assert str(caught.value) == f"c.json: {sentence}"


def test_a_key_is_named_as_the_user_wrote_it():
    with pytest.raises(ModelError, match="^--sizes must be an integer, got 'x'$"):
        checked(Camera, {"name": "a", "sizes": ["x"]}, "", ModelError, {"sizes": "--sizes"})


@pytest.mark.parametrize("data", [{"name": "\ud800"}, {"name": "a", "tag": 10**5000}])
def test_what_json_cannot_hold_is_refused(data):
    with pytest.raises(ModelError, match="^c.json: "):
        checked(Camera, data, "c.json", ModelError)
