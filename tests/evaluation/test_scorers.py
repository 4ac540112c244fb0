"""How written answers are judged, by the definitions' own examples."""

import numpy as np
import pytest

from prunezoo.core.errors import PruneZooError
from trainers.data.scorers import SCORERS, anls, choice, chosen, contains, exact, find_scorer, relaxed, vqa


def test_exact_forgives_case_and_white_space_only():
    assert exact(" A  Red\nball ", ["a red ball"]) == 1 and exact("b", ["a", "b"]) == 1
    assert exact("red ball", ["a red ball"]) == exact("red.", ["red"]) == 0


@pytest.mark.parametrize(("same", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_people(same, score):
    """The table that follows from min(#/3, 1), averaged over leaving one of ten out."""
    people = ["red"] * same + [f"other {number}" for number in range(10 - same)]
    assert vqa("Red", people) == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "reference"),
    [
        ("The dog.", "dog"), ("two", "2"), ("dont know", "don't know"), ("1,000", "1000"), ("a t-shirt", "t shirt"),
        ("none", "0"), ("red, blue", "red blue"), ("yes!", "Yes"),
    ],
)  # fmt: skip
def test_vqa_forgives_what_is_no_difference(said, reference):
    assert vqa(said, [reference] * 4) == 1


def test_vqa_keeps_what_is_one():
    assert vqa("3.5", ["35"] * 4) == vqa("3:30", ["330"] * 4) == vqa("$5", ["5"] * 4) == 0
    with pytest.raises(PruneZooError, match="needs 4 or more answers to each question, one found 1"):
        vqa("red", ["red"])


def slow_distance(a, b):
    """By the recursion that defines it."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
    return table[-1, -1]


def test_anls_is_one_minus_the_distance_up_to_half():
    assert anls("Coca Cola", ["coca cola"]) == 1 and anls("", ["red"]) == 0
    assert anls("hallo", ["hello"]) == pytest.approx(0.8)
    assert anls("ab", ["ax"]) == 0.5 and anls("abcde", ["abxyz"]) == 0, "a distance beyond half scores nothing"
    rng = np.random.default_rng(0)
    some = 0
    for _ in range(40):
        said, *references = ("".join(rng.choice(list("abc"), size=int(rng.integers(1, 8)))) for _ in range(3))
        shares = [slow_distance(said, other) / max(len(said), len(other)) for other in references]
        expected = max(1 - share if share <= 0.5 else 0 for share in shares)
        some += 0 < expected < 1
        assert anls(said, references) == pytest.approx(expected)
    assert some > 5


@pytest.mark.parametrize(
    ("said", "reference", "score"),
    [
        ("105", "100", 1), ("95", "100", 1), ("105.1", "100", 0), ("-95", "-100", 1), ("1,050", "1000", 1),
        ("5%", "0.05", 1), ("5 %", "5%", 1), ("0", "0", 1), ("0.0", "0", 1), ("0.01", "0", 0), ("Red", "red", 1),
        ("about 100", "100", 0), ("red", "100", 0), ("inf", "100", 0), ("nan", "1", 0),
    ],
)  # fmt: skip
def test_relaxed_takes_numbers_within_five_percent(said, reference, score):
    assert relaxed(said, [reference]) == score


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B. cat", "B"), ("B) cat", "B"), ("The answer is B.", "B"),
        ("answer is: (c)", "C"), ("I think (A) fits", "A"), ("cat", "B"), ("It is a cat", "B"), ("dog or cat", None),
        ("A nice dog", "A"), ("A red thing", None), ("D", None), ("", None), ("bird", None),
    ],
)  # fmt: skip
def test_the_letter_that_an_answer_chooses(said, letter):
    assert chosen(said, ["dog", "cat", "fish"]) == letter


def test_choice_and_contains():
    assert choice("C", ["C"], ["x", "y", "z"]) == choice("z", ["C"], ["x", "y", "z"]) == choice("d", ["D"]) == 1
    assert choice("nothing", ["C"], ["x", "y", "z"]) == choice("", [""], []) == 0, "no letter is no right answer"
    assert contains("It says STOP here", ["stop"]) == 1 and contains("sto p", ["stop"]) == contains("x", [""]) == 0


def test_names():
    assert find_scorer("anls") is SCORERS["anls"]
    with pytest.raises(PruneZooError, match="scorer 'anlz' is unknown; did you mean 'anls'"):
        find_scorer("anlz")
