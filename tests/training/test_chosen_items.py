"""Choosing training items: the methods, the list, the command, and that a training reads no other items."""

import json

import numpy as np
import pytest
from trainings import one_line_error, short, words

from trainers import select
from trainers.data.selection.chosen import Chosen
from trainers.data.selection.clusters import Clusters, cluster, without_duplicates
from trainers.data.selection.density import apart, choose_by_density, parts, quotas
from trainers.data.selection.prototype import choose_by_prototype
from trainers.data.selection.random_choice import choose_random
from trainers.fit import build


def some_clusters(items=120, count=6, seed=0):
    rng = np.random.default_rng(seed)
    middle = rng.normal(size=(count, 5))
    spread = rng.uniform(0.05, 0.6, size=count)
    of = rng.integers(count, size=items)
    return cluster(middle[of] + spread[of, None] * rng.normal(size=(items, 5)), count, seed)


def nearest_counts(part, sizes, count):
    """By trying all: the whole numbers nearest to ``part * count`` in squares, between floor and size."""
    floor = np.maximum(np.minimum(0.5 * count / len(sizes), sizes - 1), 0)
    grids = np.meshgrid(*[np.arange(np.ceil(low), size + 1) for low, size in zip(floor, sizes, strict=True)])
    all_of_them = np.stack([grid.ravel() for grid in grids], 1)
    all_of_them = all_of_them[all_of_them.sum(1) == count]
    return np.square(all_of_them - part * count).sum(1).min()


@pytest.mark.parametrize("seed", range(5))
def test_quotas_are_the_nearest_counts(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 15, size=4)
    count = int(sizes.sum() * rng.uniform(0.2, 0.9))
    part = parts(rng.uniform(size=4), 0.2)
    found = quotas(part, sizes, count)
    assert found.sum() == count and (found <= sizes).all()
    # rounding may miss the best whole numbers, by less than one item a cluster
    assert np.sqrt(np.square(found - part * count).sum()) <= np.sqrt(nearest_counts(part, sizes, count)) + 2


def test_a_wide_cluster_far_from_others_has_a_larger_part():
    found = some_clusters()
    width = np.array([found.distance[found.of == number].mean() for number in range(6)])
    complexity = width * apart(found.centres)
    part = parts(complexity, 0.1)
    assert part.sum() == pytest.approx(1) and part.argmax() == complexity.argmax()
    assert parts(complexity, 0.01).max() > part.max()


def test_density_keeps_the_far_ones_of_each_cluster():
    found = some_clusters()
    chosen = choose_by_density(found, 40, 0.5, 0.0)
    assert len(set(chosen.tolist())) == 40
    for number in range(6):
        inside = found.of == number
        kept = np.isin(np.flatnonzero(inside), chosen)
        distance = found.distance[inside]
        assert not kept.any() or kept.all() or distance[kept].min() >= distance[~kept].max()


def test_duplicates_go_first_and_come_back_last():
    once = some_clusters(40, 4)
    twice = Clusters(
        *(np.repeat(part, 2, axis=0) if part is not once.centres else part for part in vars(once).values())
    )
    stay = without_duplicates(twice, 1e-9)
    assert len(stay) == 40 and (stay // 2 == np.arange(40)).all()
    assert set(choose_by_density(twice, 30, 0.5, 1e-9)) <= set(stay)
    assert set(stay) < set(choose_by_density(twice, 60, 0.5, 1e-9))
    assert len(without_duplicates(twice, 2.0)) == 4  # of each cluster one


def test_prototype_holds_far_or_near_ones_and_half_of_each_group():
    found = some_clusters()
    groups = np.where(np.arange(120) < 12, 7, 3)
    hard, easy = (choose_by_prototype(found, groups, 40, hold) for hold in ("hard", "easy"))
    assert len(hard) == len(easy) == 40
    assert found.distance[hard].mean() > found.distance.mean() > found.distance[easy].mean()
    for chosen in (hard, easy):
        assert (groups[chosen] == 7).sum() >= 10  # of 20, were they even
    free = choose_by_prototype(found, groups, 40, "hard", floor=0.0)
    assert set(free) == set(np.argsort(-found.distance)[:40])


def test_random_shares_lie_within_larger_ones():
    assert set(choose_random(100, 20, 1)) < set(choose_random(100, 50, 1))
    assert set(choose_random(100, 20, 1)) != set(choose_random(100, 20, 2))


@pytest.fixture
def select_words(world, tiny_llava_folder, tmp_path):
    made = [*words(world, tiny_llava_folder, tmp_path / "out"), f"--cache={tmp_path / 'embeddings'}", "--clusters=3"]
    return [*made, f"--file={tmp_path / 'only.json'}"]


@pytest.mark.parametrize("method", ["random", "prototype", "dbp"])
def test_a_training_reads_only_what_was_chosen(method, select_words, world, tiny_llava_folder, tmp_path, capsys):
    select.main([*select_words, f"--method={method}", "--share=0.4"])
    chosen = Chosen.read(tmp_path / "only.json")
    assert chosen.how["method"] == method and len(chosen.ids) == round(0.4 * chosen.total)
    assert f"{len(chosen.ids)} of {chosen.total} items" in capsys.readouterr().out
    cli = build(short(world, tiny_llava_folder, tmp_path / "out", f"--data.only={tmp_path / 'only.json'}"))
    cli.datamodule.setup()
    assert [item.id for item in cli.datamodule.train_set] == list(chosen.ids)
    held_out = {item.id for item in cli.datamodule.validation_set}
    assert held_out and not held_out & set(chosen.ids)


def test_embeddings_are_asked_for_once(select_words, tmp_path, capsys, monkeypatch):
    select.main([*select_words, "--method=dbp", "--share=0.4"])
    first = (tmp_path / "only.json").read_text()
    monkeypatch.setattr("trainers.caches.embeddings.EmbeddingWorker.read", None)  # it would fail
    select.main([*select_words, "--method=dbp", "--share=0.4"])
    assert (tmp_path / "only.json").read_text() == first
    select.main([*select_words, "--method=prototype", "--share=0.2", "--hold=hard"])


def test_a_suite_is_chosen_from_by_the_same_command(tiny_llava_folder, tmp_path):
    recipe = ["--config=ppm_tiny", "--data.train_items=40", "--data.workers=0", f"--out={tmp_path / 'out'}"]
    recipe.append("--trainer.accelerator=cpu")
    file = tmp_path / "only.json"
    select.main([*recipe, "--method=random", "--share=0.25", f"--file={file}"])
    cli = build([*recipe, f"--data.only={file}"])
    cli.datamodule.setup()
    assert [item.id for item in cli.datamodule.train_set] == list(Chosen.read(file).ids)
    assert len(cli.datamodule.train_set) == 10
    other = build([*recipe, f"--data.only={file}", "--data.train_items=41"])
    with pytest.raises(Exception, match="chosen from 40 items, and here are 41"):
        other.datamodule.setup()
    other = build([*recipe, f"--data.only={file}", "--data.suite=easy-vqa", "--data.train_items=40"])
    with pytest.raises(Exception, match="chosen from suite=scenes, and here it is easy-vqa"):
        other.datamodule.setup()


def changed(file, **what):
    file.write_text(json.dumps({**json.loads(file.read_text()), **what}))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"ids": ["another"] * 4}, "was chosen; the data have changed: choose anew"),
        ({"numbers": [3, 2, 1, 0]}, "as many ids as ascending numbers"),
        ({"numbers": [0, 1, 2, 10**9]}, "as many ids as ascending numbers"),
        ({"total": True}, "as many ids as ascending numbers"),
        ({"more": 1}, "not a list of chosen items"),
    ],
)
def test_a_wrong_list_is_refused(what, said, select_words, world, tiny_llava_folder, tmp_path):
    file = tmp_path / "only.json"
    select.main([*select_words, "--method=random", "--share=0.4"])
    count = len(Chosen.read(file).ids)
    what = {key: value[:1] * count if key == "ids" else value for key, value in what.items()}
    changed(file, **what)
    cli = build(short(world, tiny_llava_folder, tmp_path / "out", f"--data.only={file}"))
    with pytest.raises(Exception, match=said):
        cli.datamodule.setup()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--share=0", "--share 0.0: above 0"),
        ("--share=1.5", "--share 1.5"),
        ("--share=0.001", "none of"),
        ("--clusters=0", "--clusters 0"),
        ("--clusters=999", "--clusters 999: between 1 and"),
        ("--temperature=0", "--temperature 0.0"),
        ("--duplicates=3", "--duplicates 3.0"),
        ("--processes=0", "--processes 0"),
        ("--data.only=some.json", "data.only: the recipe trains on chosen items already"),
        ("--method=best", "method"),
    ],
)
def test_mistakes_name_their_option(wrong, said, select_words, capsys, monkeypatch):
    words_ = [*select_words, "--method=dbp", "--share=0.5", wrong]
    assert said in one_line_error(capsys, monkeypatch, words_, select.main)
