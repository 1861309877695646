"""Writes questions that the tiny checkpoint was trained to answer, and measures how well it does.

usage: questions.py FILE.json [CHECKPOINT]

400 distinct questions of all the trained kinds but stories, the same for the same seed. With
a checkpoint, also prints the share of exact answers by transformers in f32, kind by kind.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

SEED = 2026
CAPITALS = """
France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, China Beijing,
India New_Delhi, Egypt Cairo, Peru Lima, Chile Santiago, Canada Ottawa, Cuba Havana,
Greece Athens, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen,
Poland Warsaw, Austria Vienna, Portugal Lisbon, Ireland Dublin, Iceland Reykjavik,
Turkey Ankara, Iran Tehran, Iraq Baghdad, Kenya Nairobi, Ghana Accra, Nepal Kathmandu,
Thailand Bangkok, Vietnam Hanoi, Russia Moscow, Ukraine Kyiv, Hungary Budapest,
Romania Bucharest, Bulgaria Sofia, Serbia Belgrade, Croatia Zagreb, Belgium Brussels,
Netherlands Amsterdam, Switzerland Bern, Argentina Buenos_Aires, Brazil Brasilia,
Mexico Mexico_City, Colombia Bogota, Ecuador Quito, Bolivia Sucre, Uruguay Montevideo,
Paraguay Asuncion, Australia Canberra, Indonesia Jakarta
"""
OPPOSITES = """
hot cold, big small, fast slow, old young, high low, light dark, happy sad, early late,
open closed, full empty, hard soft, wet dry, rich poor, strong weak, loud quiet, long short,
near far, clean dirty, thick thin, true false, up down, left right, day night, first last,
sweet bitter, wide narrow, brave afraid, heavy weightless, smooth rough, deep shallow
"""
SOUNDS = """
cow moo, dog woof, cat meow, duck quack, sheep baa, pig oink, horse neigh, lion roar,
bee buzz, frog croak, owl hoot, snake hiss, mouse squeak, wolf howl, rooster crow
"""
# One of a mass, "is"; several of a kind, "are".
MASS_COLORS = "grass green, snow white, coal black, blood red, chocolate brown"
KIND_COLORS = "lemons yellow, carrots orange, elephants gray, plums purple, roses red"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"


def pairs(table):
    """Parses "a b, c d_e" as [(a, b), (c, "d e")]."""
    split = (entry.split() for entry in table.split(","))
    return [(left, right.replace("_", " ")) for left, right in split]


def capitals():
    for country, city in pairs(CAPITALS):
        fact = f"The capital of {country} is {city}."
        yield f"What is the capital of {country}?", fact
        yield f"Which country has the capital {city}?", f"{city} is the capital of {country}."
        yield f"Name the capital of {country}.", f"{city}."


def opposites():
    for one, other in pairs(OPPOSITES):
        for a, b in ((one, other), (other, one)):
            yield f"What is the opposite of {a}?", f"The opposite of {a} is {b}."


def sounds():
    for animal, sound in pairs(SOUNDS):
        yield f"What sound does a {animal} make?", f"A {animal} says {sound}."


def colors():
    for verb, table in (("is", MASS_COLORS), ("are", KIND_COLORS)):
        for thing, color in pairs(table):
            yield f"What color {verb} {thing}?", f"{thing.capitalize()} {verb} {color}."


def around(unit, names):
    names = names.split()
    for i, name in enumerate(names):
        after, before = names[(i + 1) % len(names)], names[i - 1]
        yield f"What {unit} comes after {name}?", f"{after} comes after {name}."
        yield f"What {unit} comes before {name}?", f"{before} comes before {name}."


def sums():
    for a in range(50):
        for b in range(50):
            yield f"What is {a} + {b}?", f"{a} + {b} = {a + b}."


def differences():
    for a in range(50):
        for b in range(a + 1):
            yield f"What is {a} - {b}?", f"{a} - {b} = {a - b}."


def products():
    for a in range(11):
        for b in range(11):
            yield f"What is {a} * {b}?", f"{a} * {b} = {a * b}."


def comparisons():
    for a in range(100):
        for b in range(100):
            if a != b:
                large, small = max(a, b), min(a, b)
                yield f"Which is larger, {a} or {b}?", f"{large} is larger than {small}."


def sequences():
    for start in range(20):
        for step in range(1, 6):
            x = [start + i * step for i in range(6)]
            yield f"Continue the sequence: {x[0]}, {x[1]}, {x[2]},", f"{x[3]}, {x[4]}, {x[5]}."


# Kind, every question of it, how many to take.
KINDS = [
    ("capital", capitals(), 90),
    ("opposite", opposites(), 50),
    ("sound", sounds(), 15),
    ("color", colors(), 10),
    ("day", around("day", DAYS), 14),
    ("month", around("month", MONTHS), 24),
    ("sum", sums(), 50),
    ("difference", differences(), 40),
    ("product", products(), 40),
    ("comparison", comparisons(), 37),
    ("sequence", sequences(), 30),
]


def questions():
    """(kind, question, answer), shuffled."""
    r = random.Random(SEED)
    out = []
    for kind, every, take in KINDS:
        out += [(kind, q, a) for q, a in r.sample(list(every), take)]
    r.shuffle(out)
    return out


def check(rows, checkpoint):
    import torch
    from tokenizers import Tokenizer

    import dsv3

    torch.set_num_threads(1)
    model, _ = dsv3.load(checkpoint, with_mtp=False)
    tokenizer = Tokenizer.from_file(f"{checkpoint}/tokenizer.json")
    special = "<｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜>"
    bos, user, assistant, eos = map(tokenizer.token_to_id, special.split())
    asked, right, gap = Counter(), Counter(), float("inf")
    for kind, question, answer in rows:
        ids = tokenizer.encode(question, add_special_tokens=False).ids
        ids = [bos, user, *ids, assistant]
        new = dsv3.greedy(model, ids, 40, eos)
        text = tokenizer.decode([t for t in new if t != eos])
        asked[kind] += 1
        right[kind] += text == answer
        if text != answer:
            print(f"{question} expected {answer!r}, got {text!r}")
        logits, _ = dsv3.forward(model, None, ids + new)
        gap = min(gap, dsv3.top2_gap(logits[len(ids) - 1 : -1]))
    for kind in asked:
        print(f"{kind}: {right[kind]} of {asked[kind]}")
    print(f"exact {right.total()} of {asked.total()}, smallest distance of two best {gap:.4f}")


def main():
    rows = questions()
    # One pair a line: readable, and small in a diff.
    lines = [json.dumps({"question": q, "answer": a}) for _, q, a in rows]
    Path(sys.argv[1]).write_text("[\n" + ",\n".join(lines) + "\n]\n")
    if len(sys.argv) > 2:
        check(rows, sys.argv[2])


if __name__ == "__main__":
    main()
