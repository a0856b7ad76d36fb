"""Write the demo data set: spoken commands at home and in the office, each with one line of JSON as the answer.

    python tools/make_demo_data.py            writes src/strop/demo/train.jsonl and heldout.jsonl

Rules that make the rows learnable and a miss unambiguous:
- Every slot value is copied from the command, letter by letter; absent slots are absent keys.
- The keys of an intent have a fixed order, `intent` first.
- A held-out row uses a phrasing that no training row uses, and about half of its open values (names, tasks, titles,
  messages, ...) are in no training row either, so that memorizing the rows does not help.
The same seed gives the same bytes on every Python from 3.10 on.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 2026
TRAIN, HELDOUT = "train", "heldout"
ROWS_PER_INTENT = {TRAIN: 63, HELDOUT: 16}
UNSEEN_SHARE = 0.25  # share of each open pool that training rows do not use
UNSEEN_DRAWS = 0.5  # share of held-out samples with an unseen value
MAX_CHARACTERS = 172  # characters of command and answer: about 80 tokens in SmolLM2 with the system prompt
SYSTEM = "Turn the command into one line of JSON."
FOLDER = Path(__file__).resolve().parent.parent / "src" / "strop" / "demo"

# Intent, its slots in the order of the keys, then its phrasings, separated by `|`. `>` marks held-out phrasings; `~`
# marks one that starts with a verb, so that "could you" fits before it; `{=day}` is a day without "on"; `{slot:pool}`
# samples the slot from another pool.
INTENTS = """
set_reminder: task day time
    ~remind me to {task} at {time} | ~remind me to {task} {day} | ~remind me {day} at {time} to {task}
    ~set a reminder to {task} {day} at {time} | ~set a reminder for {time} to {task}
    I need a reminder {day} to {task} | don't let me forget to {task} {day}
    {day} at {time} I have to {task}, remind me | I keep forgetting to {task}, remind me at {time}
    reminder for {=day}: {task} | I must {task} at {time}, so remind me please
  > ~give me a reminder to {task} {day} | at {time} I should {task}, please remind me
  > don't let me forget that I have to {task} at {time} | ~make sure I remember to {task} {day} at {time}
set_timer: duration label
    ~set a timer for {duration} | ~set a {label} timer for {duration} | ~start a timer for the {label}, {duration}
    timer for {duration} please | ~count down {duration} for the {label}
    the {label} needs {duration}, start the clock | ~give the {label} {duration} on the timer
    {duration} on the clock, please | I need a timer, {duration}, call it {label} | ~beep at me in {duration}
    {label} timer, {duration}
  > ~start a countdown of {duration} for the {label} | ~put {duration} on a timer
  > the {label} takes {duration}, so set a timer | ~let the clock run for {duration}
schedule_meeting: title person day time
    ~schedule a meeting with {person} {day} at {time} | ~set up the {title} with {person} {day}
    ~put the {title} on my calendar {day} at {time} | ~book the {title} with {person} for {=day} at {time}
    I need to meet {person} {day} at {time} | ~add the {title} to the calendar for {=day}
    {person} and I have the {title} {day} at {time}, add it | ~plan the {title} {day} and invite {person}
    can we have the {title} with {person} {day} | ~invite {person} to the {title} at {time} {day}
    calendar: {title}, {=day}, {time}
  > ~arrange a meeting {day} at {time} with {person} | ~block {time} {day} for the {title} with {person}
  > {title} with {person} {day}, put it on the calendar | there is the {title} {day} at {time}, add it to my calendar
control_device: device room state level
    ~turn {state} the {device} in the {room} | ~turn the {device} in the {room} {state}
    ~switch the {room} {device} {state} | ~switch {state} the {device}
    ~set the {device:light} in the {room} to {level} | ~turn the {device:light} up to {level}
    ~dim the {room} {device:light} to {level} | I want the {device} in the {room} {state} | {room} {device} {state}
    is the {device} in the {room} still running? turn it {state}
    it's dark in the {room}, put the {device:light} at {level}
  > in the {room}, turn the {device} {state} | ~bring the {device:light} in the {room} down to {level}
  > the {device} in the {room} should be {state} | I'm in the {room}, can you switch the {device} {state}
set_temperature: room temperature time
    ~set the {room} to {temperature} | ~set the temperature in the {room} to {temperature}
    ~heat the {room} to {temperature} | ~warm up the {room} to {temperature} by {time}
    ~cool the {room} down to {temperature} | make it {temperature} in the {room}
    the {room} is freezing, make it {temperature} | I'd like {temperature} in the {room} at {time}
    thermostat to {temperature}, please | {room} thermostat at {temperature} from {time}
    it's too warm in the {room}, go down to {temperature}
  > ~change the {room} thermostat to {temperature} | it's chilly in the {room}, set it to {temperature}
  > ~have the {room} at {temperature} by {time} | {temperature} in the {room}, please
add_to_list: item quantity list
    ~add {item} to the {list} list | ~add {quantity} of {item} to my {list} list | ~put {item} on my {list} list
    ~put {quantity} of {item} on the {list} list | we're out of {item}, add that to the {list} list
    I need {quantity} of {item} on the {list} list | {item} goes on the {list} list
    ~note {item} down on the {list} list | the {list} list needs {item}
    we need {quantity} of {item}, put that on the {list} list | {list} list: {quantity} of {item}
  > on the {list} list, put {quantity} of {item} | no more {item} at home, put that on the {list} list
  > ~write {quantity} of {item} on my {list} list | my {list} list is missing {item}
send_message: person message app
    ~tell {person} {message} | ~tell {person} that {message} | ~text {person} that {message}
    ~send {person} a message saying {message} | ~message {person} on {app}: {message}
    ~send a message to {person} on {app} that {message} | ~let {person} know {message}
    ~write {person} on {app} that {message} | message for {person}: {message}
    {person} should know that {message}, send it on {app} | ~use {app} to tell {person} {message}
  > ~send {person} this on {app}: {message} | ~let {person} know on {app} that {message}
  > ~drop {person} a message, {message} | ~write to {person} and say that {message}
play_music: track artist playlist room
    ~play {track} by {artist} | ~play {track} by {artist} in the {room} | ~play something by {artist}
    ~play my {playlist} playlist | ~put on the {playlist} playlist in the {room} | ~start the {playlist} playlist
    I want to hear {track} by {artist} | I feel like listening to {artist} in the {room} | ~put on {track} by {artist}
    music in the {room}, the {playlist} playlist | some {artist} would be nice
  > ~let me hear {track} by {artist} | in the {room}, play {artist} | how about the {playlist} playlist in the {room}
  > ~start {track} by {artist} in the {room}
book_space: space day time duration people
    ~book {space} {day} at {time} | ~book {space} for {people} people {day}
    ~reserve {space} {day} at {time} for {people} people | ~reserve {space} for {duration:stay} {day}
    I need {space} {day} for {duration:stay} | is {space} free {day} at {time}? book it
    we are {people} people, book {space} {day} | ~get us {space} at {time} for {duration:stay}
    ~hold {space} for {people} people at {time} | {space} {day} at {time}, please reserve it
    my team needs {space} for {duration:stay} at {time}
  > ~get {space} for {people} people {day} at {time} | {day} we need {space} for {duration:stay}, reserve it
  > ~make a booking of {space} at {time} for {people} people
  > ~see if {space} is free {day} and book it for {duration:stay}
log_expense: amount purpose account
    ~log {amount} for {purpose} | ~add an expense of {amount} for {purpose}
    ~put {amount} for {purpose} on the {account} account | I spent {amount} on {purpose}
    I paid {amount} for {purpose}, log it under {account} | ~record {purpose} for {amount} under {account}
    {purpose} cost me {amount} | expense: {purpose}, {amount}, {account} account
    ~charge {amount} to the {account} account for {purpose} | that was {amount} for {purpose}, add it to my expenses
    ~file {amount} under {account}, it was for {purpose}
  > {amount} went on {purpose}, please log it | ~enter {amount} for {purpose} under {account}
  > I just paid {amount} for {purpose} | ~book an expense of {amount} to the {account} account, {purpose}
find_train: origin destination day time
    ~find a train from {origin} to {destination} {day} | ~find me a train to {destination} {day} at {time}
    ~look up trains from {origin} to {destination} | when is the next train to {destination}
    I have to be in {destination} {day}, find a train from {origin}
    trains from {origin} to {destination} {day} at {time} | is there a train to {destination} {day}
    ~get me from {origin} to {destination} by train {day}
    I'm leaving {origin} for {destination} at {time}, which train is it
    what trains go from {origin} to {destination} at {time} | ~show me the {time} train to {destination} from {origin}
  > I need a train to {destination} from {origin} {day} | which trains leave {origin} for {destination} {day}
  > {day} I'm going to {destination}, find a train at {time}
  > how do I get from {origin} to {destination} by train at {time}
"""

OPENINGS = {  # prefixes of verbs by split; the empty ones give plain commands
    TRAIN: ["", "", "", "", "please ", "could you ", "can you ", "hey, ", "I'd like you to ", "um, ", "okay, "],
    HELDOUT: ["", "", "", "please ", "could you ", "would you ", "hi there, ", "um, can you "],
}
CALLS = {TRAIN: ["", "", "", "", "hey, ", "um, ", "okay, ", "so, "], HELDOUT: ["", "", "", "um, ", "hi there, "]}
ENDINGS = {TRAIN: ["", "", "", "", ", please", ", thanks", " if you can"], HELDOUT: ["", "", ", thank you", ", please"]}


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def joined(*parts: str) -> list[str]:
    """Return every combination of the comma-separated parts, one of each, with a space between."""
    return [" ".join(combination) for combination in itertools.product(*map(listed, parts))]


DAYS = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"
HOURS = "one, two, three, four, five, six, seven, eight, nine, ten, eleven"
FIRST = (
    "Amara, Anders, Aisha, Bastien, Beatriz, Carmen, Chidi, Clara, Dalia, Daniel, Emre, Esther, Farid, Freya, Gita, "
    "Hugo, Imani, Ines, Ivan, Jonas, Keiko, Lars, Leila, Lucia, Malik, Marta, Mei, Milan, Nadia, Noor, Olga, Omar, "
    "Pablo, Petra, Priya, Ravi, Rosa, Ruth, Samir, Sanna, Tariq, Tess, Thandi, Tomas, Viktor, Wanjiru, Yara, Zofia"
)
LAST = "Adeyemi, Berg, Castillo, Dvorak, Fontaine, Haddad, Ishikawa, Kowalski, Lindqvist, Mensah, Novak, Okafor"
CITIES = listed(
    "Aarhus, Antwerp, Bath, Bergen, Bilbao, Bologna, Bremen, Bristol, Brno, Cardiff, Cork, Dresden, Durham, Exeter, "
    "Florence, Gdansk, Geneva, Ghent, Girona, Graz, Hamburg, Krakow, Lausanne, Leeds, Leipzig, Lille, Linz, Lisbon, "
    "Lyon, Malmo, Munich, Nantes, Naples, Odense, Oslo, Oxford, Porto, Prague, Rennes, Rotterdam, Salzburg, Seville, "
    "Tampere, Toulouse, Trieste, Turin, Uppsala, Utrecht, Valencia, Verona, Vienna, Warsaw, York, Zagreb, Zurich, "
    "Basel, Coimbra, Delft, Galway, Leuven, Modena, Nice"
)
TASKS = [
    *joined("water", "the ferns, the tomatoes, the office plants, the herbs on the balcony"),
    *joined("call", "the dentist, the landlord, my grandmother, the insurance people, the garage"),
    *joined("pay", "the gas bill, the rent, the parking fine, the window cleaner"),
    *joined("pick up", "the parcel, the dry cleaning, the kids, my new glasses, the birthday cake"),
    *joined("take out", "the recycling, the compost, the trash"),
    *joined("renew", "my passport, the library books, my bus pass, the domain name"),
    *joined("send", "the invoice to accounting, the slides to the client, the signed contract, a thank you card"),
    *joined("feed", "the cat, the goldfish, the neighbour's rabbits, the sourdough starter"),
    *joined("check", "the smoke alarm, the oven, the tyre pressure, the backup, the mail"),
    *joined("return", "the ladder, the rental car, the blue jacket, the projector"),
    *joined("finish", "the tax form, the quarterly report, my expense sheet, the job application"),
    *joined("charge", "the camera, the e-bike, the drill, my headphones"),
    *joined("order", "new contact lenses, printer paper, more coffee filters, a spare key"),
    *listed("stretch, drink some water, take my vitamins, lock the shed, clean the tank, make the bed"),
]
EVENTS = "the meeting, dinner, the demo, football practice, the call, the school play"
SPOTS = "on the kitchen table, in my car, at the front desk, under the stairs, in the top drawer, at Yara's place"
MESSAGES = [
    *joined("the charger, the umbrella, my laptop, the blue folder, the parcel, the projector remote", "is", SPOTS),
    *joined("the keys, the tickets", "are", SPOTS),
    *joined("I'm", "five, ten, twenty", "minutes late for", EVENTS),
    *joined(EVENTS, "is cancelled, starts an hour later, went really well"),
    *joined("I can't make it to, I'll bring a cake to, we are all coming to", EVENTS),
    *joined("the plumber, the courier, the electrician", "is here, never showed up, wants to come back later"),
    *joined("I'm", "on my way home, stuck in traffic, at the airport already, still at the office"),
    *listed("happy birthday and see you soon, the wifi password has changed, we won the contract, the cat is fine"),
    *listed("dinner is in the oven, I found a flat near the park, the train is late again, your coat is ready"),
]
FOOD = [
    *joined("oat, almond, goat", "milk, yoghurt"),
    *joined("rye, seeded, flat", "bread"),
    *joined("red, green", "lentils, apples, onions, peppers"),
    *listed("smoked trout, fresh spinach, frozen peas, frozen berries, bananas, chickpeas, brown rice, salted butter"),
    *listed("dried oregano, firm tofu, parsley, walnuts, honey, mustard, espresso beans, limes, olives, couscous"),
]
HARDWARE = [
    *joined("wood, steel, brass", "screws, hooks, hinges"),
    *listed("sandpaper, white paint, heavy duty tape, copper wire, wall plugs, masking tape, wood glue, light bulbs"),
]
CAMPING = listed(
    "tent pegs, lamp oil, waterproof matches, nylon rope, AA batteries, trail mix, tea lights, gas canisters"
)
OFFICE = [
    *joined("yellow, pink, large", "sticky notes, envelopes, folders"),
    *joined("black, blue", "pens, markers, toner"),
    *listed("index cards, name badges, paper clips, staples, whiteboard cleaner, cable ties, thick cardboard"),
]
ITEMS = {"groceries": FOOD, "shopping": FOOD, "hardware store": HARDWARE, "camping": CAMPING, "office supplies": OFFICE}
LIGHTS = "lamp, ceiling light, floor lamp, spotlights, fairy lights, reading light, desk lamp"

# A part of each of these pools is reserved for the held-out rows.
OPEN: dict[str, list[str]] = {
    "task": TASKS,
    "message": MESSAGES,
    "person": [*listed(FIRST), *joined(FIRST, LAST)[::19], *joined("Doctor", LAST)],
    "title": joined(
        "budget, hiring, roadmap, design, security, launch, onboarding, pricing, sales, safety, Falcon, Juniper",
        "review, kickoff, workshop, retrospective, interview, briefing",
    ),
    "item": sorted({item for items in ITEMS.values() for item in items}),
    "track": joined(
        "Paper, Silver, Slow, Northern, Hollow, Golden, Borrowed, Electric, Midnight, Salt",
        "Lanterns, Harbour, Rain, Letters, Orchard, Machines, Summer, Windows",
    ),
    "artist": [
        *joined("the", "Velvet, Copper, Lonely, Quiet, Tin", "Otters, Pilots, Sisters, Foxes, Gardeners"),
        *joined("DJ, Lady, Captain", "Marigold, Pluto, Kestrel, Ember, Tuesday, Cobalt"),
        *joined("Odessa, Silas, Juno, Marlow", "Finch, Vale, Ashgrove, Moon, Pereira"),
    ],
    "playlist": joined(
        "lazy, rainy, early, quiet, sunny, upbeat, classic",
        "Sunday, morning, evening, commute, road trip, homework, workout, garden party, dinner",
    ),
    "purpose": [
        *joined("client, team, conference, office, birthday", "lunch, coffee, snacks, drinks, flowers, cake"),
        *joined("airport, client, weekend, conference, trade fair", "parking, taxis, tolls, train tickets"),
        *joined("poster, flyer, brochure, menu, calendar", "printing, design, delivery"),
    ],
    "amount": joined(
        "twelve, forty, sixty five, a hundred, 18, 23.50, 9.99, 140, 75, 310, 6.20",
        "euros, dollars, pounds, francs, crowns, rupees",
    ),
    "origin": CITIES,
    "destination": CITIES,
    "label": [
        *listed("pizza, bread, tea, egg, rice, laundry, yoga, homework, pasta, stretching, nap, dishwasher, face mask"),
        *joined("potato, apple, lentil, pumpkin, cherry, carrot", "soup, bake, cake, pie, curry, stew, crumble"),
        *joined("chicken, mushroom, spinach", "roast, risotto, lasagne, noodles"),
    ],
}
CLOSED: dict[str, list[str]] = {
    "day": [*listed("today, tomorrow, the 4th, the 12th, the 25th"), *listed(DAYS), *joined("next, this", DAYS)],
    "time": [
        *joined("half past, quarter to", HOURS),
        *joined("6, 7, 8, 9, 10, 11", "am"),
        *joined("1, 2, 3, 4, 5, 6, 7, 8, 9", "pm"),
        *listed("9:15, 10:30, 14:45, 17:30, noon"),
    ],
    "duration": [
        *joined("two, three, four, five, six, eight, ten, twelve, fifteen, twenty, 25, 40", "minutes"),
        *listed("45 seconds, half an hour, an hour, an hour and a half, two hours, three quarters of an hour"),
    ],
    "stay": [
        *listed("half an hour, an hour, an hour and a half, two hours, three hours, the whole day, the afternoon"),
        *joined("20, 30, 45, 50, 75, 90", "minutes"),
    ],
    "device": listed(f"fan, heater, radio, coffee machine, air purifier, television, humidifier, speaker, {LIGHTS}"),
    "light": listed(LIGHTS),
    "room": listed(
        "kitchen, living room, bedroom, bathroom, hallway, garage, attic, basement, nursery, study, guest room, "
        "conference room, lobby, greenhouse, home office, dining room"
    ),
    "state": ["on", "off"],
    "level": joined("10, 15, 25, 30, 40, 50, 60, 75, 80, ninety, twenty, sixty", "percent"),
    "temperature": joined("15, 16, 17, 18, 19, 20, 21, 22, 23, 24, eighteen, twenty, twenty one", "degrees"),
    "quantity": joined("a, half a", "box, pack, bag") + joined("two, three, four, ten", "boxes, packs, bags, crates"),
    "app": ["Signal", "WhatsApp", "Slack", "Telegram", "Teams", "Discord"],
    "space": listed(
        "the Aurora room, the Birch room, the Comet room, the Delta room, the Ember room, the glass room, room 12, "
        "room 204, room 31, the small studio, the boardroom, the library, the roof terrace"
    ),
    "people": [*listed(HOURS)[2:], *(str(n) for n in range(9, 16))],
    "account": listed("travel, marketing, household, personal, research, events, facilities, training"),
    "list": list(ITEMS),
}
FIELD = re.compile(r"\{(=?)(\w+)(?::(\w+))?\}")
FREE_END = ("{message}", "{task}")  # must be last, since following text would seem to belong to them


@dataclass(frozen=True)
class Intent:
    keys: list[str]
    phrases: dict[str, list[str]]


def intents() -> dict[str, Intent]:
    """Parse INTENTS."""
    results: dict[str, Intent] = {}
    for line in INTENTS.strip().splitlines():
        if not line.startswith(" "):
            name, keys = line.split(": ")
            results[name] = Intent(keys.split(), {TRAIN: [], HELDOUT: []})
        else:
            results[name].phrases[HELDOUT if ">" in line[:4] else TRAIN] += line[4:].split(" | ")
    return results


@dataclass(frozen=True)
class Command:
    phrase: str
    user: str
    gold: dict[str, str]

    def __len__(self) -> int:
        return len(self.user) + len(json.dumps(self.gold))

    def line(self) -> str:
        """Return the row as a line of the file."""
        turns = [("system", SYSTEM), ("user", self.user), ("assistant", json.dumps(self.gold, ensure_ascii=False))]
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
        return json.dumps(row, ensure_ascii=False) + "\n"


class Writer:
    """Samples commands, each only once over both splits."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.written: set[str] = set()
        self.seen: dict[str, list[str]] = {}
        self.unseen: dict[str, list[str]] = {}
        cities: list[str] = []  # one split for both, otherwise an unseen origin would be a destination in training
        for slot, pool in OPEN.items():
            values = sorted(set(pool))
            self.random.shuffle(values)
            if pool is CITIES:
                values = cities = cities or values
            cut = round(len(values) * UNSEEN_SHARE)
            self.unseen[slot], self.seen[slot] = values[:cut], values[cut:]

    def value(self, slot: str, pool: str, split: str, gold: dict[str, str]) -> str:
        if slot in CLOSED:
            return self.random.choice(CLOSED[pool])
        new = split == HELDOUT and self.random.random() < UNSEEN_DRAWS
        values = (self.unseen if new else self.seen)[pool]
        if slot == "item":
            values = [value for value in values if value in ITEMS[gold["list"]]]
        return self.random.choice([value for value in values if value not in gold.values()])

    def command(self, name: str, intent: Intent, phrase: str, split: str) -> Command:
        gold: dict[str, str] = {}
        # The list is sampled before the item, because it determines the possible items.
        for _, slot, pool in sorted(FIELD.findall(phrase), key=lambda found: found[1] != "list"):
            gold[slot] = self.value(slot, pool or slot, split, gold)

        def spoken(match: re.Match[str]) -> str:
            bare, slot, _ = match.groups()
            dated = slot == "day" and not bare and gold[slot].startswith((*listed(DAYS), "the "))
            return f"on {gold[slot]}" if dated else gold[slot]

        text = FIELD.sub(spoken, phrase.removeprefix("~"))
        opening = self.random.choice((OPENINGS if phrase.startswith("~") else CALLS)[split])
        closed = phrase.endswith(FREE_END) or "please" in opening + phrase
        ending = "" if closed else self.random.choice(ENDINGS[split])
        slots = {slot: gold[slot] for slot in intent.keys if slot in gold}
        return Command(phrase, opening + text + ending, {"intent": name} | slots)

    def commands(self, split: str) -> Iterator[Command]:
        """Yield the commands of one split: the same number for every intent, its phrasings in turn."""
        for name, intent in intents().items():
            for phrase in itertools.islice(itertools.cycle(intent.phrases[split]), ROWS_PER_INTENT[split]):
                command = self.command(name, intent, phrase, split)
                while len(command) > MAX_CHARACTERS or command.user.casefold() in self.written:
                    command = self.command(name, intent, phrase, split)
                self.written.add(command.user.casefold())
                yield command


def make(seed: int = SEED) -> dict[str, list[Command]]:
    """Return the commands of both splits in the order of the files."""
    writer = Writer(seed)
    splits = {split: list(writer.commands(split)) for split in (TRAIN, HELDOUT)}
    for commands in splits.values():
        writer.random.shuffle(commands)
    return splits


if __name__ == "__main__":
    for made_split, made_commands in make().items():
        path = FOLDER / f"{made_split}.jsonl"
        path.write_bytes("".join(command.line() for command in made_commands).encode())
        print(f"{path}: {len(made_commands)} rows")
