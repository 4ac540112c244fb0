"""What a reader must know of a method stands beside its figures, in the README and in the table of all methods."""

from trainers.evaluation.summary import NOTES, footnotes, read_zoo, summary_section
from trainers.list import markdown


def test_a_note_stands_behind_the_name_and_below_the_table():
    marks, lines = footnotes(["random", "pyramiddrop", "fastv"])
    assert marks == {"random": "", "pyramiddrop": " [1]", "fastv": ""}
    assert lines == [f"[1] {NOTES['pyramiddrop']}  ", ""]
    assert footnotes(["pyramiddrop?layers=[1]"])[0] == {"pyramiddrop?layers=[1]": " [1]"}
    assert footnotes(["random"]) == ({"random": ""}, [])


def test_both_tables_say_that_pyramiddrops_authors_number_positions_anew():
    for text, name in ((summary_section(read_zoo()), "pyramiddrop"), (markdown(), "`pyramiddrop`")):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
        (note,) = [line for line in text.splitlines() if line.startswith("[1] ")]
        assert row.startswith(f"| {name} [1] |") and 'positions="compact"' in note
