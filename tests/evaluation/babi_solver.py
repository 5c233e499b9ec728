"""An answerer of qa1 .. qa5 that reads the prompt's text alone; written from the rules of bAbI."""

import re
from collections.abc import Iterator

ROOMS = "bedroom|kitchen|garden|hallway|bathroom|office"
THINGS = "apple|football|milk"
NAMES = "John|Mary|Sandra|Daniel|Bill|Fred|Jeff"
MOVE = (
    rf"(?P<mover>{NAMES}) (?:went|went back|journeyed|travelled|moved) to the (?P<room>{ROOMS})\."
)
TAKE = rf"(?P<taker>{NAMES}) (?:got|grabbed|took|picked up) the (?P<taken>{THINGS})(?: there)?\."
PUT = rf"(?P<putter>{NAMES}) (?:left|dropped|discarded|put down) the (?P<put>{THINGS})(?: there)?\."
GIVE = (
    rf"(?P<giver>{NAMES}) (?:gave|handed|passed) the (?P<given>{THINGS}) to (?P<getter>{NAMES})\."
)
SIDE = rf"The (?P<a>{ROOMS}) is (?P<side>north|south|east|west) of the (?P<b>{ROOMS})\."
FACT = re.compile("|".join(rf"(?:{form})" for form in (MOVE, TAKE, PUT, GIVE, SIDE)))
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


def facts_of(context: str) -> list[str]:
    """The sentences of a context that read like facts, in order."""
    return [match[0] for match in FACT.finditer(context)]


def solve(prompt: str) -> str:
    """The one-word answer to a prompt's last line, from what stands between it and the examples."""
    context, question = prompt.split("\n\n")[-1].rsplit("\n", 1)
    story = list(FACT.finditer(context))
    for form, answer in FORMS.items():
        if match := re.fullmatch(form, question):
            return answer(story, **match.groupdict())
    raise AssertionError(f"no form of question: {question!r}")


def where_person(story, who) -> str:
    return [fact["room"] for fact in story if fact["mover"] == who][-1]


def journey(story, what) -> Iterator[str]:
    """Rooms that a thing was in, one after another, as far as the text tells."""
    room_of: dict[str, str] = {}
    carrier = room = None
    for fact in story:
        if fact["mover"]:
            room_of[fact["mover"]] = fact["room"]
        elif fact["taken"] == what:
            carrier = fact["taker"]
        now = room_of.get(carrier) if carrier else None
        if now and now != room:
            yield now
            room = now
        if fact["put"] == what:
            carrier = None


def where_thing(story, what) -> str:
    return list(journey(story, what))[-1]


def where_before(story, what, room) -> str:
    rooms = list(journey(story, what))
    last = max(i for i, name in enumerate(rooms) if name == room and i)
    return rooms[last - 1]


def beside(story, side, room) -> str:
    """What lies on a side of a room."""
    found = {f["a"] for f in story if f["b"] == room and f["side"] == side}
    found |= {f["b"] for f in story if f["a"] == room and f["side"] == OPPOSITE[side]}
    (only,) = found
    return only


def lies_of(story, side, room) -> str:
    return beside(story, OPPOSITE[side], room)


def last_gift(story, wanted: str, **known) -> str:
    """One part of the last gift whose other parts are as given."""
    gifts = [fact for fact in story if fact["giver"]]
    return [g[wanted] for g in gifts if all(g[k] == v for k, v in known.items())][-1]


def given(story, giver, getter) -> str:
    return last_gift(story, "given", giver=giver, getter=getter)


def giver(story, given, getter=None) -> str:
    known = {"given": given} | ({"getter": getter} if getter else {})
    return last_gift(story, "giver", **known)


def getter(story, given, giver=None) -> str:
    known = {"given": given} | ({"giver": giver} if giver else {})
    return last_gift(story, "getter", **known)


FORMS = {
    rf"Where is (?P<who>{NAMES})\?": where_person,
    rf"Where is the (?P<what>{THINGS})\?": where_thing,
    rf"Where was the (?P<what>{THINGS}) before the (?P<room>{ROOMS})\?": where_before,
    rf"What is (?P<side>\w+) of the (?P<room>{ROOMS})\?": beside,
    rf"What is the (?P<room>{ROOMS}) (?P<side>\w+) of\?": lies_of,
    rf"What did (?P<giver>{NAMES}) give to (?P<getter>{NAMES})\?": given,
    rf"Who gave the (?P<given>{THINGS})\?": giver,
    rf"Who gave the (?P<given>{THINGS}) to (?P<getter>{NAMES})\?": giver,
    rf"Who received the (?P<given>{THINGS})\?": getter,
    rf"Who did (?P<giver>{NAMES}) give the (?P<given>{THINGS}) to\?": getter,
}
