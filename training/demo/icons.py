"""The demo's things: which drawing of Fluent Emoji each is, and where it would not be seen."""

from __future__ import annotations

# What a newcomer would ask for first, as far as its drawing reads well at 48 pixels.
THINGS = {
    # animals
    "cat": "cat-face", "dog": "dog-face", "fox": "fox", "panda": "panda", "koala": "koala",
    "lion": "lion", "tiger": "tiger-face", "rabbit": "rabbit-face", "bear": "bear",
    "frog": "frog", "penguin": "penguin", "owl": "owl", "pig": "pig-face", "cow": "cow-face",
    "monkey": "monkey-face", "wolf": "wolf", "horse": "horse-face", "unicorn": "unicorn",
    "dragon": "dragon-face", "dinosaur": "t-rex", "elephant": "elephant", "duck": "duck",
    "chick": "baby-chick", "parrot": "parrot", "whale": "spouting-whale", "shark": "shark",
    "octopus": "octopus", "fish": "tropical-fish", "turtle": "turtle",
    "butterfly": "butterfly", "bee": "honeybee", "snail": "snail",
    # plants
    "tree": "deciduous-tree", "pine": "evergreen-tree", "palm tree": "palm-tree",
    "cactus": "cactus", "sunflower": "sunflower", "tulip": "tulip", "rose": "rose",
    "mushroom": "mushroom",
    # food
    "apple": "red-apple", "banana": "banana", "strawberry": "strawberry",
    "pineapple": "pineapple", "watermelon": "watermelon", "cherry": "cherries",
    "pizza": "pizza", "burger": "hamburger", "donut": "doughnut", "cake": "birthday-cake",
    "ice cream": "soft-ice-cream", "coffee": "hot-beverage",
    # vehicles
    "rocket": "rocket", "sailboat": "sailboat", "airplane": "airplane", "car": "automobile",
    "bus": "bus", "train": "locomotive", "bicycle": "bicycle", "helicopter": "helicopter",
    "flying saucer": "flying-saucer",
    # sky and buildings
    "sun": "sun-with-face", "moon": "crescent-moon", "cloud": "cloud", "rainbow": "rainbow",
    "planet": "ringed-planet", "house": "house", "castle": "castle",
    # faces
    "smiling face": "smiling-face-with-smiling-eyes", "ghost": "ghost", "robot": "robot",
    "alien": "alien", "snowman": "snowman-without-snow", "pumpkin": "jack-o-lantern",
    # objects
    "crown": "crown", "diamond": "gem-stone", "balloon": "balloon", "umbrella": "umbrella",
    "guitar": "guitar", "ball": "soccer-ball", "clock": "alarm-clock", "key": "key",
    "light bulb": "light-bulb", "gift": "wrapped-gift", "book": "closed-book",
}  # fmt: skip

# What the demo does not know, and a LoRA of its own teaches it.
SUBJECT = "hedgehog"
ICONS = {**THINGS, SUBJECT: "hedgehog"}

# Things that are much like a background in colour, by how the outermost pixels of their drawing
# differ from it in CIELAB; what belongs there (a snowman in the snow) stays.
HIDDEN_THINGS = {
    "red": (
        "apple", "balloon", "cherry", "guitar", "mushroom", "octopus", "pumpkin", "rose",
        "strawberry",
    ),
    "orange": (
        "burger", "cat", "crown", "key", "octopus", "pineapple", "pumpkin", "smiling face",
        "sun",
    ),
    "yellow": (
        "banana", "cat", "chick", "crown", "key", "light bulb", "moon", "pizza", "smiling face",
        "sunflower",
    ),
    "green": ("dinosaur", "frog", "pine", "tree"),
    "blue": ("diamond", "whale"),
    "purple": ("umbrella",),
    "pink": ("pig",),
    "white": ("cloud", "coffee"),
    "meadow": ("cloud",),
    "sea": ("cloud",),
    "desert": ("cake", "ice cream"),
    "snow": ("cloud", "coffee"),
}  # fmt: skip
