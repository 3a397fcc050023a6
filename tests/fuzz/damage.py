"""Ways in which files break."""

import json

from hypothesis import strategies as st

# Of these names stand for what `json.dumps` cannot write.
TEXTS = {"deep": "[" * 100_000, "huge": "9" * 5000, "endless": "1e999"}
OTHERS = [None, True, 0, 1, -1, 2**63, 0.5, float("nan"), "", "x", "\n", [], {}, [0], [[]], *TEXTS]
OTHERS += ["F16", "I32", "F32", "gear", {"x": 1}, -1e308]


def places(plain, name="") -> list[tuple]:
    """Where something stands at any depth: what holds it, under what, and the nearest name."""
    found = []
    for key in plain if isinstance(plain, dict) else range(len(plain)):
        inner = key if isinstance(key, str) else name
        found.append((plain, key, inner))
        if isinstance(plain[key], dict | list):
            found += places(plain[key], inner)
    return found


@st.composite
def damaged(draw, whole: bytes, until: int | None = None) -> bytes:
    """Bytes that are cut, changed here and there (before `until`), both, or neither."""
    end = draw(st.integers(0, len(whole))) if draw(st.booleans()) else len(whole)
    data = bytearray(whole[:end])
    last = min(len(data), until or len(data)) - 1
    for _ in range(draw(st.integers(0, 4)) if data else 0):
        place = draw(st.integers(0, last) | st.integers(0, min(60, last)))
        data[place] = draw(st.integers(0, 255))
    return bytes(data)


@st.composite
def other_json(draw, text: str) -> str:
    """JSON with up to three things in it that are gone, renamed, or something else."""
    plain = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        found = places(plain) or [([0], 0, "")]
        outer = [place for place in found if place[0] is plain] or found
        holder, key, _ = draw(st.sampled_from(found) | st.sampled_from(outer))
        way = draw(st.sampled_from(["other", "other", "gone", "called otherwise"]))
        old = holder[key]
        holder[key] = draw(st.sampled_from(OTHERS))
        if way != "other":
            del holder[key]
        if way == "called otherwise" and isinstance(key, str):
            holder[key[1:]] = old
    text = json.dumps(plain)
    for name, instead in TEXTS.items():
        text = text.replace(f'"{name}"', instead)
    return text
