import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from distill.errors import DistillError
from distill.search_space import parse_space, with_value


@pytest.mark.parametrize(
    ("text", "convert", "expected"),
    [
        ("1e-5..1e-4", float, FloatDistribution(1e-5, 1e-4, log=True)),
        ("0..0.2", float, FloatDistribution(0, 0.2)),
        ("2..5", float, IntDistribution(2, 5)),
        ("8..128", int, IntDistribution(8, 128, log=True)),
        ("16, 32,64", int, CategoricalDistribution([16, 32, 64])),
        ("linear,cosine", str, CategoricalDistribution(["linear", "cosine"])),
        ("../a,../b", str, CategoricalDistribution(["../a", "../b"])),
    ],
)
def test_a_range_and_a_list_are_read(text, convert, expected):
    assert parse_space("x", text, convert) == expected


@pytest.mark.parametrize(
    ("text", "reason"), [("5..1", "smaller number"), ("3..3", "smaller number"), ("7", "one value")]
)
def test_a_wrong_range_is_refused(text, reason):
    with pytest.raises(DistillError, match=reason):
        parse_space("layers", text, int)


@pytest.mark.parametrize(
    ("distribution", "value", "expected"),
    [
        (FloatDistribution(1e-5, 1e-4, log=True), 1e-3, FloatDistribution(1e-5, 1e-3, log=True)),
        (FloatDistribution(1e-5, 1e-4, log=True), 0.0, FloatDistribution(0.0, 1e-4)),
        (IntDistribution(2, 5), 6.0, IntDistribution(2, 6)),
        (IntDistribution(2, 5), 2.5, FloatDistribution(2, 5)),
        (CategoricalDistribution([16, 32]), 20, CategoricalDistribution([16, 32, 20])),
    ],
)
def test_todays_value_is_part_of_what_is_searched(distribution, value, expected):
    assert with_value(distribution, value) == expected
