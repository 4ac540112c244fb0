"""What coming back must equal: every layer run by hand over all columns, with a mask of four dimensions; no cache.

Columns that are away are computed too, to nobody's use: none may look at them, and when they come back what they have
become is thrown away for the state in which they are to come back. Nothing is shared with the code under test.
"""

import torch


def away_by_layer(calls, encoded):
    """By layer, the columns ``(B, L)`` that are away from there on; from what a pruner was asked and answered."""
    result = {}
    for inputs, output in calls:
        away = torch.zeros_like(encoded.mask)
        for row, sample in enumerate(encoded.sample.tolist()):
            slots, here = encoded.slots[row], output.index[row][output.valid[row]]
            away[sample, slots[encoded.inputs.valid[row]]] = True
            away[sample, slots[here]] = False
            if encoded.newlines is not None:
                lines = encoded.newlines
                for line in lines.valid[row].nonzero()[:, 0].tolist():
                    own = (lines.ends[row][here] == line).any()
                    away[sample, lines.slots[row][line]] = not own
        result[inputs.layer] = away
    return result


def embedded(vlm, encoded):
    """``(B, L, D)``: what enters layer 0."""
    embeds = vlm.get_input_embeddings()(encoded.batch["input_ids"]).clone()
    for row, sample in enumerate(encoded.sample.tolist()):
        valid = encoded.inputs.valid[row]
        embeds[sample, encoded.slots[row][valid]] = encoded.inputs.features[row][valid].to(embeds.dtype)
    return embeds


def by_layers(vlm, embeds, real, away, comes_back, positions=None, compact=False):
    """Logits ``(B, L, V)``.

    Args:
        vlm: With a decoder of Llama's make.
        embeds: ``(B, L, D)``, what enters layer 0.
        real: ``(B, L)`` bool, no padding.
        away: By layer, ``(B, up to L)`` bool, what nobody looks at from there on, up to the next layer named.
        comes_back: "raw", as it entered layer 0, or "last", as it was when it left.
        positions: ``(B, L)``; None: the columns.
        compact: What is here is numbered anew.
    """
    decoder = vlm.get_decoder()
    rows, length = real.shape
    if positions is None:
        positions = torch.arange(length).expand(rows, -1)
    hidden, held = embeds, embeds
    now = torch.zeros_like(real)
    for layer in range(len(decoder.layers)):
        if layer in away:
            before, now = now, torch.zeros_like(real)
            now[:, : away[layer].shape[1]] = away[layer]
            if comes_back == "last":
                held = hidden.where((now & ~before)[..., None], held)
            hidden = held.where((before & ~now)[..., None], hidden)
        allowed = torch.ones(length, length).tril().bool() & (real & ~now)[:, None]
        mask = torch.zeros(rows, length, length).masked_fill(~allowed, torch.finfo(torch.float).min)[:, None]
        places = positions - now.cumsum(1) if compact else positions
        rotary = decoder.rotary_emb(hidden, places)
        hidden = decoder.layers[layer](hidden, attention_mask=mask, position_embeddings=rotary, position_ids=places)
    return vlm.lm_head(decoder.norm(hidden))


def write(vlm, encoded, away, comes_back, steps, compact=False, turns=()):
    """Greedy decoding of left-padded prompts, all computed anew for each word.

    Args:
        vlm, encoded, away, comes_back, compact: As above.
        steps: Words to write; all of them are real.
        turns: Of a further turn each: ids ``(B, T)`` and their mask, put behind, and as many words written again.

    Returns:
        Logits ``(B, V)`` of each word written, one after the other.
    """
    embeds, real, logits = embedded(vlm, encoded), encoded.mask, []

    def put(ids, seen):
        nonlocal embeds, real
        embeds = torch.cat([embeds, vlm.get_input_embeddings()(ids)], 1)
        real = torch.cat([real, seen], 1)

    def say():
        for _ in range(steps):
            positions = (real.cumsum(1) - 1).clamp_min(0)
            logits.append(by_layers(vlm, embeds, real, away, comes_back, positions, compact)[:, -1])
            word = logits[-1].argmax(-1)[:, None]
            put(word, torch.ones_like(word, dtype=torch.bool))

    say()
    for ids, seen in turns:
        put(ids, seen.bool())
        say()
    return logits
