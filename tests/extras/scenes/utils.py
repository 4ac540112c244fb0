"""How lmms-eval asks the questions of the suite, and judges the answers as `trainers.evaluate` does."""

import json


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return json.loads(doc["turns"])[-1][0]


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    messages = []
    for number, (question, answer) in enumerate(json.loads(doc["turns"])):
        image = [{"type": "image", "url": doc["image"].convert("RGB")}] if number == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages[:-1]


def process_results(doc, results):
    return {"accuracy": float(results[0].split() == doc["answer"].split())}
