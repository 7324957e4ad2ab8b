"""Messages are values: frozen, slotted, equal by what they hold, and shown with it."""

from __future__ import annotations

import pytest

from holdfast.repo.wire import messages as m


def test_fields_are_given_by_place_and_by_name() -> None:
    one = m.Welcome(1, "x", append_only=True, read_only=False)
    assert (one.version, one.software, one.append_only, one.read_only) == (1, "x", True, False)
    assert one == m.Welcome(read_only=False, append_only=True, software="x", version=1)


@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), ((1, 2), {}), ((1,), {"value": 1}), ((), {"other": 1}), ((1,), {"other": 1})],
)
def test_other_fields_than_there_are_are_refused(values: tuple[int, ...], named: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="Number takes the fields value"):
        m.Number(*values, **named)


def test_equal_are_those_of_one_class_with_equal_fields() -> None:
    assert m.Number(1) == m.Number(1) != m.Number(2)
    assert m.Number(1) != m.MaybeNumber(1)
    assert m.Done() != m.Ping()
    assert len({m.Number(1), m.Number(1), m.MaybeNumber(1)}) == 2


def test_nothing_can_be_changed_or_added() -> None:
    one = m.Number(1)
    for name in ("value", "other"):
        with pytest.raises(AttributeError, match="is frozen"):
            setattr(one, name, 2)
        with pytest.raises(AttributeError, match="is frozen"):
            delattr(one, name)
    assert not hasattr(one, "__dict__")
    assert one.value == 1


def test_it_says_what_it_holds() -> None:
    assert repr(m.Failure(30, "no", hint="")) == "Failure(code=30, message='no', hint='')"
    assert repr(m.Ping()) == "Ping()"


def test_every_field_has_a_place_in_the_body() -> None:
    for cls, (_, layout) in m.layouts().items():
        assert len(cls.__slots__) == len(layout), cls
        assert "answer" not in cls.__slots__
