import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetero.units import EXAMPLES, UNITS, parse


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("80 GiB", "bytes", 80 * 2**30),
        ("80GB", "bytes", 80e9),
        ("1.5e3 MB", "bytes", 1.5e9),
        ("7", "bytes", 7),
        ("25 GB/s", "bytes/s", 25e9),
        ("400 Gbit/s", "bytes/s", 50e9),
        ("8 Gb/s", "bytes/s", 1e9),
        ("8 Gbps", "bytes/s", 1e9),
        ("1 GiB/s", "bytes/s", 2**30),
        ("5 us", "seconds", 5e-6),
        ("0.3 µs", "seconds", 0.3e-6),
        ("7 ns", "seconds", 7e-9),
        ("67 TFLOP/s", "FLOP/s", 67e12),
        (".5 PFLOPS", "FLOP/s", 5e14),
        ("0.7 kW", "watts", 700.0),
        ("2.99", "USD/h", 2.99),
    ],
)
def test_a_quantity_is_read_in_its_unit(text, dimension, value):
    assert parse(text, dimension) == value


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        ("80 GB", "seconds"),
        ("80 Gb", "bytes"),
        ("80 gib", "bytes"),
        ("-1 GB", "bytes"),
        ("nan", "seconds"),
        (".inf", "bytes/s"),
        ("1e999", "watts"),
        ("1_000", "bytes"),
        ("1,5 GB", "bytes"),
        ("GB", "bytes"),
        ("", "bytes"),
        ("0x10", "bytes"),
        ("9" * 5000, "bytes"),
    ],
)
def test_what_is_no_quantity_is_refused_with_an_example(text, dimension):
    with pytest.raises(ValueError, match="expected") as error:
        parse(text, dimension)
    assert EXAMPLES[dimension] in str(error.value)


@given(st.floats(0, allow_infinity=False, allow_nan=False), st.sampled_from(sorted(UNITS)))
def test_a_bare_number_is_itself_to_the_last_bit(value, dimension):
    assert parse(repr(value), dimension) == value


@pytest.mark.parametrize("dimension", EXAMPLES)
def test_the_examples_of_a_dimension_are_quantities(dimension):
    for example in EXAMPLES[dimension].replace(" or ", ", ").split(", "):
        parse(example, dimension)
