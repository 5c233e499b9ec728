"""Tables of named parts."""

import pytest

from memdlm_jax.registry import Registry


@pytest.fixture
def table():
    table = Registry("fruit")
    table.register("apple")(1)
    return table


def test_a_registered_part_is_found_by_its_name(table):
    assert table("apple") == 1
    assert table.names() == ["apple"]


def test_a_part_of_ones_own_module_is_imported(table):
    import math

    assert table("math:pi") is math.pi


def test_an_unknown_name_says_field_value_and_what_is_known(table):
    with pytest.raises(ValueError, match=r"basket\.fruit='pear' must be one of 'apple', or MODULE"):
        table("pear", "basket.fruit")


@pytest.mark.parametrize("name", ["no_module_here:x", "math:no_attribute", ":x", "math:"])
def test_what_cannot_be_imported_says_so(table, name):
    with pytest.raises(ValueError, match=r"basket\.fruit=.* cannot be imported"):
        table(name, "basket.fruit")


def test_a_name_is_given_once(table):
    table.register("apple")(1)  # The same part again: a module that is imported twice.
    with pytest.raises(ValueError, match="already a fruit called 'apple'"):
        table.register("apple")(2)
