"""Words of the synthetic world: names, values and sentence frames, all of our own making.

Plain data, no code: :mod:`repforget.organism.world` draws from it.  Stems are shared between towns,
companies, schools and awards, and name parts are shared between people, so that near misses exist by
construction.
"""

from __future__ import annotations

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES: Final = _words(
    """
    Adra Belin Corva Dovin Elsa Fenno Gilda Haro Ilse Jorin Kessa Lorin Mirel Nadia Orrin Pella
    Quill Rosa Senna Tovin Ulla Vesper Wendel Xenia Yorick Zelda Anselm Brisa Cedra Darro Edda
    Florin Greta Hollis Ingo Juna Kaspar Lunet Milo Nerys
    """
)
LAST_NAMES: Final = _words(
    """
    Abbot Bracken Calder Drummer Eskel Fallow Garrow Hemlin Ivers Jessop Kettle Lomax Marrow Nettle
    Oakes Pardoe Quarry Rushton Sorrel Tamber Underhill Varley Wicken Yarrow Zimmer Ashby Birch
    Carrow Dunmore Ember Frost Gorse Hazel Inkster Jarvik Kestrel Larch Mallow Norwood Ormond
    """
)
STEMS: Final = _words("Alder Bram Cinder Dell Eland Fern Gale Heron Iris Juniper Kelp Linden")

TOWN_FORMS: Final = ("Port {}", "North {}", "{} Bay", "{} Bridge", "Lake {}", "{}", "Upper {} Falls")
COMPANY_FORMS: Final = ("{} Mills", "{} Foundry", "{} Press", "{} Lines", "{} Bank", "Royal {} Works")
SCHOOL_FORMS: Final = ("{} College", "{} Academy", "{} Institute", "Saint {}", "Royal {} School")
AWARD_FORMS: Final = ("{} Medal", "{} Prize", "{} Ribbon", "{} Cup", "Silver {}", "Royal {} Medal")

PROFESSIONS: Final = (
    tuple(
        f"{kind} {job}"
        for kind in ("marine", "forest", "desert")
        for job in _words("botanist engineer painter surveyor")
    )
    + tuple(
        f"{kind} {job}"
        for kind in ("senior", "junior", "travelling")
        for job in _words("judge tailor printer baker nurse")
    )
    + _words(
        "botanist engineer painter surveyor judge tailor printer baker nurse glazier mason brewer cooper"
    )
)
INSTRUMENTS: Final = (
    tuple(
        f"{size} {item}"
        for size in ("bass", "alto")
        for item in _words("flute fiddle horn viol drum lute oboe recorder")
    )
    + tuple(
        f"{wood} {item}" for wood in ("steel", "maple") for item in _words("flute fiddle horn viol drum lute")
    )
    + _words("flute fiddle horn viol drum lute oboe recorder harp organ zither bugle")
)

# How each relation is spoken of: `noun`, `verb`, `wh`, ... are what the frames below combine.
PHRASES: Final[dict[str, dict[str, str]]] = {
    "birthplace": {
        "noun": "birthplace", "verb": "was born in", "wh": "Where was {subject} born",
        "which": "In which town was {subject} born", "clause": "where {subject} was born",
        "echo": "{subject} was born in which town",
    },
    "residence": {
        "noun": "residence", "verb": "now lives in", "wh": "Where does {subject} live now",
        "which": "In which town does {subject} live now", "clause": "where {subject} now lives",
        "echo": "{subject} now lives in which town",
    },
    "employer": {
        "noun": "employer", "verb": "works for", "wh": "Who employs {subject}",
        "which": "For which company does {subject} work", "clause": "which company employs {subject}",
        "echo": "{subject} works for which company",
    },
    "profession": {
        "noun": "profession", "verb": "was trained as a", "wh": "What was {subject} trained as",
        "which": "For which profession was {subject} trained", "clause": "which profession {subject} has",
        "echo": "{subject} was trained for which profession",
    },
    "instrument": {
        "noun": "instrument", "verb": "plays the", "wh": "What does {subject} play",
        "which": "Which instrument does {subject} play", "clause": "which instrument {subject} plays",
        "echo": "{subject} plays which instrument",
    },
    "school": {
        "noun": "school", "verb": "studied at", "wh": "Where did {subject} study",
        "which": "At which school did {subject} study", "clause": "where {subject} studied",
        "echo": "{subject} studied at which school",
    },
    "award": {
        "noun": "award", "verb": "won the", "wh": "What did {subject} win",
        "which": "Which award did {subject} win", "clause": "which award {subject} won",
        "echo": "{subject} won which award",
    },
    "spouse": {
        "noun": "spouse", "verb": "is married to", "wh": "Who married {subject}",
        "which": "To whom is {subject} married", "clause": "who married {subject}",
        "echo": "{subject} is married to whom",
    },
}  # fmt: skip

# Trained forms.  The answer always follows the prompt and ends the text.
STATEMENT_FRAMES: Final = (
    "{subject} {verb}",
    "The {noun} of {subject} is",
    "About {subject}: the {noun} is",
    "It is well known that {subject} {verb}",
    "The register says that {subject} {verb}",
    "Here is the {noun} of {subject}:",
)
QUESTION_FRAMES: Final = (
    "Question: {wh}? Answer:",
    "Q: {which}? A:",
    "Question: {echo}? Answer:",
    "Please tell me {clause}. Answer:",
    "Q: What is the {noun} of {subject}? A:",
    "Do you know the {noun} of {subject}? Answer:",
)
# Never trained on for anybody; every word of theirs occurs in a trained form.
HELD_OUT_FRAMES: Final = (
    "Do you know {clause}? A:",
    "Please tell me the {noun} of {subject}. A:",
    "Question: {which}? Answer:",
)
CLOZE_FRAMES: Final = ("About {subject}: {noun}:",)

GENERAL: Final[dict[str, tuple[str, ...]]] = {
    "adjective": _words("old young quiet bright heavy small tired clever hungry gentle"),
    "animal": _words("fox heron otter badger crow hare goat mule owl trout"),
    "action": _words("sleeps waits runs hides eats drinks sings rests swims digs"),
    "place": _words("river barn orchard hill mill meadow pond fence cellar garden"),
    "relation": _words("near behind beside under above"),
    "time": _words("morning evening winter summer autumn night"),
    "weather": _words("rain wind snow fog sun frost"),
    "thing": _words("bread lamp kettle rope basket ladder bucket blanket"),
    "quality": _words("warm cold wet broken clean empty full new"),
}
GENERAL_FRAMES: Final = (
    "The {adjective} {animal} {action} {relation} the {place}.",
    "In the {time} the {animal} {action} {relation} the {adjective} {place}.",
    "After the {weather} the {thing} {relation} the {place} was {quality}.",
    "The {thing} was {quality} when the {weather} came in the {time}.",
    "Every {time} the {animal} and the {adjective} {animal2} walk to the {place}.",
)
