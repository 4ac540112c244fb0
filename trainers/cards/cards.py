"""Render model cards from run record and measured evaluation; no number is written by hand."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prunezoo.core.errors import PruneZooError
from prunezoo.core.hub import file_names
from prunezoo.core.registry import load_pruner
from trainers.cli.text import shown_path
from trainers.data.suite import list_suites, load_suite, suite_class
from trainers.evaluation.budgets import parse_budgets
from trainers.evaluation.examples import Example, pick_items, show_examples
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.methods import build_method
from trainers.evaluation.record import MEAN, mean_row, select, write_record
from trainers.evaluation.same_suite import SUITE
from trainers.evaluation.scores import ALL_TOKENS, FULL, NO_TOKENS, NONE
from trainers.evaluation.sheet import draw_sheet
from trainers.evaluation.sight import is_blind, notes_of
from trainers.evaluation.tables import budgets_of, display_name, methods_of, percent, span, tokens_of
from trainers.planning.share import share_on
from trainers.training.run_record import RUN_FILE, read_run

from .about import about, stage_of
from .axes import NOTE, axes
from .axes import markdown as axes_table
from .markdown import FILTERS
from .parts import (
    CARD_FILE,
    CARDS,
    METRICS_FILE,
    PICTURE_FILE,
    ROOT,
    STOP_FIGURE,
    budget_table,
    datasets_of,
    eval_results,
    histogram_tables,
    layer_table,
    policy_of,
    rival_table,
    speed_of,
    stop_rule_of,
    weakest,
    weights_digest,
)

SHIPPED = ROOT / "checkpoints"
CHEAPER = {
    "input": "Fewer patches make tower and language model cheaper; nothing in the tower sees what was left out.",
    "vision": "The tower's later blocks and the language model get cheaper; its first blocks see every patch.",
    "prompt": "Fewer tokens make the language model's part cheaper; the vision tower still sees every patch.",
    "layer": "Only the decoder layers behind the choice get cheaper; tower and first layers still see every patch.",
    "several": "What gets cheaper follows from its parts; the first that acts decides what still sees every patch.",
}
"""What fewer tokens make cheaper, by the stage of the method."""
RESTORED = (
    "Only the tower's later blocks get cheaper; behind it every patch has a token, and the language model reads all."
)
"""The same of a method that has every patch put out again."""
PICTURES = 3
"""Pictures of the suite, each of another group, that a card shows."""


def metrics_of(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an evaluation that this pruner's card rests on.

    Raises:
        PruneZooError: it does not measure this pruner, or other weights, or not a held-out split.
    """
    digest, measured = weights_digest(folder), record.get("weights", {})
    methods = [name for name in methods_of(record) if "?" not in name]  # as it is, not with other settings
    called = [name for name in methods if str(folder) == name or Path(name).name == folder.resolve().name]
    same = [name for name in methods if digest and measured.get(name) == digest]
    if not same and not called:
        raise PruneZooError(
            f"{folder}: the evaluation measured {', '.join(map(display_name, methods_of(record)))}, not it"
        )
    if not same:
        raise PruneZooError(f"{folder}: the evaluation measured other weights than lie there now; run it again")
    name = next((name for name in same if name in called), same[0])
    if record["split"] != "test":
        raise PruneZooError(f"{folder}: a card needs the held-out test split, the evaluation has {record['split']!r}")
    paired = [row for row in record["paired"] if row["pruner"] == name]
    kept = ("vlm", *SUITE, "split", "n", "seed", "command", "versions", "groups", "chance", "left_out", "sight")
    header = {key: record[key] for key in kept if key in record}
    parts: dict[str, Any] = {"rows": record["rows"], "paired": paired}
    for key in ("oracle_scale", "layers", "histogram"):  # which records of before they were measured have not
        if key in record:
            parts[key] = [row for row in record[key] if row["pruner"] == name]
    return {**header, "pruner": name, "weights": {name: digest}, **parts}


def render_card(folder: Path, metrics: Mapping[str, Any], repo: str | None = None) -> ModelCard:
    """The card of the pruner in a folder.

    Args:
        folder: what `save_pretrained` wrote, with the training's `run.json` where there is one.
        metrics: what `metrics_of` picked.
        repo: its Hub id, where it is rendered for the Hub.
    """
    pruner = load_pruner(folder)
    run_path = folder / RUN_FILE
    run = read_run(run_path) if run_path.is_file() else None
    vlm = metrics["vlm"]
    method = about(type(pruner))
    is_local = Path(vlm).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", vlm)
    budgets = budget_table(metrics)
    data = ModelCardData(
        license="apache-2.0",
        library_name="prunezoo",
        pipeline_tag="image-text-to-text",
        base_model=None if is_local else vlm,
        base_model_relation=None if is_local else "adapter",
        datasets=datasets_of(run),
        tags=[
            *("prunezoo", "visual-token-pruning", "token-reduction", pruner.name),
            *(f"{float(line['tokens'].split()[0]):g}-tokens" for line in budgets),
            *(f"arxiv:{paper}" for paper in method.papers),
        ],
        model_name=folder.resolve().name,
        eval_results=eval_results(metrics),
    )
    text = (
        templates()
        .get_template("template.md")
        .render(
            card_data=data.to_yaml(),
            name=folder.resolve().name,
            source=repo or shown_path(folder.resolve()),
            method=pruner.name,
            about=method.text,
            evidence=method.evidence,
            axes=axes_table(axes(pruner.name)),
            axes_note=NOTE,
            papers=method.references,
            parameters=f"{sum(p.numel() for p in pruner.parameters()):,}",
            work=share_on(pruner, vlm),
            cheaper=RESTORED if pruner.restore else CHEAPER[stage_of(type(pruner))],
            query_aware=getattr(pruner.config, "query_aware", None),
            base_model=pruner.base_model,
            clips=shows_clips(metrics),
            picture=PICTURE_FILE if (folder / PICTURE_FILE).is_file() else None,
            run=run,
            metrics=metrics,
            full=mean_row(metrics, FULL, ALL_TOKENS),
            blind=mean_row(metrics, NONE, NO_TOKENS),
            unseen=is_blind(metrics),
            notes=notes_of(metrics),
            budgets=budgets,
            rivals=rival_table(metrics, diagnostics=False),
            diagnostics=rival_table(metrics, diagnostics=True),
            weakest=weakest(metrics),
            layers=layer_table(metrics),
            histograms=histogram_tables(metrics),
            policy=policy_of(folder),
            oracle_scale=next((row for row in metrics.get("oracle_scale", ()) if row["group"] == MEAN), None),
            speed=speed_of(folder, pruner.name),
            stop_rule=stop_rule_of(folder),
            stop_figure=STOP_FIGURE if (folder / STOP_FIGURE).is_file() else None,
            parts=[name for name in file_names(pruner) if "/" in name],
            minutes=f"{run['seconds'] / 60:.1f}" if run else None,
        )
    )
    return ModelCard(text)


def templates() -> Environment:
    """The card templates; what other people wrote goes through one of `markdown.FILTERS`."""
    environment = Environment(  # Markdown, not a page: it has rules of its own
        loader=FileSystemLoader(CARDS),
        undefined=StrictUndefined,
        trim_blocks=True,
        autoescape=False,  # noqa: S701
    )
    environment.filters.update(FILTERS)
    return environment


def render_frozen_card(folder: Path, record: Mapping[str, Any]) -> ModelCard:
    """The card of a frozen model, from what `trainers.evaluate --instrument` measured.

    Raises:
        PruneZooError: the record was measured without `--instrument`.
    """
    if "instrument" not in record:
        raise PruneZooError(f"{folder}: the card of a frozen model needs `trainers.evaluate --instrument`")
    vlm, processor = load_vlm(str(folder))
    lines = []
    for keep in dict.fromkeys(row["keep"] for row in record["rows"]):
        for name in methods_of(record):
            rows = {row["group"]: row for row in select(record, pruner=name, keep=keep)}
            if rows:
                shown = name if name in (FULL, NONE) else f"{name}, {keep}"
                cells = [f"{100 * rows[group]['accuracy']:.1f}" for group in (*record["groups"], MEAN)]
                tokens = tokens_of(rows[MEAN])
                retention = f"{percent(rows[MEAN]['retention'])} ({span(rows[MEAN])})"
                lines.append({"name": shown, "tokens": tokens, "cells": cells, "retention": retention})
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["prunezoo", "visual-token-pruning"],
        model_name=folder.resolve().name,
    )
    text = (
        templates()
        .get_template("frozen_model.md")
        .render(
            card_data=data.to_yaml(),
            name=folder.resolve().name,
            architecture=type(vlm).__name__,
            parameters=f"{sum(p.numel() for p in vlm.parameters()):,}",
            side=vlm.config.vision_config.image_size,
            grid=vlm.config.vision_config.image_size // vlm.config.vision_config.patch_size,
            words=len(processor.tokenizer),
            record=record,
            notes=notes_of(record),
            lines=lines,
        )
    )
    return ModelCard(text)


def write_card(folder: Path, record: Mapping[str, Any], examples: Sequence[Example] = ()) -> list[Path]:
    """Write card and metrics into the folder, and a copy of a shipped model's card into `hub_cards/`.

    Args:
        folder: of a pruner, or of the frozen model itself.
        record: what `trainers.evaluate` measured.
        examples: what the pruner keeps of a few pictures, for the card's own; none: that picture stays as it is.

    Returns:
        The files that were written.
    """
    name = folder.resolve().name
    if folder.resolve() == Path(record["vlm"]).resolve():
        metrics, card = dict(record), render_frozen_card(folder, record)
    else:
        metrics = metrics_of(folder, record)
        if examples and not load_pruner(folder).restore:  # else every token is kept, and there is nothing to see
            draw_sheet(examples, metrics["pruner"]).save(folder / PICTURE_FILE, quality=90)
        card = render_card(folder, metrics)
    texts = {folder / CARD_FILE: str(card)}
    if folder.resolve().parent == SHIPPED:
        texts[CARDS / f"{name}.md"] = shipped_copy(str(card), name)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # a name need not be text
    write_record(metrics, folder / METRICS_FILE)
    return [*texts, folder / METRICS_FILE]


def shipped_copy(card: str, name: str) -> str:
    """A card as it stands in `hub_cards/`: its pictures lie beside the checkpoint."""
    return re.sub(r"\]\(([\w.-]+\.(?:png|webp))\)", rf"](../checkpoints/{name}/\1)", card)


def card_examples(folder: Path, record: Mapping[str, Any]) -> list[Example]:
    """What the pruner in a folder keeps of the first pictures of the suite that it was measured on."""
    metrics = metrics_of(folder, record)
    if metrics["suite"] not in list_suites():
        raise PruneZooError(
            f"{folder}: measured on {metrics['suite']}, whose pictures are not known here; `trainers.evaluate --card` "
            "draws them"
        )
    vlm, processor = load_vlm(metrics["vlm"])
    suite = load_suite(metrics["suite"], metrics["split"])
    items, method = pick_items(suite, 1)[:PICTURES], build_method(metrics["pruner"])
    return show_examples(vlm, processor, items, [method], parse_budgets(budgets_of(metrics)), suite)


def shows_clips(record: Mapping[str, Any]) -> bool:
    """Whether what was measured are clips, as far as the suite is known here."""
    return record["suite"] in list_suites() and suite_class(record["suite"]).clips
