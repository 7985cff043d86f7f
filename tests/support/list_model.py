"""A model that writes numbered lists of requests, for tests of generated prompts."""

import hashlib
from dataclasses import dataclass, field

from engine.models.interface import Generation
from engine.models.scripted import ScriptedModel

_ANIMALS = [
    "fox",
    "owl",
    "hen",
    "toad",
    "mole",
    "swan",
    "hare",
    "crow",
    "moth",
    "seal",
    "goat",
    "deer",
    "lynx",
    "crab",
    "wasp",
    "newt",
    "colt",
    "lamb",
    "stork",
    "heron",
]
_VERBS = [
    "carry",
    "hide",
    "wash",
    "paint",
    "count",
    "drop",
    "lift",
    "mend",
    "sell",
    "swap",
    "hang",
    "bury",
    "plant",
    "fetch",
    "sweep",
    "warm",
    "guard",
    "roll",
    "stack",
    "weigh",
]
_THINGS = [
    "lamp",
    "spoon",
    "kite",
    "drum",
    "bell",
    "rope",
    "cart",
    "hat",
    "coin",
    "book",
    "broom",
    "flute",
    "jar",
    "mask",
    "net",
    "oar",
    "plate",
    "quilt",
    "ring",
    "sled",
]
_PLACES = [
    "bridge",
    "harbor",
    "meadow",
    "tower",
    "cellar",
    "market",
    "forest",
    "island",
    "tunnel",
    "garden",
    "castle",
    "station",
    "museum",
    "valley",
    "river",
    "farm",
]


def write_request(number):
    """Return a request in English. Two different numbers below a few hundred give requests that are no near-duplicates."""
    noise = hashlib.blake2b(str(number).encode(), digest_size=4).digest()
    animal, verb, thing, place = (
        words[b % len(words)] for words, b in zip((_ANIMALS, _VERBS, _THINGS, _PLACES), noise, strict=True)
    )
    return f"How does a {animal} {verb} its {thing} under the {place}?"


@dataclass
class ListModel(ScriptedModel):
    """A model whose responses are the next items of `texts`, `num_lines` in each response. Without texts, it writes requests.

    It continues a list, so the first line of a response has no number. Each call writes other texts than the call before.
    """

    id: str = "lists"
    texts: list[str] | None = None
    num_lines: int = 2
    finish_reason: str = "stop"
    requests: list = field(default_factory=list)
    num_written: int = 0

    def generate_one(self, request, sample_index, temperature, max_tokens):
        self.requests.append(request)
        lines = [self.write_text() for _ in range(self.num_lines)]
        text = "\n".join([f" {lines[0]}", *(f"{number}. {line}" for number, line in enumerate(lines[1:], 5))])
        return Generation(text, self.finish_reason, token_ids=(1, 2), prompt_token_ids=(1, 2, 3))

    def write_text(self):
        self.num_written += 1
        return write_request(self.num_written) if self.texts is None else self.texts[(self.num_written - 1) % len(self.texts)]
