"""Make the task `commands`: what somebody says to a device, and the command it is.

    python benchmarks/tasks/make_commands.py

Writes `commands/train.jsonl`, rows to fine-tune on, and `commands/test.jsonl`, tasks
for `gpt-tf evaluate --task`. All sentences are from here. No request is in both files,
and half of the tasks are said in a way that training has not seen.
"""

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent / "commands"
TRAIN, TEST = 640, 200
PROMPT = "Request: {}\nCommand:"

HOURS = "one two three four five six seven eight nine ten eleven".split()
MINUTES = {
    0: "{} o'clock",
    15: "quarter past {}",
    30: "half past {}",
    45: "{} forty-five",
}
ROOMS = "kitchen bedroom hall garage office bathroom attic cellar".split()
NAMES = "Ada Ben Chiara Dmitri Esra Femi Grace Hugo Ines Jun".split()
THINGS = (
    *("milk", "rice", "batteries", "apples", "soap", "coffee", "light bulbs", "flour"),
    *("tea", "onions", "string", "honey"),
)
CHORES = (
    *("water the plants", "take out the bins", "ring the bank", "feed the cat"),
    *("pay the rent", "book the dentist", "bake bread", "charge the drill"),
)
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
NUMBERS = {5: "five", 10: "ten", 12: "twelve", 20: "twenty", 30: "thirty", 40: "forty"}
UNITS = {"seconds": "s", "minutes": "m", "hours": "h"}

# Command -> ways to ask for it; the last two of each are asked in the tasks alone.
KINDS = {
    "alarm {time}": (
        *("wake me at {said_time}", "set an alarm for {said_time}"),
        *("I have to be up at {said_time}", "let it ring at {said_time}"),
        *("please get me out of bed at {said_time}", "alarm, {said_time}"),
    ),
    "timer {count}{unit}": (
        *("start a timer of {said_count} {units}", "count down {said_count} {units}"),
        *("tell me when {said_count} {units} are over", "timer, {said_count} {units}"),
        *("give me {said_count} {units}", "beep after {said_count} {units}"),
    ),
    "light {room} {switch}": (
        *("turn {switch} the light in the {room}", "{room} light {switch}"),
        *("switch the {room} lamp {switch}", "light {switch} in the {room}, please"),
        *("could you put the {room} light {switch}", "make it {switch} in the {room}"),
    ),
    "light {room} {percent}%": (
        *("dim the {room} to {percent} percent", "{room} at {percent} percent light"),
        *("set the lamp in the {room} to {percent} percent",),
        *(
            "{percent} percent light in the {room}",
            "light the {room} at {percent}",
        ),
    ),
    "heat {room} {degrees}": (
        *("heat the {room} to {degrees} degrees", "{degrees} degrees in the {room}"),
        *("make the {room} {degrees} degrees warm",),
        *("bring the {room} up to {degrees}", "I like the {room} at {degrees} degrees"),
    ),
    "call {name}": (
        *("call {name}", "ring {name} for me", "I want to speak to {name}"),
        *("get {name} on the phone", "phone {name}, will you"),
    ),
    "list {thing}": (
        *("put {thing} on the list", "we need {thing}", "add {thing} to the shopping"),
        *("we are out of {thing}", "do not let me forget to buy {thing}"),
    ),
    "remind {day} {time} {chore}": (
        *("remind me on {day} at {said_time} to {chore}",),
        *("on {day} at {said_time} I have to {chore}",),
        *("{chore} on {day} at {said_time}, remind me",),
        *("do not let me forget to {chore} on {day} at {said_time}",),
        *("{day}, {said_time}: {chore}",),
    ),
}


def one(kind, ways, draw):
    """Return a request and its command."""
    hour, minute = draw.randrange(1, 12), draw.choice([*MINUTES])
    later = draw.choice((0, 12))
    part = "morning" if not later else "afternoon" if hour < 6 else "evening"
    count, units = draw.choice([*NUMBERS]), draw.choice([*UNITS])
    said_time = f"{MINUTES[minute].format(HOURS[hour - 1])} in the {part}"
    words = {
        "time": f"{hour + later:02}:{minute:02}",
        "said_time": said_time,
        "count": count,
        "said_count": NUMBERS[count],
        "unit": UNITS[units],
        "units": units,
        "room": draw.choice(ROOMS),
        "switch": draw.choice(("on", "off")),
        "percent": draw.randrange(5, 100, 5),
        "degrees": draw.randrange(16, 25),
        "name": draw.choice(NAMES),
        "thing": draw.choice(THINGS),
        "day": draw.choice(DAYS),
        "chore": draw.choice(CHORES),
    }
    return draw.choice(ways).format(**words), kind.format(**words)


def main():
    draw, kinds = random.Random(20261130), [*KINDS.items()]
    seen, train, test = set(), [], []

    def fill(rows, count, ways_of):
        while len(rows) < count:
            kind, ways = draw.choice(kinds)
            request, command = one(kind, ways_of(ways), draw)
            if request not in seen:
                seen.add(request)
                rows.append((PROMPT.format(request), command))

    fill(test, TEST // 2, lambda ways: ways[-2:])
    fill(test, TEST, lambda ways: ways[:-2])
    fill(train, TRAIN, lambda ways: ways[:-2])
    draw.shuffle(test)
    made = {
        "train": [{"prompt": p, "completion": f" {command}"} for p, command in train],
        "test": [{"prompt": p, "answer": command} for p, command in test],
    }
    for name, rows in made.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (FOLDER / f"{name}.jsonl").write_text(lines, "utf-8")


if __name__ == "__main__":
    main()
