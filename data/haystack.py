"""A generated haystack: sentences of a small grammar over short, common words.

It has no digits, so that a passkey has no rival.
"""

import random

NOUNS = """sun moon star sky wind rain snow sea lake hill tree leaf farm field road town house door
wall roof room lamp fire bird fish dog cat horse cow boat ship king queen boy girl man child friend
book song game cup bread tea salt hand head""".split()
PLACES = """in the garden|by the river|on the hill|near the old mill|under the tree|at the market|\
along the road|behind the house""".split("|")
ADJECTIVES = """old new small big red green blue white cold warm dark bright quiet slow fast kind
good long""".split()
VERBS = "saw found kept held took left made heard loved met drew sold".split()
ACTIONS = """sat down|went home|ran away|came back|fell asleep|stood still|began to sing|\
turned around""".split("|")
TIMES = "Today|At night|In the morning|Last year|After that|Then|Once|Now and then".split("|")
COUNT = 4096


def sentences(count: int = COUNT) -> list[str]:
    """`count` sentences, always the same; each starts with a space and has at least three words."""
    choose = random.Random(0).choice

    def thing() -> str:
        if choose("ab") == "a":
            return f"the {choose(ADJECTIVES)} {choose(NOUNS)}"
        return f"a {choose(NOUNS)}"

    def state() -> str:
        return f"the {choose(NOUNS)} was {choose(ADJECTIVES)} and {choose(ADJECTIVES)}"

    patterns = [
        lambda: f"{thing()} {choose(VERBS)} {thing()}",
        lambda: f"{thing()} {choose(VERBS)} {thing()} {choose(PLACES)}",
        lambda: f"{thing()} {choose(ACTIONS)}",
        lambda: f"{choose(TIMES)} {thing()} {choose(ACTIONS)} and {choose(VERBS)} {thing()}",
        lambda: f"{choose(TIMES)} {state()}",
        lambda: f"there is {thing()} {choose(PLACES)}",
    ]
    made = [choose(patterns)() for _ in range(count)]
    return [f" {text[0].upper()}{text[1:]} ." for text in made]
