import pytest

from evaler.features.top_k import top_k
from scripts.benchmarks import search as benchmark_search
from scripts.benchmarks.search import search_cases

SMALL = (3, 3000, "torch"), (3, 3000, "faiss")


def test_both_sides_find_the_same():
    pytest.importorskip("faiss")
    for case, (*_, against) in zip(search_cases(shapes=SMALL, dim=16, k=20, seconds=0, least=2), SMALL, strict=True):
        assert case.case == "3 x 3,000 x 16, top 20" and case.ratio > 0 and against in case.note


def test_a_difference_is_not_passed_over(monkeypatch):
    monkeypatch.setattr(benchmark_search, "top_k", lambda q, d, k, shown: top_k(-q, d, k))
    with pytest.raises(AssertionError):
        list(search_cases(shapes=SMALL[:1], dim=16, k=20, seconds=0, least=2))
