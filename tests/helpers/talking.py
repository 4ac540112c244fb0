"""Conversations about tiny pictures in every kind of source, and the families' processors to read them."""

import io
import json
import tarfile

import datasets
from PIL import Image
from tiny_llava import make_image

from tests.families.test_families_processors import make
from trainers.data.llava_json import LlavaJson
from trainers.data.suite import Item
from trainers.data.web_shards import WebShards


def talk(*texts):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


TALK = talk("<image>\nwhat color is the ball ?", "red")


def encoded(number, kind="PNG"):
    file = io.BytesIO()
    make_image(number).save(file, kind)
    return file.getvalue()


def write_json(folder, entries, name="data.json"):
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encoded(number))
    text = "\n".join(map(json.dumps, entries)) if name.endswith("l") else json.dumps(entries)
    (folder / name).write_text(text, encoding="utf-8")
    return LlavaJson(folder / name, folder)


def add(shard, name, data, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    shard.addfile(member, io.BytesIO(data) if member.isreg() else None)


def write_shard(path, conversations, picture=None):
    with tarfile.open(path, "w") as shard:
        for number, said in enumerate(conversations):
            add(shard, f"{number}.png", picture or encoded(number))
            data = said if isinstance(said, bytes) else json.dumps({"conversations": said}).encode()
            add(shard, f"{number}.json", data)
    return WebShards(str(path))


def write_hub(folder, images=None, **columns):
    images = images or [{"bytes": encoded(number), "path": None} for number in range(4)]
    table = datasets.Dataset.from_dict({"image": images, **columns})
    return table.cast_column("image", datasets.Image())


TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'] }} : {% for part in m['content'] %}{% if part['type'] == 'image' %} HERE "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
)


def family_processor(name):
    processor, placeholder = make(name)
    processor.chat_template = TEMPLATE.replace("HERE", placeholder)
    return processor


def item(question, answer="w11", size=(48, 48), name="x"):
    return Item(name, Image.new("RGB", size, "red"), ((question, answer),), "all")
