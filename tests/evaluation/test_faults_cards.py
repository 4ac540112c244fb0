"""What other people's texts can do to a card, and what a card must not carry."""

import json
import re
import sys

import pytest
import yaml
from huggingface_hub import ModelCard
from measurements import ESCAPE, HEADER, measured
from records import publish_it, record_of

from prunezoo import build_pruner, list_pruners
from prunezoo.core.registry import pruner_class
from prunezoo.tokenizers.one_d_piece import OneDPiece
from trainers.cards import __main__ as cards
from trainers.cards.about import Reference, about
from trainers.cards.cards import render_card, render_frozen_card, write_card
from trainers.cards.markdown import bibtex, code, fence, inline
from trainers.cards.parts import datasets_of, weights_digest
from trainers.evaluation.instrument import Verdict
from trainers.evaluation.record import build_record, write_record
from trainers.publish import check

HOME = "/home/somebody/secret"
MARKUP = [
    "<script>alert(1)</script>",
    "[x](http://evil.example)",
    "**b** _i_ `c`",
    "a|b",
    "![](p.png)",
    ESCAPE,
    "a\n# b",
]


@pytest.fixture
def folder(tmp_path):
    pruner = build_pruner("ppm", width=16)
    pruner.save_pretrained(tmp_path / "my-ppm")
    return tmp_path / "my-ppm"


def run_of(**change):
    facts = {"command": f"python -m trainers.fit --out={HOME}/ppm", "vlm": f"{HOME}/llava", "seed": 0, "steps": 1}
    facts |= {"seconds": 60.0, "device": "CPU", "processes": 1}
    facts |= {"data": f"LlavaJsonDataModule({HOME}/train.json, {HOME}/i)"}
    facts |= {"recipe": f"data:\n  json: {HOME}/my data/train.json\nout: '{HOME}/ppm'\n"}
    return {**facts, **change}


def record_for(folder, **header):
    return record_of(str(folder), weights_digest(folder), **header)


def outside_code(text):
    """A card's Markdown without its metadata and without its blocks and spans of code."""
    body = ModelCard(text).text
    body = re.sub(r"(?ms)^(`{3,})[^`\n]*\n.*?^\1$", "", body)
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", body)


@pytest.mark.parametrize("text", MARKUP)
def test_every_text_of_a_card_is_letters(folder, text):
    """Model, groups, rivals, suite, device, data and commands are called as HTML and Markdown are written."""
    (folder / "run.json").write_text(json.dumps(run_of(vlm=text, device=text, data=text, command=f"x ```\n{text}")))
    config = json.loads((folder / "config.json").read_text())
    model = {"name": text, "family": "llava", "width": 16, "depth": 2, "tower": text, "tower_width": 8}
    (folder / "config.json").write_text(json.dumps({**config, "base_model": {**config.get("base_model", {}), **model}}))
    record = record_for(folder, rival=text, vlm=text, suite=text, command=f"```\n<b>{text}")
    record["groups"] = [text if group == "count" else group for group in record["groups"]]
    for row in record["rows"]:
        row["group"] = text if row["group"] == "count" else row["group"]
    shown = write_card(folder, record)[0].read_text(encoding="utf-8")
    body = outside_code(shown)
    assert "\x1b" not in shown and "\x07" not in shown
    assert not re.search(r"(?<!\\)<(script|b)\b", body)
    assert not re.search(r"(?<!\\)\[x(?<!\\)\]\(", body) and not re.search(r"(?<!\\)!\[\]", body)
    assert not re.search(r"(?m)^# b", body) and "**b**" not in body
    widths = {line.count("|") - line.count(r"\|") for line in body.splitlines() if "**mean**" in line}
    assert widths == {len(record["groups"]) + 4}
    assert isinstance(yaml.safe_load(shown.split("---\n")[1]), dict)


@pytest.mark.parametrize("text", MARKUP)
def test_the_parts_of_markdown(text):
    assert "\n" not in inline(text) and "\n" not in code(text)
    ticks = re.match("`+", fence(f"```\n{text}\n````"))[0]
    assert len(ticks) == 5 and fence("x", "yaml") == "```yaml\nx\n```"
    assert inline("ppm_tiny attribute 1/9 fastv?layer=1 (scenes)") == "ppm_tiny attribute 1/9 fastv?layer=1 (scenes)"


def test_cards_and_what_is_published_carry_no_folders_of_this_machine(folder, capsys, monkeypatch, hub):
    (folder / "run.json").write_text(json.dumps(run_of()))
    command = f"python -m trainers.evaluate --vlm {HOME}/llava --pruner {folder} --json '{HOME}/my runs/e.json'"
    write_card(folder, record_for(folder, vlm=f"{HOME}/llava", command=command))
    text = (folder / "README.md").read_text()
    assert "secret" not in text and str(folder.parent) not in text
    assert "python -m trainers.fit --out=ppm" in text and "`llava`" in text and "json: train.json" in text
    assert "datasets" not in ModelCard(text).data.to_dict()
    publish_it(folder, capsys, "org/ppm-test", "--dry-run")

    files = check(folder, "org/ppm-test").files
    assert not [
        name for name, content in files.items() if b"secret" in content or str(folder.parent).encode() in content
    ]
    assert json.loads(files["metrics.json"])["rows"]


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ("SuiteDataModule(scenes)", ["scenes"]),
        ("SuiteArms(scenes)", ["scenes"]),
        ("HubDataModule(org/talks)", ["org/talks"]),
        ("TaughtHub(org/talks, x)", ["org/talks"]),
        ("SuitesInTurn(scenes, pages)", ["scenes", "pages"]),
        ("LlavaJsonDataModule(train.json, images)", None),
        ("WebShardsDataModule(data/{0..9}.tar)", None),
        ("HubDataModule(/home/me/talks)", None),
        ("HubDataModule(tests/hub)", None),
        ("nothing", None),
    ],
)
def test_data_sets_are_named_only_as_others_know_them(data, names):
    assert datasets_of({"data": data}) == names and datasets_of(None) is None


def test_a_card_of_a_model_that_does_not_see_warns_and_ranks_nothing(folder, capsys):
    """Of 0 % right, and of 20 % where zero tokens have 16 %."""
    for full, none, said in ((0.0, 0.0, "answers nothing right"), (0.2, 0.16, "No retention and no ranking: the full")):
        m = measured([full], [none], [0.3 if full else 0.0])
        scores = {(str(folder) if p == "good" else p, keep): of for (p, keep), of in m.scores.items()}
        weights = {str(folder): weights_digest(folder)}
        record = build_record(type(m)(m.groups, m.group_of, {}, scores), [str(folder)], {**HEADER, "weights": weights})
        write_record(record, folder / "evaluation.json")
        assert cards.main([str(folder), "--json", str(folder / "evaluation.json")]) == 0
        assert "warning: No retention and no ranking" in capsys.readouterr().err
        text = (folder / "README.md").read_text()
        assert "**Warning.** No retention and no ranking" in text and said in text
        assert "Rivals under" not in text and "weakest group" not in text and "Retention, accuracy" not in text
        results = ModelCard(text).data.eval_results
        assert {result.metric_type for result in results} == {"accuracy"}
        assert all(row["retention"] is None for row in json.loads((folder / "metrics.json").read_text())["rows"])
        again = render_card(folder, json.loads((folder / "metrics.json").read_text()))
        assert str(again) == text


def test_the_card_of_a_frozen_model_says_so_too(tiny_llava_folder):
    record = build_record(measured([0.2], [0.16], [0.3]), ["good"], HEADER)
    record["instrument"] = [vars(Verdict("a < b", "1 %", False))]
    text = str(render_frozen_card(tiny_llava_folder, record))
    assert "**Warning.** No retention and no ranking" in text and r"a \< b" in text


def test_what_was_left_out_stands_in_the_card(folder):
    record = record_for(folder, left_out=[{"pruner": "fastervlm", "why": "this vision tower has no CLS token"}])
    text = write_card(folder, record)[0].read_text()
    assert "Left out, since this model cannot have them: fastervlm (this vision tower has no CLS token)." in text


# BibTeX

FIELD = r"  (\w+) = \{\{?([^{}]*)\}?\}"


def entries(text):
    """Kind, key and fields of each entry, which holds nothing else."""
    found = re.findall(rf"@(\w+)\{{([\w:.]+),\n((?:{FIELD},\n)*{FIELD})\n\}}", text)
    assert len(found) == text.count("@") and text.count("{") == text.count("}")
    return [(kind, key, dict(re.findall(FIELD, body))) for kind, key, body, *_ in found]


@pytest.mark.parametrize("method", [*map(pruner_class, list_pruners()), OneDPiece], ids=lambda method: method.name)
def test_every_paper_can_be_cited(method):
    """What a file names by a number, it or another file names in full."""
    numbers = set(re.findall(r"\b\d{4}\.\d{5}\b", sys.modules[method.__module__].__doc__))
    cited = entries(bibtex(about(method).references))
    assert {fields["eprint"] for _, _, fields in cited} == numbers
    for kind, key, fields in cited:
        assert key == f"arXiv:{fields['eprint']}" and fields["url"].endswith(fields["eprint"])
        assert fields["title"] and re.search(r"\w and \w+$", fields["author"]) and "et al" not in fields["author"]
        assert 0 <= int(fields["year"]) - 2000 - int(fields["eprint"][:2]) <= 2, fields
        assert {"inproceedings": "booktitle", "article": "journal"}.get(kind, "url") in fields


def test_what_the_headers_say():
    said = {name: entries(bibtex(about(pruner_class(name)).references)) for name in ("hiprune", "vscan", "lvlm_csp")}
    hiprune, vscan, csp = (found[0] for found in said.values())
    assert hiprune[2] == {
        "title": "HiPrune: Hierarchical Attention for Efficient Token Pruning in Vision-Language Models",
        "author": "Liu and others", "booktitle": "Findings of ACL", "year": "2026", "archiveprefix": "arXiv",
        "eprint": "2508.00553", "url": "https://arxiv.org/abs/2508.00553"}  # fmt: skip
    assert (vscan[0], vscan[2]["journal"]) == ("article", "TMLR")
    assert csp[0] == "misc" and csp[2]["title"].startswith(r"LVLM\_CSP: ")
    assert csp[2]["title"].endswith("via Clustering, Scattering, and Pruning for Reasoning Segmentation")
    (tomesd,) = entries(bibtex(about(pruner_class("tome_unmerge")).references))
    assert tomesd[2]["author"] == "Bolya and Hoffman" and tomesd[2]["booktitle"] == "CVPR workshops"
    both = {name: about(pruner_class(name)).references[0] for name in ("fastervlm", "vispruner")}
    assert both["fastervlm"].number == both["vispruner"].number  # each file calls it as it was called then
    assert both["fastervlm"].title != both["vispruner"].title


def test_of_a_number_alone_only_the_number_is_said():
    ((kind, _, fields),) = entries(bibtex([Reference("1711.00937", "2017")]))
    assert kind == "misc" and fields == {
        "year": "2017", "archiveprefix": "arXiv", "eprint": "1711.00937", "url": "https://arxiv.org/abs/1711.00937"
    }  # fmt: skip


def test_no_title_ends_an_entry():
    ((_, _, fields),) = entries(bibtex([Reference("1711.00937", "2017", "a} % b\\ & {c_d", "A & B", "$ #")]))
    assert fields["title"] == r"a \% b \& c\_d" and fields["author"] == r"A \& B" and fields["booktitle"] == r"\$ \#"
