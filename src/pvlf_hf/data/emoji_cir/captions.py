"""Relative captions of EmojiCIR: how a change of attributes is put into words.

Four styles: `"train"` for training and validation, and the three tiers of the test split, whose phrasings are never
used in training. `"plain"` says the change in a clear sentence; `"paraphrased"` uses other sentences and, where the
language has them, other words; `"brief"` is as short and careless as many captions of CIRR: a word or three, no
verb, a typo, or a vague "darker" that leaves out how much.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from ...digests import sha1_digest
from .names import ACTIVITIES, OCCUPATIONS, SKIN_TONES

TIERS = ("plain", "paraphrased", "brief")

T = TypeVar("T")

_ANYTHING: dict[str, tuple[str, ...]] = {
    # For every attribute without phrasings of its own.
    "train": (
        "change the {slot} to {new}",
        "the {slot} should be {new}",
        "same but with the {slot} {new}",
        "{new} as the {slot} instead of {old}",
        "from {old} to {new}",
        "replace {old} with {new}",
        "keep everything, only the {slot} becomes {new}",
        "the one whose {slot} is {new}",
    ),
    "plain": (
        "please set the {slot} to {new}",
        "now show {new} as the {slot}",
        "alter only the {slot}, which should be {new}",
    ),
    "paraphrased": (
        "take the version with {new} for the {slot}",
        "i am after the variant with another {slot}, namely {new}",
        "when it comes to the {slot}, {new} is what is wanted",
    ),
    "brief": ("{new}", "not {old} but {new}", "{new} pls"),
}

_SWAP: dict[str, tuple[str, ...]] = {
    # One thing for another of its class.
    "train": (
        "replace it with {new}",
        "{new} instead",
        "swap {old} for {new}",
        "change {old} into {new}",
        "turn it into {new}",
        "show {new} rather than {old}",
        "i want {new} here",
        "not {old}, {new}",
        "the same style but {new}",
    ),
    "plain": ("please draw {new} in place of {old}", "the picture shows {new} now", "make this one {new}"),
    "paraphrased": (
        "where there was {old} there should be {new}",
        "lose {old} and put in {new}",
        "what i am looking for is {new}",
    ),
    "brief": ("{new}", "{new} not {old}", "its {new}"),
}


def _skin_of(side: str) -> dict[str, tuple[str, ...]]:
    """Phrasings for the skin of one person of a couple."""
    return {
        "train": (
            f"make the skin of the {side} person {{new}}",
            f"the {side} one with {{new}} skin",
            f"{{new}} skin for the one on the {side}",
            f"change the skin tone on the {side} from {{old}} to {{new}}",
            f"the {side} person's skin should be {{new}}",
            f"same couple but {{new}} skin on the {side}",
            f"skin of the {side} one {{new}} instead of {{old}}",
            f"only the person on the {side} gets {{new}} skin",
        ),
        "plain": (
            f"please colour the skin of the person on the {side} {{new}}",
            f"the one standing {side} has skin that is {{new}} now",
            f"draw the same two with a {side} one whose skin is {{new}}",
        ),
        "paraphrased": (
            f"let the {side} half of the couple have a complexion that is {{new}}",
            f"recolour the {side} partner so that the complexion is {{new}}",
            f"identical apart from who is at the {side}: {{new}} rather than {{old}}",
        ),
        "brief": (f"{side} {{new}}", f"{{new}} on the {side}", f"{side} one {{more}}"),
    }


TEMPLATES: Mapping[str, dict[str, tuple[str, ...]]] = {
    "skin": {
        "train": (
            "make the skin {new}",
            "change the skin tone to {new}",
            "with {new} skin",
            "same but with {new} skin",
            "the skin should be {new}",
            "give it {new} skin",
            "skin tone {new} instead of {old}",
            "the same picture with a skin tone that is {new}",
            "switch from {old} to {new} skin",
            "{new} skin, everything else the same",
        ),
        "plain": (
            "please colour the skin {new}",
            "draw the same thing with skin that is {new}",
            "the skin tone is {new} now",
        ),
        "paraphrased": (
            "recolour it so that the complexion is {new}",
            "identical apart from a complexion that is {new} rather than {old}",
            "everything stays except for the skin, which turns {new}",
        ),
        "brief": ("{new} skin", "skin {new}", "{more} skin", "{more}"),
    },
    "left skin": _skin_of("left"),
    "right skin": _skin_of("right"),
    "gender": {
        "train": (
            "as {new}",
            "make it {new}",
            "change the person to {new}",
            "{new} instead of {old}",
            "the same but with {new}",
            "turn {old} into {new}",
            "it should be {new}",
            "swap {old} for {new}",
            "now {new} in the same pose",
        ),
        "plain": (
            "please show {new} in place of {old}",
            "the person in the picture is {new} now",
            "draw the same scene with {new}",
        ),
        "paraphrased": (
            "same situation, other gender: {new}",
            "the one who is shown ought to be {new}",
            "let {new} do this rather than {old}",
        ),
        "brief": ("{new}", "{new} version", "not {old}"),
    },
    "role": {  # the new role is a noun: "a firefighter"
        "train": (
            "as {new}",
            "make the person {new}",
            "same person but {new}",
            "change the job to {new}",
            "dressed as {new}",
            "turn the person into {new}",
            "now working as {new}",
            "is {new} and not {old}",
            "the same one as {new}",
        ),
        "plain": (
            "please show the same person being {new}",
            "the person in the picture has become {new}",
            "draw this person in the part of {new}",
        ),
        "paraphrased": (
            "keep the person but give them the outfit of {new}",
            "someone who looks alike and earns a living as {new}",
            "rather than {old}, picture {new}",
        ),
        "brief": ("{new}", "{new} now", "person {new}"),
    },
    "activity": {  # the new role is a predicate: "running", "in a tuxedo"
        "train": (
            "same person but {new}",
            "now {new}",
            "make the person be {new}",
            "{new} instead of {old}",
            "the person should be {new}",
            "show the person {new}",
            "the same one {new}",
            "not {old} any more but {new}",
            "change it so that the person is {new}",
        ),
        "plain": (
            "please draw the same person {new}",
            "the person in the picture is {new} now",
            "this person can be seen {new}",
        ),
        "paraphrased": (
            "the very same individual, only {new}",
            "i would rather see them {new} than {old}",
            "leave the looks alone and have them {new}",
        ),
        "brief": ("{new}", "person {new}", "{new} no longer {old}"),
    },
    "hair": {
        "train": (
            "with {new}",
            "give the person {new}",
            "change the hair: {new}",
            "same person but with {new}",
            "{new} instead of {old}",
            "the person should have {new}",
            "swap {old} for {new}",
            "the head should have {new}",
        ),
        "plain": (
            "please draw the same person with {new}",
            "the person in the picture has {new} now",
            "restyle the hair, so that one sees {new}",
        ),
        "paraphrased": (
            "back from the barber with {new}",
            "the very same face, wearing {new}",
            "lose {old} and go for {new}",
        ),
        "brief": ("{new}", "hair {new}", "{new} now"),
    },
    "age": {
        "train": (
            "as {new}",
            "make it {new}",
            "change the age: {new}",
            "{new} instead of {old}",
            "the same person as {new}",
            "it should be {new}",
            "turn {old} into {new}",
            "now {new} with the same skin",
        ),
        "plain": (
            "please show the same person as {new}",
            "the person in the picture is {new} now",
            "draw this person at another age, namely as {new}",
        ),
        "paraphrased": (
            "let time pass until one sees {new}",
            "same looks at a different stage of life: {new}",
            "{new} is who should be pictured rather than {old}",
        ),
        "brief": ("{new}", "{more}", "{more} person"),
    },
    "direction": {
        "train": (
            "pointing {new}",
            "make it point {new}",
            "turn it so that it faces {new}",
            "{new} instead of {old}",
            "the same but facing {new}",
            "change the direction to {new}",
            "rotate it from {old} to {new}",
            "it should go {new}",
        ),
        "plain": ("please turn this to point {new}", "it points {new} now", "draw the same thing directed {new}"),
        "paraphrased": (
            "aim it {new} rather than {old}",
            "the very same sign but its way is {new}",
            "spin it until its end is {new}",
        ),
        "brief": ("{new}", "{new} not {old}", "points {new}"),
    },
    "gesture": {
        "train": (
            "change the gesture to {new}",
            "make the {new} gesture",
            "the hand should show {new}",
            "{new} instead of {old}",
            "same skin but {new}",
            "replace {old} with {new}",
            "now showing {new}",
            "the same hand doing {new}",
        ),
        "plain": ("please make the hand sign {new}", "the hand is shown as {new} now", "draw this hand as {new}"),
        "paraphrased": (
            "signal something else with it: {new}",
            "let go of {old} and form {new}",
            "identical colours, but what is signed is {new}",
        ),
        "brief": ("{new}", "hand {new}", "{new} sign"),
    },
    "expression": {
        "train": (
            "change the expression to {new}",
            "make it {new}",
            "{new} instead of {old}",
            "now {new}",
            "it should be {new}",
            "turn {old} into {new}",
            "the same one as {new}",
            "show {new} instead",
        ),
        "plain": (
            "please give it the mood of {new}",
            "what is shown is {new} now",
            "draw another expression, that of {new}",
        ),
        "paraphrased": (
            "let the feelings change from {old} to {new}",
            "put on the look of {new}",
            "same character in the mood that {new} has",
        ),
        "brief": ("{new}", "{new} now", "not {old}, {new}"),
    },
    "colour": {
        "train": (
            "make it {new}",
            "in {new}",
            "change the colour to {new}",
            "the same but {new}",
            "{new} instead of {old}",
            "paint it {new}",
            "it should be {new}",
            "a {new} one",
        ),
        "plain": ("please colour this {new}", "the colour is {new} now", "draw the same thing in the colour {new}"),
        "paraphrased": (
            "dip it into {new} paint",
            "the very same shape in a {new} shade",
            "swap the {old} for something {new}",
        ),
        "brief": ("{new}", "{new} not {old}", "{new} colour"),
    },
    "view": {
        "train": (
            "show {new}",
            "{new} instead of {old}",
            "the same one but {new}",
            "change the view: {new}",
            "make it {new}",
            "now {new}",
            "i want to see {new}",
        ),
        "plain": ("please draw {new} of the same one", "what is shown is {new} now", "picture this as {new}"),
        "paraphrased": (
            "look at the very same one again, {new} this time",
            "another framing of it: {new}",
            "rather than {old} i would like {new}",
        ),
        "brief": ("{new}", "{new} only", "not {old}"),
    },
    "species": _SWAP,
    "object": _SWAP,
    "shape": _SWAP,
    "part": _SWAP,
    "mark": _SWAP,
    "character": _SWAP,
    "country": {
        "train": (
            "the flag of {new}",
            "change the flag to {new}",
            "make it the flag of {new}",
            "{new} instead of {old}",
            "replace {old} with {new}",
            "a flag, but of {new}",
            "the country should be {new}",
            "swap the flag for that of {new}",
        ),
        "plain": (
            "please show the flag of {new} in its place",
            "the flag belongs to {new} now",
            "draw the flag that {new} has",
        ),
        "paraphrased": (
            "the banner one sees flying in {new}",
            "travel from {old} to {new}",
            "what stands for {new} rather than for {old}",
        ),
        "brief": ("{new}", "{new} flag", "not {old} but {new}"),
    },
    "time": {
        "train": (
            "set the clock to {new}",
            "the clock should show {new}",
            "make it {new}",
            "change the time to {new}",
            "turn the hands from {old} to {new}",
            "it is {new} now",
            "{new} instead of {old}",
            "a clock at {new}",
        ),
        "plain": (
            "please turn the clock to {new}",
            "the time shown is {new} now",
            "draw the same clock when it reads {new}",
        ),
        "paraphrased": (
            "wind it until the hands say {new}",
            "the very same dial at {new}",
            "rather than {old} it tells {new}",
        ),
        "brief": ("{new}", "at {new}", "{new} clock"),
    },
}
"""Attribute -> style -> templates with `{old}`, `{new}`, `{slot}` and, for ordered attributes, `{more}`."""

TRAINING_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    # The first of each is also the one of the plain and brief tiers; a value that is missing is its own word.
    "skin": {
        "default": ("yellow", "default yellow", "emoji yellow"),
        "light": ("light", "very light"),
        "medium-light": ("medium-light", "fairly light"),
        "medium": ("medium", "mid-toned"),
        "medium-dark": ("medium-dark", "fairly dark"),
        "dark": ("dark", "very dark"),
    },
    "gender": {
        "person": ("a gender-neutral person", "a person who is neither a man nor a woman", "a neutral person"),
        "man": ("a man", "a male person", "male"),
        "woman": ("a woman", "a female person", "female"),
    },
    "role": {
        "none": ("just showing the face", "doing nothing special"),
        "royal": ("wearing a crown", "royal"),
        "Claus": ("Santa Claus", "dressed for Christmas like Santa"),
        "breast-feeding": ("breast-feeding a baby", "nursing a baby"),
        "bouncing ball": ("bouncing a ball", "playing basketball"),
        "biking": ("biking", "riding a bicycle", "cycling"),
        "feeding baby": ("feeding a baby with a bottle", "feeding a baby"),
        "gesturing NO": ("gesturing no", "crossing the arms to say no"),
        "gesturing OK": ("gesturing OK", "with the arms in a ring to say OK"),
        "getting haircut": ("getting a haircut", "at the hairdresser"),
        "getting massage": ("getting a massage", "having a head massage"),
        "in lotus position": ("in the lotus position", "meditating"),
        "in manual wheelchair": ("in a manual wheelchair", "using a wheelchair without a motor"),
        "in motorized wheelchair": ("in a motorized wheelchair", "using an electric wheelchair"),
        "in steamy room": ("in a steamy room", "in a sauna"),
        "in suit levitating": ("levitating in a suit", "floating in a business suit"),
        "in tuxedo": ("in a tuxedo", "wearing a tuxedo"),
        "raising hand": ("raising a hand", "with one hand up"),
        "rowing boat": ("rowing a boat", "in a rowing boat"),
        "running": ("running", "jogging"),
        "taking bath": ("taking a bath", "in the bathtub"),
        "tipping hand": ("tipping a hand", "with one palm turned up at the side"),
        "wearing turban": ("wearing a turban", "with a turban"),
        "with headscarf": ("with a headscarf", "wearing a headscarf"),
        "with skullcap": ("with a skullcap", "wearing a skullcap"),
        "with veil": ("with a veil", "wearing a bridal veil"),
        "with white cane": ("with a white cane", "walking with a white cane"),
        "horse racing": ("racing on a horse", "riding a race horse"),
        "deaf": ("signing deaf", "pointing at the ear to say deaf"),
        "mermaid": ("swimming as a merperson", "with a fish tail"),
    },
    "hair": {
        "default": ("ordinary hair", "the usual hair"),
        "bald": ("a bald head", "no hair"),
        "beard": ("a beard", "a bearded face"),
    },
    "age": {
        "baby": ("a baby", "an infant"),
        "child": ("a child", "a kid"),
        "adult": ("an adult", "a grown-up"),
        "older": ("an old person", "an elderly person"),
    },
    "view": {
        "face": ("the face alone", "just the face", "a face"),
        "whole": ("the whole of it", "all of it and not the face", "without the face close up"),
    },
    "who": {
        "people": ("two gender-neutral people",),
        "men": ("two men",),
        "women": ("two women",),
        "woman and man": ("a woman and a man", "a woman with a man"),
    },
    "pose": {
        "with a heart": ("a heart between them", "a heart above the two"),
        "with bunny ears": ("bunny ears", "wearing bunny ears"),
    },
    "adults": {
        "man": ("one man", "a father alone"),
        "woman": ("one woman", "a mother alone"),
        "man man": ("two men", "two fathers"),
        "man woman": ("a man and a woman", "a father and a mother"),
        "woman woman": ("two women", "two mothers"),
    },
    "children": {
        "boy": ("one boy", "a son"),
        "girl": ("one girl", "a daughter"),
        "boy boy": ("two boys", "two sons"),
        "girl boy": ("a girl and a boy", "a daughter and a son"),
        "girl girl": ("two girls", "two daughters"),
    },
    "shape": {shape: (f"a {shape}", f"a {shape} shape") for shape in ("circle", "square", "heart")},
    "character": {"smiley": ("a smiley", "a round yellow face"), "cat": ("a cat", "a cat's face")},
}

PARAPHRASES: dict[str, dict[str, str]] = {
    "skin": {
        "default": "cartoon yellow",
        "light": "pale",
        "medium-light": "lightly tanned",
        "medium": "tanned",
        "medium-dark": "brown",
        "dark": "deep brown",
    },
    "gender": {"person": "somebody of no visible gender", "man": "a guy", "woman": "a lady"},
    "role": {
        "none": "looking straight at us with nothing else in view",
        "artist": "a painter",
        "astronaut": "a space traveller",
        "construction worker": "a builder in a hard hat",
        "cook": "a chef",
        "detective": "a sleuth",
        "elf": "a creature with pointed ears",
        "factory worker": "a welder in a plant",
        "fairy": "a winged sprite",
        "farmer": "someone who works the fields",
        "firefighter": "someone who puts out blazes",
        "genie": "a spirit out of a lamp",
        "guard": "a sentry in a tall black hat",
        "health worker": "a doctor",
        "judge": "someone who presides over a court",
        "mage": "a wizard",
        "mechanic": "someone who repairs engines",
        "office worker": "someone in business clothes",
        "pilot": "someone who flies planes",
        "police officer": "a cop",
        "scientist": "a researcher in a laboratory",
        "singer": "a rock star",
        "student": "a graduate",
        "superhero": "a caped champion",
        "supervillain": "a caped evildoer",
        "teacher": "someone in front of a blackboard",
        "technologist": "someone behind a laptop",
        "vampire": "a bloodsucker",
        "zombie": "one of the undead",
        "royal": "with a jewelled circlet on the head",
        "Claus": "in a red cap with white trim",
        "biking": "on a bike",
        "bouncing ball": "dribbling",
        "bowing": "with the head down on the floor in apology",
        "cartwheeling": "turning somersaults sideways",
        "climbing": "scaling a rock wall",
        "dancing": "moving to music",
        "facepalming": "with a hand over the face in despair",
        "feeding baby": "giving an infant its milk",
        "frowning": "looking sad",
        "gesturing NO": "with both arms in an X",
        "gesturing OK": "with both arms making an O",
        "getting haircut": "under the scissors of a barber",
        "getting massage": "with someone's hands rubbing the temples",
        "golfing": "swinging a club at a tiny ball",
        "in lotus position": "sitting cross-legged",
        "in manual wheelchair": "seated in a chair pushed by hand",
        "in motorized wheelchair": "seated in a powered chair",
        "in steamy room": "sweating in hot vapour",
        "in suit levitating": "hovering over the ground in formal wear",
        "in tuxedo": "in a black-tie outfit",
        "juggling": "keeping several balls in the air",
        "kneeling": "down on the knees",
        "lifting weights": "hoisting a barbell",
        "mountain biking": "pedalling over rough hills",
        "playing handball": "throwing a ball at a goal",
        "playing water polo": "in a pool with a ball",
        "pouting": "looking cross",
        "raising hand": "with an arm in the air",
        "rowing boat": "pulling the oars",
        "running": "sprinting",
        "shrugging": "with no idea, shoulders up",
        "standing": "upright on both feet",
        "surfing": "riding a wave on a board",
        "swimming": "doing the front crawl",
        "taking bath": "in a tub full of foam",
        "tipping hand": "giving information with a raised palm",
        "walking": "on a stroll",
        "wearing turban": "with cloth wound round the head",
        "with headscarf": "in a hijab",
        "with skullcap": "in a small round cap",
        "with veil": "in a wedding outfit",
        "with white cane": "feeling the way with a blind person's stick",
        "deaf": "unable to hear",
        "pregnant": "expecting a baby",
        "mermaid": "half fish",
        "ninja": "a masked warrior in black",
        "snowboarding": "going downhill on one board",
        "skiing": "going downhill on two boards",
        "horse racing": "a jockey in the saddle",
    },
    "hair": {
        "default": "a plain hairstyle",
        "red hair": "ginger locks",
        "curly hair": "an afro",
        "white hair": "silvery locks",
        "bald": "a shaved scalp",
        "blond hair": "fair locks",
        "beard": "whiskers on the chin",
    },
    "age": {"baby": "a newborn", "child": "a youngster", "adult": "someone fully grown", "older": "a pensioner"},
    "colour": {
        "red": "scarlet",
        "orange": "tangerine-coloured",
        "yellow": "lemon-coloured",
        "green": "emerald",
        "blue": "azure",
        "purple": "violet",
        "brown": "chocolate-coloured",
        "black": "jet-black",
        "white": "snow-white",
    },
    "direction": {
        "up": "skyward",
        "down": "at the floor",
        "left": "to nine o'clock",
        "right": "to three o'clock",
        "up-right": "north-east",
        "down-right": "south-east",
        "down-left": "south-west",
        "up-left": "north-west",
        "towards the viewer": "straight at us",
    },
    "who": {
        "people": "a pair of no visible gender",
        "men": "a pair of guys",
        "women": "a pair of ladies",
        "woman and man": "a lady with a guy",
    },
    "view": {"face": "a close-up of the head", "whole": "a full-length picture"},
    "character": {"smiley": "a plain round emoticon", "cat": "a feline"},
}
PARAPHRASES["left skin"] = PARAPHRASES["right skin"] = PARAPHRASES["skin"]
TRAINING_WORDS["left skin"] = TRAINING_WORDS["right skin"] = TRAINING_WORDS["skin"]

_SLOT_NAMES = {"who": "pair", "lid": "lid of the box"}

_ORDERED = {
    # attribute: (values from low to high, word for going down, word for going up)
    **dict.fromkeys(("skin", "left skin", "right skin"), (SKIN_TONES, "lighter", "darker")),
    "age": (("baby", "child", "adult", "older"), "younger", "older"),
}

_NOUN_SLOTS = ("species", "object", "expression", "part", "mark")

_MASS_NOUNS = frozenset(
    "bacon,baguette bread,blowfish,bread,broccoli,candy,custard,fog,french fries,fried shrimp,garlic,ice cream,"
    "leafy green,mate,meat on bone,pizza,popcorn,rolling on the floor laughing,sake,shaved ice,soft ice cream,"
    "spaghetti,star-struck,sushi,badminton,bowling,field hockey,high voltage,ice hockey,lacrosse,ping pong,softball,"
    "tennis,volleyball,baseball,basketball,american football".split(",")
)

_JOINERS = {
    "train": (" and ", ", ", " and also ", ", plus "),
    "plain": (", and at the same time ", "; besides, ", " and, secondly, "),
    "paraphrased": (" while also: ", "; on top of that ", " with a second wish: "),
    "brief": (", ", " + ", " / "),
}


def pick(choices: Sequence[T], key: str) -> T:
    """Chooses one by the hash of `key`: the same on every machine and Python, whatever was chosen before."""
    return choices[int(sha1_digest(key.encode()), 16) % len(choices)]


def attribute_of(slot: str, new: str) -> str:
    """Name of the attribute in results and templates: a role that is done rather than been is an `"activity"`."""
    return "activity" if slot == "role" and new not in OCCUPATIONS and new != "ninja" else slot


def write_caption(old: Mapping[str, str], new: Mapping[str, str], style: str, key: str) -> str:
    """Writes the relative caption that leads from one emoji to another.

    Args:
        old: attributes of the reference, from `parse_name`.
        new: attributes of the target: the same keys, other values in one or two of them.
        style: `"train"`, or a tier from `TIERS`.
        key: what decides between the phrasings, e.g. the ids of the triplet.

    Returns:
        The caption, lower case except for names.
    """
    changed = [slot for slot in new if old[slot] != new[slot]]
    parts = [_write_change(slot, old[slot], new[slot], style, f"{key}/{slot}") for slot in changed]
    caption = pick(_JOINERS[style], f"{key}/joiner").join(parts)
    if style == "brief" and pick((False, False, True), f"{key}/typo"):
        caption = _swap_two_letters(caption)
    return caption


def _write_change(slot: str, old: str, new: str, style: str, key: str) -> str:
    """Words for one changed attribute."""
    templates = TEMPLATES.get(attribute_of(slot, new), _ANYTHING)[style]
    more = _comparison(slot, old, new)
    template = pick([t for t in templates if more or "{more}" not in t], f"{key}/template")
    words = {"old": _word(slot, old, style, f"{key}/old"), "new": _word(slot, new, style, f"{key}/new")}
    return template.format(slot=_SLOT_NAMES.get(slot, slot), more=more, **words)


def _word(slot: str, value: str, style: str, key: str) -> str:
    """What a value is called in a style."""
    if style == "paraphrased" and value in PARAPHRASES.get(slot, {}):
        return PARAPHRASES[slot][value]
    words = TRAINING_WORDS.get(slot, {}).get(value) or (_with_article(slot, value),)
    return pick(words, key) if style == "train" else words[0]


def _with_article(slot: str, value: str) -> str:
    """`"apple"` -> `"an apple"`; predicates ("running"), plurals and mass nouns stay as they are."""
    is_noun = slot in _NOUN_SLOTS or (slot == "role" and value not in ACTIVITIES and value in (*OCCUPATIONS, "ninja"))
    head = value.split(" with ")[0]
    plural = head.endswith("s") and not head.endswith(("ss", "us", "hourglass"))
    if not is_noun or plural or value in _MASS_NOUNS:
        return value
    vowel = value[0].lower() in "aeio" or value.startswith(("um", "un", "up")) and not value.startswith("uni")
    return f"an {value}" if vowel else f"a {value}"


def _comparison(slot: str, old: str, new: str) -> str | None:
    """`"darker"` for a change along an ordered attribute, `None` where there is no order."""
    if slot not in _ORDERED:
        return None
    order, less, more = _ORDERED[slot]
    if old not in order or new not in order:
        return None
    return more if order.index(new) > order.index(old) else less


def _swap_two_letters(caption: str) -> str:
    """The typo of a hasty writer: the second and third letter of the longest word change places."""
    longest = max(caption.split(), key=len)
    return caption.replace(longest, longest[0] + longest[2:3] + longest[1:2] + longest[3:], 1)
