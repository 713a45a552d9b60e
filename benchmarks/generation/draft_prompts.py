"""Prompts whose answers copy from the prompt, and prompts whose answers do not."""

from __future__ import annotations

from collections.abc import Mapping

_HARBOUR = (
    "The harbour of Lindholm was dug in 1874 by four hundred workers who were paid in grain. For thirty years it "
    "was the largest on the northern coast, and eleven steamers left it every week. In 1906 the new railway "
    "reached the town of Aster, and the merchants moved their offices there within two summers. The last steamer "
    "left Lindholm on the ninth of October 1911. Since 1958 the old customs house has been a school for boat "
    "builders, and its pupils restore one wooden ship each year."
)
_BEES = (
    "Honey bees keep the centre of their hive at about thirty-five degrees. When it is too warm, some of them "
    "carry drops of water to the combs while others fan their wings at the entrance. When it is too cold, they "
    "hold on to each other and shiver with the muscles that move their wings. A colony of twenty thousand bees "
    "uses about twenty kilograms of honey to stay warm through a winter. Colonies that are disturbed in January "
    "use a third more."
)
_LETTER = (
    "Dear Ms Okafor,\n\nthank you for your order of the third of May. The two oak shelves will be ready on "
    "Thursday. Our driver will bring the shelves to your address between nine and eleven in the morning. Please "
    "make sure that the hall is clear, because the shelves are two metres long. You can pay the driver in cash or "
    "by card. If Thursday does not suit you, please call our office before Wednesday noon.\n\nKind regards,\nTomas "
    "Reyes"
)
_RECIPE = (
    "Bring a litre of milk to the boil and take it off the heat. Stir in the juice of two lemons and wait for ten "
    "minutes. Line a sieve with a clean cloth and pour the milk through the cloth. Rinse the cheese with cold "
    "water, press it by hand and hang the cloth over the sink for half an hour. Put a plate on the cheese and a "
    "pot of water on the plate. After two hours the cheese can be cut into cubes and fried in a little butter."
)
_MINUTES = (
    "The meeting of the garden club was opened by Ruth at seven. Paul reported that the club has sold forty boxes "
    "of tulips. Ruth proposed to spend the money on a new water tank. Paul asked whether the old tank could be "
    "mended, and Ruth promised to ask a plumber. The members voted for the new tank by twelve votes to three. The "
    "next meeting of the garden club will be held on the first Monday of June."
)
_MEAN = """def mean(values):
    total = 0.0
    count = 0
    for value in values:
        if value is None:
            continue
        total += value
        count += 1
    if count == 0:
        raise ValueError("no value")
    return total / count
"""
_STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("the stack is empty")
        return self.items.pop()

    def peek(self):
        if not self.items:
            raise IndexError("the stack is empty")
        return self.items[-1]
"""
_PARSE = """def read_pairs(path):
    pairs = {}
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            key, separator, value = line.partition("=")
            if not separator:
                raise ValueError(f"line {number} has no equals sign")
            pairs[key.strip()] = value.strip()
    return pairs
"""

#: Kind of task -> prompts. Answers of the first kinds copy from their prompts.
COPYING: Mapping[str, tuple[str, ...]] = {
    "passage": (
        f"{_HARBOUR}\n\nQuote, word for word, the sentences of this passage that contain a year.",
        f"{_BEES}\n\nQuote, word for word, the sentences of this passage that say what bees do when it is too warm and "
        "when it is too cold.",
        f"{_MINUTES}\n\nQuote, word for word, every sentence of these minutes that names Ruth.",
    ),
    "edit": (
        f"{_LETTER}\n\nRepeat this letter with 'Thursday' replaced by 'Friday' and nothing else changed.",
        f"{_RECIPE}\n\nRepeat this recipe with 'lemons' replaced by 'limes' and nothing else changed.",
        f"{_MINUTES}\n\nRepeat these minutes with 'Paul' replaced by 'Maria' and nothing else changed.",
    ),
    "code": (
        f"```python\n{_MEAN}```\n\nWrite this function again with a docstring, and nothing else changed.",
        f"```python\n{_STACK}```\n\nWrite this class again with the attribute 'items' renamed to 'entries'.",
        f"```python\n{_PARSE}```\n\nWrite this function again with the variable 'pairs' renamed to 'settings'.",
    ),
}
#: Answers of these are new texts.
FREE: Mapping[str, tuple[str, ...]] = {
    "story": (
        "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
        "Write a short story about two sisters who repair an old radio in a storm.",
        "Write a short story about a baker whose bread makes people remember their childhood.",
    ),
    "explanation": (
        "Explain why the sky is blue in the morning and red in the evening.",
        "Explain how a refrigerator keeps food cold, for somebody who never studied physics.",
        "Explain what a hash table is, and when a sorted list is better.",
    ),
}
