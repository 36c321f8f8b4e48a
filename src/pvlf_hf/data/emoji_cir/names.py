"""Attributes of an emoji, read from its CLDR short name: "woman running dark skin tone" is a woman, running, dark.

Names are regular, so the attributes of every name without skin tone are tabulated by family, and `parse_name` removes
the skin tones and looks the rest up. A name that is not in the table has no attributes.
"""

import re
from functools import cache
from itertools import product

SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
"""Skin tones from light to dark; the emoji without a tone is `"default"` (yellow)."""

GENDERS = ("person", "man", "woman")

_TONE = re.compile(r"\b(medium-light|medium-dark|light|medium|dark) skin tone\b")

OCCUPATIONS = (
    "artist,astronaut,construction worker,cook,detective,elf,factory worker,fairy,farmer,firefighter,genie,guard,"
    "health worker,judge,mage,mechanic,office worker,pilot,police officer,scientist,singer,student,superhero,"
    "supervillain,teacher,technologist,vampire,zombie"
).split(",")
"""Roles that are nouns ("firefighter", "man firefighter")."""

ACTIVITIES = (
    "biking,bouncing ball,bowing,cartwheeling,climbing,dancing,facepalming,feeding baby,fencing,frowning,"
    "gesturing NO,gesturing OK,getting haircut,getting massage,golfing,in bed,in lotus position,in manual wheelchair,"
    "in motorized wheelchair,in steamy room,in suit levitating,in tuxedo,juggling,kneeling,lifting weights,"
    "mountain biking,playing handball,playing water polo,pouting,raising hand,rowing boat,running,shrugging,standing,"
    "surfing,swimming,taking bath,tipping hand,walking,wearing turban,with headscarf,with skullcap,with veil,"
    "with white cane"
).split(",")
"""Roles that follow the noun ("man running", "person with veil")."""

HAIR = ("red hair", "curly hair", "white hair", "bald", "blond hair", "beard")

_IRREGULAR_ROLES = {
    # name: (gender, role)
    "deaf person": ("person", "deaf"),
    "deaf man": ("man", "deaf"),
    "deaf woman": ("woman", "deaf"),
    "pregnant person": ("person", "pregnant"),
    "pregnant man": ("man", "pregnant"),
    "pregnant woman": ("woman", "pregnant"),
    "merperson": ("person", "mermaid"),
    "merman": ("man", "mermaid"),
    "mermaid": ("woman", "mermaid"),
    "person with crown": ("person", "royal"),
    "prince": ("man", "royal"),
    "princess": ("woman", "royal"),
    "Mx Claus": ("person", "Claus"),
    "Santa Claus": ("man", "Claus"),
    "Mrs. Claus": ("woman", "Claus"),
    "breast-feeding": ("woman", "breast-feeding"),
    "ninja": ("person", "ninja"),
    "snowboarder": ("person", "snowboarding"),
    "skier": ("person", "skiing"),
    "horse racing": ("person", "horse racing"),
}

_AGES = {
    # name: (gender, age)
    "baby": ("person", "baby"),
    "child": ("person", "child"),
    "boy": ("man", "child"),
    "girl": ("woman", "child"),
    "older person": ("person", "older"),
    "old man": ("man", "older"),
    "old woman": ("woman", "older"),
}

GESTURES = (
    "OK hand,call me hand,clapping hands,crossed fingers,flexed biceps,folded hands,hand with fingers splayed,"
    "hand with index finger and thumb crossed,heart hands,index pointing up,love-you gesture,middle finger,"
    "nail polish,open hands,palms up together,pinched fingers,pinching hand,raised back of hand,raised fist,"
    "raised hand,raising hands,selfie,sign of the horns,victory hand,vulcan salute,waving hand,writing hand"
).split(",")

BODY_PARTS = "ear,ear with hearing aid,foot,leg,nose".split(",")

_DIRECTED = {
    # name: (class, direction)
    **{f"backhand index pointing {d}": ("pointing hand", d) for d in ("up", "down", "left", "right")},
    "index pointing at the viewer": ("pointing hand", "towards the viewer"),
    "left-facing fist": ("fist", "left"),
    "right-facing fist": ("fist", "right"),
    "oncoming fist": ("fist", "towards the viewer"),
    "leftwards hand": ("flat hand", "left"),
    "rightwards hand": ("flat hand", "right"),
    "palm up hand": ("palm", "up"),
    "palm down hand": ("palm", "down"),
    "thumbs up": ("thumb", "up"),
    "thumbs down": ("thumb", "down"),
}

_COUPLES = {"": "people", " person person": "people", " man man": "men", " woman woman": "women"}
_COUPLES[" woman man"] = "woman and man"

SMILEYS = (
    "angry face,anguished face,anxious face with sweat,astonished face,beaming face with smiling eyes,clown face,"
    "cold face,confounded face,confused face,cowboy hat face,crying face,disappointed face,disguised face,"
    "downcast face with sweat,drooling face,enraged face,exploding head,expressionless face,face blowing a kiss,"
    "face savoring food,face screaming in fear,face vomiting,face with crossed-out eyes,"
    "face with hand over mouth,face with head-bandage,face with medical mask,face with monocle,face with open mouth,"
    "face with raised eyebrow,face with rolling eyes,face with steam from nose,face with symbols on mouth,"
    "face with tears of joy,face with thermometer,face with tongue,face without mouth,fearful face,flushed face,"
    "frowning face,frowning face with open mouth,grimacing face,grinning face,grinning face with big eyes,"
    "grinning face with smiling eyes,grinning face with sweat,grinning squinting face,hot face,hushed face,"
    "kissing face,kissing face with closed eyes,kissing face with smiling eyes,loudly crying face,lying face,"
    "money-mouth face,nauseated face,nerd face,neutral face,partying face,pensive face,persevering face,"
    "pleading face,relieved face,rolling on the floor laughing,sad but relieved face,shushing face,sleeping face,"
    "sleepy face,slightly frowning face,slightly smiling face,smiling face,smiling face with halo,"
    "smiling face with heart-eyes,smiling face with hearts,smiling face with horns,smiling face with open hands,"
    "smiling face with smiling eyes,smiling face with sunglasses,smiling face with tear,smirking face,sneezing face,"
    "squinting face with tongue,star-struck,thinking face,tired face,unamused face,upside-down face,weary face,"
    "winking face,winking face with tongue,woozy face,worried face,yawning face,zany face,zipper-mouth face"
).split(",")

_CATS = {
    # name: the smiley with the same expression
    "grinning cat": "grinning face",
    "grinning cat with smiling eyes": "grinning face with smiling eyes",
    "cat with tears of joy": "face with tears of joy",
    "smiling cat with heart-eyes": "smiling face with heart-eyes",
    "cat with wry smile": "smirking face",
    "kissing cat": "kissing face with closed eyes",
    "weary cat": "weary face",
    "crying cat": "crying face",
    "pouting cat": "enraged face",
}

ANIMALS_WHOLE = (
    "ant,baby chick,badger,bat,beaver,beetle,bird,bison,black cat,blowfish,bug,butterfly,camel,cat,"
    "chipmunk,cockroach,cow,crab,crocodile,deer,dodo,dog,dolphin,dove,dragon,duck,eagle,elephant,ewe,fish,flamingo,"
    "fly,giraffe,goat,gorilla,hedgehog,hippopotamus,honeybee,horse,kangaroo,lady beetle,leopard,lizard,llama,"
    "lobster,mammoth,monkey,mosquito,mouse,octopus,orangutan,otter,owl,ox,parrot,peacock,penguin,pig,"
    "poodle,rabbit,ram,rat,rhinoceros,rooster,sauropod,scorpion,seal,shark,shrimp,skunk,sloth,snail,snake,spider,"
    "spouting whale,squid,swan,T-Rex,tiger,tropical fish,turkey,turtle,two-hump camel,water buffalo,whale,worm"
).split(",")
ANIMAL_FACES = "cat,cow,dog,dragon,horse,monkey,mouse,pig,rabbit,tiger".split(",")
"""Animals with an emoji of the face alone whose name says so ("cat face")."""
ANIMALS_DRAWN_AS_FACES = (
    "bear,boar,chicken,fox,frog,hamster,koala,lion,panda,polar bear,raccoon,unicorn,wolf,zebra".split(",")
)
"""Animals whose name does not mention the face, but of which Google draws only the face."""

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
_SIZES = {"large": "large", "medium": "medium", "medium-small": "fairly small", "small": "small"}

_NUMBERS = "one,two,three,four,five,six,seven,eight,nine,ten,eleven,twelve".split(",")
_DIRECTIONS = ("up", "up-right", "right", "down-right", "down", "down-left", "left", "up-left")

_PHASES = {
    "new moon": "new",
    "waxing crescent moon": "waxing crescent",
    "first quarter moon": "first quarter",
    "waxing gibbous moon": "waxing gibbous",
    "full moon": "full",
    "waning gibbous moon": "waning gibbous",
    "last quarter moon": "last quarter",
    "waning crescent moon": "waning crescent",
}

OBJECTS = {
    "fruit or vegetable": "avocado,banana,bell pepper,blueberries,broccoli,carrot,cherries,coconut,cucumber,"
    "ear of corn,eggplant,garlic,grapes,green apple,hot pepper,kiwi fruit,leafy green,lemon,mango,melon,mushroom,"
    "olive,onion,peach,pear,pineapple,potato,red apple,strawberry,tangerine,tomato,watermelon",
    "dish": "bacon,bagel,baguette bread,birthday cake,bread,burrito,candy,cheese wedge,chocolate bar,cookie,"
    "croissant,cupcake,custard,doughnut,dumpling,french fries,fried shrimp,green salad,hamburger,hot dog,ice cream,"
    "lollipop,meat on bone,pancakes,pie,pizza,popcorn,poultry leg,pretzel,rice ball,sandwich,shaved ice,shortcake,"
    "soft ice cream,spaghetti,steaming bowl,sushi,taco,waffle",
    "drink": "baby bottle,beer mug,beverage box,bottle with popping cork,bubble tea,clinking beer mugs,"
    "clinking glasses,cocktail glass,cup with straw,glass of milk,hot beverage,mate,sake,teacup without handle,teapot,"
    "tropical drink,tumbler glass,wine glass",
    "sports gear": "american football,badminton,baseball,basketball,bowling,boxing glove,cricket game,curling stone,"
    "field hockey,flying disc,ice hockey,lacrosse,ping pong,pool 8 ball,rugby football,soccer ball,softball,tennis,"
    "volleyball",
    "musical instrument": "accordion,banjo,drum,guitar,long drum,musical keyboard,saxophone,trumpet,violin",
    "clothes": "ballet shoes,bikini,billed cap,briefs,coat,dress,flat shoe,glasses,gloves,goggles,graduation cap,"
    "high-heeled shoe,hiking boot,jeans,kimono,lab coat,man’s shoe,necktie,one-piece swimsuit,running shirt,"
    "running shoe,safety vest,sari,scarf,shorts,socks,sunglasses,t-shirt,thong sandal,top hat,woman’s boot,"
    "woman’s clothes,woman’s hat,woman’s sandal",
    "vehicle": "airplane,ambulance,articulated lorry,auto rickshaw,bicycle,canoe,delivery truck,ferry,fire engine,"
    "flying saucer,helicopter,kick scooter,locomotive,minibus,monorail,motor boat,motor scooter,motorcycle,"
    "passenger ship,pickup truck,racing car,rocket,sailboat,ship,skateboard,small airplane,speedboat,"
    "sport utility vehicle,tractor,tram car,trolleybus",
    "building": "Japanese castle,Japanese post office,bank,castle,church,classical building,convenience store,"
    "department store,derelict house,factory,hindu temple,hospital,hotel,house,house with garden,houses,hut,kaaba,"
    "love hotel,mosque,office building,post office,school,shinto shrine,stadium,synagogue,tent,wedding",
    "plant": "Christmas tree,blossom,bouquet,cactus,cherry blossom,deciduous tree,evergreen tree,fallen leaf,"
    "four leaf clover,herb,hibiscus,leaf fluttering in wind,maple leaf,palm tree,pine decoration,potted plant,rose,"
    "seedling,shamrock,sheaf of rice,sunflower,tanabata tree,tulip,white flower,wilted flower",
    "weather": "cloud,cloud with lightning,cloud with lightning and rain,cloud with rain,cloud with snow,fog,"
    "high voltage,rainbow,snowflake,snowman,snowman without snow,sun,sun behind cloud,sun behind large cloud,"
    "sun behind rain cloud,sun behind small cloud,tornado,umbrella with rain drops",
    "tool": "axe,carpentry saw,clamp,crossed swords,dagger,hammer,hammer and pick,hammer and wrench,hook,ladder,"
    "nut and bolt,pick,plunger,razor,scissors,screwdriver,toolbox,wrench",
}
"""Names of things by class; swapping one for another of its class is the attribute `"object"`."""

_STATES = {
    # name: all attributes, for small families
    "locked": {"class": "padlock", "state": "closed"},
    "unlocked": {"class": "padlock", "state": "open"},
    "file folder": {"class": "folder", "state": "closed"},
    "open file folder": {"class": "folder", "state": "open"},
    "closed umbrella": {"class": "umbrella", "state": "closed"},
    "umbrella": {"class": "umbrella", "state": "open"},
    "umbrella on ground": {"class": "umbrella", "state": "stuck in the ground"},
    "hourglass not done": {"class": "hourglass", "state": "still running"},
    "hourglass done": {"class": "hourglass", "state": "run out"},
    "bell": {"class": "bell", "state": "on"},
    "bell with slash": {"class": "bell", "state": "crossed out"},
    "hatching chick": {"class": "chick", "state": "hatching"},
    "front-facing baby chick": {"class": "chick", "state": "facing the front"},
    "chart increasing": {"class": "chart", "state": "rising"},
    "chart decreasing": {"class": "chart", "state": "falling"},
    "mobile phone": {"class": "mobile phone", "state": "on"},
    "mobile phone off": {"class": "mobile phone", "state": "off"},
    "mobile phone with arrow": {"class": "mobile phone", "state": "receiving a call"},
    "muted speaker": {"class": "speaker", "state": "muted"},
    "speaker low volume": {"class": "speaker", "state": "at low volume"},
    "speaker medium volume": {"class": "speaker", "state": "at medium volume"},
    "speaker high volume": {"class": "speaker", "state": "at high volume"},
    "see-no-evil monkey": {"class": "wise monkey", "state": "covering its eyes"},
    "hear-no-evil monkey": {"class": "wise monkey", "state": "covering its ears"},
    "speak-no-evil monkey": {"class": "wise monkey", "state": "covering its mouth"},
    "magnifying glass tilted left": {"class": "magnifying glass", "direction": "left"},
    "magnifying glass tilted right": {"class": "magnifying glass", "direction": "right"},
    "red triangle pointed up": {"class": "triangle", "direction": "up"},
    "red triangle pointed down": {"class": "triangle", "direction": "down"},
    "globe showing Americas": {"class": "globe", "region": "the Americas"},
    "globe showing Asia-Australia": {"class": "globe", "region": "Asia and Australia"},
    "globe showing Europe-Africa": {"class": "globe", "region": "Europe and Africa"},
    "1st place medal": {"class": "medal", "place": "first"},
    "2nd place medal": {"class": "medal", "place": "second"},
    "3rd place medal": {"class": "medal", "place": "third"},
    "blue book": {"class": "book", "colour": "blue"},
    "green book": {"class": "book", "colour": "green"},
    "orange book": {"class": "book", "colour": "orange"},
    "closed book": {"class": "book", "colour": "red"},
    **{f"{suit} suit": {"class": "card suit", "suit": f"{suit}s"} for suit in ("club", "diamond", "heart", "spade")},
    **{f"{n} banknote": {"class": "banknote", "currency": n} for n in ("dollar", "euro", "pound", "yen")},
    **{f"keycap {n}": {"class": "keycap", "digit": str(n)} for n in range(11)},
    **{
        f"{lid} mailbox with {flag} flag": {"class": "mailbox", "lid": lid, "little flag": flag}
        for lid, flag in product(("open", "closed"), ("raised", "lowered"))
    },
    **{
        f"{colour} {mark} mark": {"class": "punctuation", "colour": colour, "mark": f"{mark} mark"}
        for colour, mark in product(("red", "white"), ("exclamation", "question"))
    },
    **{
        f"{size} {colour} diamond": {"class": "diamond", "colour": colour, "size": size}
        for size, colour in product(("large", "small"), ("blue", "orange"))
    },
}

_ZODIAC = "Aquarius,Aries,Cancer,Capricorn,Gemini,Leo,Libra,Pisces,Sagittarius,Scorpio,Taurus,Virgo".split(",")


def parse_name(name: str) -> dict[str, str]:
    """Read the attributes of an emoji from its name.

    Args:
        name: CLDR short name as in the column `name` of `load_emoji_pictures`, e.g. `"man running dark skin tone"`.

    Returns:
        `"class"` (things of one class have the same attributes) and its attributes, e.g. `{"class": "person",
        "gender": "man", "age": "adult", "hair": "default", "role": "running", "skin": "dark"}`; empty for unknown
        names.
    """
    tones = _TONE.findall(name)
    attributes = dict(_attribute_table().get(" ".join(_TONE.sub(" ", name).split()), {}))
    if tones and "skin" in attributes:
        attributes["skin"] = tones[0]
    elif tones and "left skin" in attributes:  # one tone applies to both people
        attributes["left skin"], attributes["right skin"] = tones[0], tones[-1]
    return attributes


@cache
def _attribute_table() -> dict[str, dict[str, str]]:
    """Return the attributes of every known name without skin tones; some of the combinations are not emoji."""
    return _person_table() | _hand_table() | _couple_table() | _animal_table() | _shape_table() | _thing_table()


def _person_table() -> dict[str, dict[str, str]]:
    def person(gender: str, age: str = "adult", hair: str = "default", role: str = "none") -> dict[str, str]:
        return {"class": "person", "gender": gender, "age": age, "hair": hair, "role": role, "skin": "default"}

    table = {gender: person(gender) for gender in GENDERS}
    table |= {f"{gender} {hair}": person(gender, hair=hair) for gender, hair in product(GENDERS, HAIR)}
    table |= {f"{gender} {role}": person(gender, role=role) for gender, role in product(GENDERS, ACTIVITIES)}
    table |= {f"{gender} {role}": person(gender, role=role) for gender, role in product(GENDERS, OCCUPATIONS)}
    table |= {role: person("person", role=role) for role in OCCUPATIONS}
    table |= {name: person(gender, role=role) for name, (gender, role) in _IRREGULAR_ROLES.items()}
    table |= {name: person(gender, age=age) for name, (gender, age) in _AGES.items()}
    return table


def _hand_table() -> dict[str, dict[str, str]]:
    table = {gesture: {"class": "hand", "gesture": gesture, "skin": "default"} for gesture in GESTURES}
    table |= {part: {"class": "body part", "part": part, "skin": "default"} for part in BODY_PARTS}
    table |= {n: {"class": kind, "direction": to, "skin": "default"} for n, (kind, to) in _DIRECTED.items()}
    return table


def _couple_table() -> dict[str, dict[str, str]]:
    def couple(who: str, pose: str) -> dict[str, str]:
        return {"class": "couple", "who": who, "pose": pose, "left skin": "default", "right skin": "default"}

    table = {f"kiss{suffix}": couple(who, "kissing") for suffix, who in _COUPLES.items()}
    table |= {f"couple with heart{suffix}": couple(who, "with a heart") for suffix, who in _COUPLES.items()}
    for who, pose in product(("people", "men", "women", "woman and man"), ("holding hands", "wrestling")):
        table[f"{who} {pose}"] = couple(who, pose)
    table |= {f"{who} with bunny ears": couple(who, "with bunny ears") for who in ("people", "men", "women")}
    table["handshake"] = {"class": "handshake", "left skin": "default", "right skin": "default"}
    adults = ("man", "woman", "man man", "man woman", "woman woman")
    children = ("boy", "girl", "boy boy", "girl boy", "girl girl")
    table |= {f"family {a} {c}": {"class": "family", "adults": a, "children": c} for a, c in product(adults, children)}
    return table


def _animal_table() -> dict[str, dict[str, str]]:
    table = {name: {"class": "animal", "species": name, "view": "whole"} for name in ANIMALS_WHOLE}
    table |= {f"{name} face": {"class": "animal", "species": name, "view": "face"} for name in ANIMAL_FACES}
    table |= {name: {"class": "animal", "species": name, "view": "face"} for name in ANIMALS_DRAWN_AS_FACES}
    table |= {name: {"class": "face", "character": "smiley", "expression": name} for name in SMILEYS}
    table |= {name: {"class": "face", "character": "cat", "expression": smiley} for name, smiley in _CATS.items()}
    return table


def _shape_table() -> dict[str, dict[str, str]]:
    table = {
        f"{colour} {shape}": {"class": "shape", "shape": shape, "colour": colour, "size": "large"}
        for colour, shape in product(COLOURS, ("circle", "square", "heart"))
    }
    for colour, (size, value) in product(("black", "white"), _SIZES.items()):
        table[f"{colour} {size} square"] = {"class": "shape", "shape": "square", "colour": colour, "size": value}
    for direction in _DIRECTIONS:
        table[f"{direction} arrow"] = {"class": "arrow", "direction": direction}
    for number in _NUMBERS:
        table[f"{number} o’clock"] = {"class": "clock", "time": f"{number} o'clock"}
        table[f"{number}-thirty"] = {"class": "clock", "time": f"half past {number}"}
    return table


def _thing_table() -> dict[str, dict[str, str]]:
    table = {n: {"class": kind, "object": n} for kind, names in OBJECTS.items() for n in names.split(",")}
    table |= _STATES
    table |= {sign: {"class": "zodiac", "sign": sign} for sign in _ZODIAC}
    table |= {name: {"class": "moon", "phase": phase, "view": "whole"} for name, phase in _PHASES.items()}
    table |= {f"{n} face": {"class": "moon", "phase": phase, "view": "face"} for n, phase in _PHASES.items()}
    for vehicle in ("bus", "taxi", "automobile", "police car"):
        table[vehicle] = {"class": "road vehicle", "object": vehicle, "view": "from the side"}
        table[f"oncoming {vehicle}"] = {"class": "road vehicle", "object": vehicle, "view": "from the front"}
    table |= {country: {"class": "flag", "country": country} for country in _countries()}
    return table


def _countries() -> list[str]:
    """Return the names of flags that are made of two regional indicator letters."""
    from emoji import EMOJI_DATA

    flags = (data["en"] for sequence, data in EMOJI_DATA.items() if "\U0001f1e6" <= sequence[0] <= "\U0001f1ff")
    return sorted(flag.strip(":").replace("_", " ") for flag in flags)
