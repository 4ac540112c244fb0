"""Render model cards from run record and measured evaluation; no number is written by hand.

    python -m trainers.cards checkpoints/ppm-tiny --json evaluation.json

writes `README.md` (the card) and `metrics.json` (the numbers behind it) into the folder and, for what ships in
`checkpoints/`, a copy of the card into `hub_cards/`. For the frozen model's own folder it is the instrument's card.
Without `--json` the card is rendered anew from the folder's own `metrics.json`; `--picture` draws what is kept.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from modules.core.contract import AUTO
from modules.core.errors import PruneZooError
from modules.core.hub import file_names
from modules.core.registry import load_pruner

from .about import about
from .benchmarking.measure import BARE
from .benchmarking.tables import COLUMNS, ratio, settings_of
from .data.suite import load_suite
from .errors import command
from .evaluation.budgets import parse_budgets
from .evaluation.examples import Example, pick_items, show_examples
from .evaluation.loading import load_vlm
from .evaluation.methods import build_method
from .evaluation.record import MEAN, Row, read_record, select, write_record
from .evaluation.scores import ALL_TOKENS, FULL, NO_TOKENS, NONE, is_diagnostic
from .evaluation.sheet import draw_sheet
from .evaluation.tables import budgets_of, display_name, methods_of, percent, span, tokens_of
from .run_record import RUN_FILE

ROOT = Path(__file__).parent.parent
CARDS, SHIPPED = ROOT / "hub_cards", ROOT / "checkpoints"
PICTURES = 3
"""Pictures of the suite, each of another group, that a card shows."""
POLICY_FILE = "policy.json"
CARD_FILE, METRICS_FILE, WEIGHTS_FILE = "README.md", "metrics.json", "model.safetensors"
SPEED_FILE, PICTURE_FILE = "speed.json", "kept.webp"
STOP_FILE, STOP_FIGURE = "stop_rule.json", "stop_rule.png"


def weights_digest(folder: str | Path) -> str | None:
    """SHA-256 of a folder's weights, by which an evaluation knows them again; None where there are none."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        return None
    parts = sorted(path.parent.glob("*/*.safetensors"))  # those of a LoRA
    return hashlib.sha256(b"".join(p.read_bytes() for p in (path, *parts))).hexdigest()


def metrics_of(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an evaluation that this pruner's card rests on.

    Raises:
        PruneZooError: it does not measure this pruner, or other weights, or not a held-out split.
    """
    digest = weights_digest(folder)
    names = [p for p in methods_of(record) if "/" in p and Path(p).name == folder.resolve().name] + (
        [str(folder)] if str(folder) in methods_of(record) else []
    )
    if not names:
        raise PruneZooError(
            f"{folder}: the evaluation measured {', '.join(map(display_name, methods_of(record)))}, not it"
        )
    name = names[-1]
    if record.get("weights", {}).get(name) != digest:
        raise PruneZooError(f"{folder}: the evaluation measured other weights than lie there now; run it again")
    if record["split"] != "test":
        raise PruneZooError(f"{folder}: a card needs the held-out test split, the evaluation has {record['split']!r}")
    paired = [row for row in record["paired"] if row["pruner"] == name]
    kept = ("vlm", "suite", "split", "n", "seed", "command", "versions", "groups", "chance")
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
    run = json.loads(run_path.read_text(encoding="utf-8")) if run_path.is_file() else None
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
            source=repo or shown_path(folder),
            method=pruner.name,
            about=method.text,
            evidence=method.evidence,
            papers=method.papers,
            parameters=f"{sum(p.numel() for p in pruner.parameters()):,}",
            query_aware=getattr(pruner.config, "query_aware", None),
            base_model=pruner.base_model,
            picture=PICTURE_FILE if (folder / PICTURE_FILE).is_file() else None,
            run=run,
            metrics=metrics,
            full=_mean(metrics, FULL, ALL_TOKENS),
            blind=_mean(metrics, NONE, NO_TOKENS),
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


def datasets_of(run: Mapping[str, Any] | None) -> list[str] | None:
    """What it was trained on, by the names in the run record, `LlavaDataModule(mix665k.json, images)`."""
    match = re.search(r"\((.+)\)", run["data"]) if run else None
    return [Path(name).stem for name in match[1].split(", ")][:1] if match else None


def speed_of(folder: Path, method: str) -> dict[str, Any] | None:
    """What `trainers.benchmark` measured: of this pruner, in its folder, or else of its method, in `hub_cards/`."""
    path = folder / SPEED_FILE if (folder / SPEED_FILE).is_file() else CARDS / SPEED_FILE
    record = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for (batch, length), cases in settings_of(record["rows"]):
        for (name, keep), parts in cases.items():
            if name != BARE and Path(name).name in (method, folder.resolve().name):
                cells = {COLUMNS[part]: ratio(parts[part]) for part in COLUMNS if part in parts}
                own = f"{1000 * parts['pruner']['median_s']:.1f}" if "pruner" in parts else "–"
                tokens = f"{next(iter(parts.values()))['tokens']:g}"
                line = {"batch": batch, "length": length, "keep": keep, "tokens": tokens, "cells": cells, "own": own}
                lines.append(line)
    return {"lines": lines, "own": path.parent == folder, **record} if lines else None


def stop_rule_of(folder: Path) -> dict[str, Any] | None:
    """What `trainers.stop_curve` measured of these weights; None where nothing was measured, or of other weights."""
    path = folder / STOP_FILE
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["weights"] != weights_digest(folder):
        return None
    rows = {row["keep"]: row for row in record["rows"] if row["kind"] == "stop rule"}
    lines = []
    for pair in record["paired"]:
        row = rows[pair["keep"]]
        retention = f"{percent(row['retention'])} ({span(row)})"
        line = {"keep": row["keep"], "tokens": tokens_of(row), "retention": retention, "above": _signed(pair)}
        lines.append(line)
    return {"lines": lines, **record}


def templates() -> Environment:
    """The card templates."""
    return Environment(  # Markdown, not a page: nothing to escape
        loader=FileSystemLoader(CARDS),
        undefined=StrictUndefined,
        trim_blocks=True,
        autoescape=False,  # noqa: S701
    )


def eval_results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    """Accuracy and retention of the pruner, for each group and the mean, at every budget."""
    results = []
    for row in select(metrics, pruner=metrics["pruner"]):
        for kind, value in (("accuracy", row["accuracy"]), ("retention", row["retention"])):
            if value is not None:
                results.append(
                    EvalResult(
                        task_type="image-text-to-text",
                        dataset_type=metrics["suite"],
                        dataset_name=metrics["suite"],
                        dataset_config=row["group"],
                        dataset_split=metrics["split"],
                        metric_type=kind,
                        metric_name=f"{kind}, keep {row['keep']}",
                        metric_value=value,
                    )
                )
    return results


def budget_table(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line a budget: its tokens, and retention with interval for each group and the mean."""
    lines = []
    for keep in budgets_of(metrics):
        rows = {row["group"]: row for row in select(metrics, pruner=metrics["pruner"], keep=keep)}
        groups = [*metrics["groups"], MEAN]
        cells = [f"{percent(rows[group]['retention'])} ({span(rows[group])})" for group in groups]
        example = f'"{keep}"' if AUTO.fullmatch(keep) else keep  # as it is written in Python
        lines.append({"keep": keep, "example": example, "tokens": tokens_of(rows[MEAN]), "cells": cells})
    return lines


def layer_table(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line a decoder layer, where they read different numbers of tokens: mean and spread at every budget."""
    rows = metrics.get("layers", ())  # not in older metrics
    lines = []
    for layer in sorted({row["layer"] for row in rows}):
        here = {row["keep"]: row for row in rows if row["layer"] == layer}
        cells = [f"{here[keep]['tokens']:.1f} ± {here[keep]['spread']:.1f}" for keep in budgets_of(metrics)]
        lines.append({"layer": layer, "cells": cells})
    return lines


def histogram_tables(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table a budget that the pruner sets: for each group the mean, and how many questions get which tokens."""
    rows = metrics.get("histogram", ())  # not in older metrics
    tables = []
    for keep in dict.fromkeys(row["keep"] for row in rows):
        here = {(row["group"], row["tokens"]): row["share"] for row in rows if row["keep"] == keep}
        columns = sorted({tokens for _, tokens in here})
        lines = []
        for group in metrics["groups"]:
            shares = [here.get((group, tokens), 0.0) for tokens in columns]
            mean = sum(share * tokens for share, tokens in zip(shares, columns, strict=True))
            lines.append({"group": group, "mean": f"{mean:.1f}", "cells": [f"{100 * share:.0f}" for share in shares]})
        tables.append({"keep": keep, "columns": [f"{tokens:g}" for tokens in columns], "lines": lines})
    return tables


def policy_of(folder: Path) -> dict[str, Any] | None:
    """What `trainers.policy_record` wrote of a policy that learned by its rewards."""
    path = folder / POLICY_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def rival_table(metrics: Mapping[str, Any], diagnostics: bool) -> list[dict[str, Any]]:
    """One line a rival, or a diagnostic: its mean retention at every budget, and how far the pruner is above it."""
    lines = []
    for rival in dict.fromkeys(p["rival"] for p in metrics["paired"] if is_diagnostic(p["rival"]) == diagnostics):
        cells = []
        for keep in budgets_of(metrics):
            row = _mean(metrics, rival, keep)
            (pair,) = (p for p in metrics["paired"] if p["rival"] == rival and p["keep"] == keep)
            cells.append(f"{percent(row['retention'])}, {_signed(pair)}")
        lines.append({"rival": display_name(rival), "cells": cells})
    return lines


def weakest(metrics: Mapping[str, Any]) -> list[Row]:
    """The row of the lowest retention at each budget."""
    worst = []
    for keep in budgets_of(metrics):
        rows = select(metrics, pruner=metrics["pruner"], keep=keep)
        rows = [row for row in rows if row["group"] != MEAN and row["retention"] is not None]
        worst += sorted(rows, key=lambda row: row["retention"])[:1]
    return worst


def shown_path(folder: Path) -> str:
    """A folder as the card shows it: within the repository from its root, elsewhere by its last name alone."""
    folder = folder.resolve()
    return str(folder.relative_to(ROOT)) if folder.is_relative_to(ROOT) else folder.name


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
            tokens=_mean(record, FULL, ALL_TOKENS)["tokens"],
            words=len(processor.tokenizer),
            record=record,
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
    paths = [folder / CARD_FILE]
    if folder.resolve() == Path(record["vlm"]).resolve():
        metrics, card = dict(record), render_frozen_card(folder, record)
    else:
        metrics = metrics_of(folder, record)
        if examples:
            draw_sheet(examples, metrics["pruner"]).save(folder / PICTURE_FILE, quality=90)
        card = render_card(folder, metrics)
    text = str(card)
    if folder.resolve().parent == SHIPPED:
        paths.append(CARDS / f"{folder.resolve().name}.md")
    for path in paths:
        path.write_text(text, encoding="utf-8")
    write_record(metrics, folder / METRICS_FILE)
    return [*paths, folder / METRICS_FILE]


def card_examples(folder: Path, record: Mapping[str, Any]) -> list[Example]:
    """What the pruner in a folder keeps of the first pictures of the suite that it was measured on."""
    metrics = metrics_of(folder, record)
    vlm, processor = load_vlm(metrics["vlm"])
    items = pick_items(load_suite(metrics["suite"], metrics["split"]), 1)[:PICTURES]
    method = build_method(metrics["pruner"])
    return show_examples(vlm, processor, items, [method], parse_budgets(budgets_of(metrics)))


def _mean(metrics: Mapping[str, Any], pruner: str, keep: str) -> Row:
    (row,) = select(metrics, pruner=pruner, keep=keep, group=MEAN)
    return row


def _signed(pair: Row) -> str:
    if pair["difference"] is None:
        return "–"
    return f"{pair['difference']:+.1f} ({pair['ci'][0]:+.1f} … {pair['ci'][1]:+.1f})"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the card of a checkpoint folder."""
    p = argparse.ArgumentParser(prog="python -m trainers.cards", description="Write a pruner's model card.")
    p.add_argument("folder", type=Path, help="the pruner's folder")
    p.add_argument("--json", type=Path, help="what `trainers.evaluate --json` wrote; by default the folder's own")
    p.add_argument("--picture", action="store_true", help="draw the picture of kept tokens anew")
    args = p.parse_args(argv)
    record = read_record(args.json or args.folder / METRICS_FILE)
    examples = card_examples(args.folder, record) if args.picture else ()
    for path in write_card(args.folder, record, examples):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
