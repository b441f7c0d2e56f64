"""What the furniture catalogue's names and tags mean in English. It was translated from French, and names products.

For that catalogue alone: "socket" is a sock there, "hood" a range hood. A user's own files are called what they say.
"""

import re
import unicodedata

from mvdream_fast.data.captions import clean

_RENAMED = {
    "apple ibook": "laptop", "apple imac 1998": "computer", "apple imac 2004": "computer",
    "apple iphone": "smartphone", "apples": "bowl with apples", "barnum": "party tent",
    "bended coconut tree": "bent coconut tree",
    "black table": "table", "bootie": "ankle boots", "cctv": "security camera", "chevrolet": "pickup truck",
    "child hut": "playhouse", "children chair": "child chair", "children table": "child table",
    "children game": "playground slide", "class seat": "school desk", "clear sofa": "sofa",
    "clothes horse": "drying rack", "clothes washing machine": "washing machine", "concept sedan 01": "sedan",
    "concept sedan 02": "sedan", "concept sedan 02 sport": "sports car", "cone": "traffic cone",
    "contemporary living room": "living room set", "convertible sofa bz": "sofa bed", "cup cake": "cupcake",
    "day bed": "daybed", "drawers cabinet": "drawer cabinet", "dryer machine": "tumble dryer",
    "entry bell ring": "doorbell", "entry speech unit": "intercom", "female": "woman",
    "flacon": "perfume bottle", "flipper": "pinball machine", "ford focus": "car", "frame chambord": "picture frame",
    "frame hoi an": "picture frame", "gaz water heater": "gas water heater", "hashtray": "ashtray",
    "holding female": "woman holding something", "holding male": "man holding something", "hood": "range hood",
    "indoor bike": "exercise bike", "letters box": "mailbox", "lip stick": "lipstick",
    "little bank": "small bench", "lying down boy": "boy lying down", "lying down female": "woman lying down",
    "lying down male": "man lying down", "male": "man", "mannequin female": "female mannequin",
    "mannequin male": "male mannequin", "mocassin": "moccasin", "mp3 base": "speaker dock",
    "mp3 station": "speaker dock", "oil servers": "oil and vinegar bottles",
    "opened convertible sofa bz": "open sofa bed", "osaka chair": "wooden chair", "penbox": "pen holder",
    "peugeot 308 cc": "convertible car", "plate, glass and cutlery": "plate with cutlery",
    "plate, glasses and cutlery": "plate with cutlery", "playstation": "game console", "pool lounge": "pool lounger",
    "puff": "bean bag chair", "punching ball": "punching bag", "relax chair": "lounge chair",
    "renault scenic": "car", "rigged fan": "fan", "ryokan chair": "floor chair", "seat leon": "car",
    "short": "shorts", "socket": "sock", "sitting female": "sitting woman", "sitting male": "sitting man",
    "smart car": "small car",
    "spice tower": "spice rack", "stone grill device": "stone grill", "suit": "suit", "suv": "suv",
    "table tennis": "table tennis table", "table tennis bat": "table tennis racket", "tape": "adhesive tape",
    "teck chair": "teak chair", "text marker": "marker pen", "toilets unit": "toilet", "tool": "kitchen utensil",
    "trunck": "trunk", "tv 16:9": "tv", "vw new beetle": "beetle car", "wall flat tv": "flat tv",
    "white board": "whiteboard", "winchester armchair": "leather armchair", "winchester sofa": "leather sofa",
    "woman shoes": "women's shoes", "wood bank": "wooden bench", "wood toy": "wooden toy",
    "yamaha yzr r6": "motorbike", "arrow straight ahead": "arrow", "arrow turn right": "arrow",
    "arrow turn right and ahead": "arrow",
}  # fmt: skip
_PATTERNS = (
    (r"^bill \d+.*", "banknote"),
    (r"^parking slot.*", "parking slot"),
    (r"^induction cooker.*", "induction cooktop"),
    (r"^(?:rounded|square|wall) (?:type \w )?(?:rj45 |antenna )?(?:plug|socket)$", "wall outlet"),
    (r"^wall double socket$", "double wall outlet"),
    (r"^(?:rounded |square |wall )?switch$", "light switch"),
    (r"^(?:rounded |square |wall )?double switch$", "double light switch"),
    (r"^(?:rounded |square |wall )?dimmer switch$", "dimmer switch"),
    (r"^((?:double|triple|quadruple) (?:french |arched )?window).*", r"\1"),
    (r"^sofa 2 seats$", "two-seat sofa"),
    (r"^sofa 3 seats$", "three-seat sofa"),
    (r"^air conditioning - internal unit$", "air conditioner"),
    (r"^air conditioning - external unit$", "outdoor air conditioner"),
)
_BRANDS = re.compile(r"\b(?:yamaha|vw|apple(?! tree)|sony|ikea|nintendo|peterbilt)\b\s*", re.IGNORECASE)
_IDLE_TAGS = {"blend swap", "scpts", "adjustable", "nitendo", "sony", "xbox", "ps", "ipad", "velux", "peterbilt",
              "thonet", "haussmann"}  # fmt: skip


def furniture_noun(name: str) -> str:
    """A name of the catalogue as a caption says it: ASCII, translations mended, no brands or numbers."""
    text = clean(unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()).lower()
    if text in _RENAMED:
        return _RENAMED[text]
    for pattern, replacement in _PATTERNS:
        if re.match(pattern, text):
            return re.sub(pattern, replacement, text)
    return clean(re.sub(r"\b\d+\b", "", _BRANDS.sub("", text))) or "object"


def usable_tags(tags: tuple[str, ...], category: str) -> tuple[str, ...]:
    """Tags and category in lower case, without the catalogue's placeholders and brands; at most three."""
    words = [clean(t).lower() for t in (*tags, category)]
    return tuple(dict.fromkeys(w for w in words if w and w not in _IDLE_TAGS and not w.isdigit()))[:3]
