"""Other names of things: from a table, in compounds, and not where they would be false."""

import pytest

from mvdream_fast.data import synonyms as S


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("sofa", ["couch", "settee"]), ("couch", ["sofa", "settee"]), ("mug", ["cup"]),
        ("wooden crate", ["wooden box"]),
        ("leather sofa", ["leather couch", "leather settee"]), ("coffee table", ["table"]),
        ("leather sofa with cushions", ["leather couch with cushions", "leather settee with cushions"]),
        ("harp", []), ("", []), ("two sofas", []), ("two sofa", []),
        ("mouse", ["rodent"]), ("computer mouse", []), ("small mouse", ["small rodent"]),
    ],
)  # fmt: skip
def test_other_names(name, others):
    assert S.synonyms(name) == others


def test_the_table_is_clean():
    same, kinds = S.table()
    assert len(same) + len(kinds) > 400
    for name, others in [*same.items(), *kinds.items()]:
        assert others, name
        assert name not in others
        for word in (name, *others):
            assert word == word.strip().lower()
            assert word.isascii()
    for name, others in same.items():
        assert all(name in same[other] for other in others), name
    assert all(len(S.synonyms(name)) <= S.MOST for name in (*same, *kinds))
